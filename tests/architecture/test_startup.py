"""Help is instant: no command's libraries are loaded to print it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from moectl.cli.app import COMMANDS

HEAVY = ("torch", "transformers", "datasets", "sqlalchemy", "alembic", "pydantic", "matplotlib", "numpy")
CPU_BUDGET_S = 0.35


def loaded_by(*args: str) -> tuple[set[str], str]:
    """The heavy libraries in ``sys.modules`` after a command line, and what it printed."""
    code = (
        "import sys\n"
        "from moectl.cli.app import main\n"
        f"code = main({list(args)!r})\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split()[1:]), result.stdout


@pytest.mark.parametrize("args", [(), ("--help",), ("--version",)])
def test_front_page_loads_nothing_heavy(args: tuple[str, ...]) -> None:
    loaded, printed = loaded_by(*args)
    assert loaded == set()
    assert "moectl" in printed


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    loaded, printed = loaded_by(command, "--help")
    assert loaded <= {"pydantic"}  # Typer itself reads options with it
    assert "Usage" in printed


def test_the_measurement_would_notice() -> None:
    loaded, _ = loaded_by("config", "show", "--resolved")
    assert {"pydantic", "torch"} <= loaded


def test_help_is_within_its_cpu_budget() -> None:
    """CPU time of the child, best of three: a busy machine lengthens waiting, not work."""

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moectl", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = min(cpu_seconds() for _ in range(3))
    assert 0.0 < best < CPU_BUDGET_S

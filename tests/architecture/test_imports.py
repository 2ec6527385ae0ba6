"""The architecture's arrows hold, and the contracts that say so would notice a wrong one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the package in ``root``, with its output."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_imports_point_one_way() -> None:
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("moe/dispatch.py", "import transformers", "Tensor code knows torch"),
        ("moe/dispatch.py", "import moectl.routers.top1", "Imports point one way"),
        ("routers/top1.py", "from moectl.models import decoder", "Imports point one way"),
        ("config/schema.py", "import torch", "Config needs no torch"),
        ("training/trainer.py", "from moectl.runs import rundir", "Training logs through a protocol"),
        ("training/trainer.py", "from moectl.corpus import sources", "Consumers of data"),
        ("evaluation/__init__.py", "import moectl.training.trainer", "Imports point one way"),
        ("runs/rundir.py", "import moectl.paths, moectl.config.schema", "The run registry is a leaf"),
        ("corpus/prepare.py", "import moectl.cli.output", "Imports point one way"),
    ],
)
def test_a_wrong_arrow_is_noticed(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(REPOSITORY / "moectl", tmp_path / "moectl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    file = tmp_path / "moectl" / module
    file.write_text(file.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")

    result = lint_imports(tmp_path)

    assert result.returncode == 1, result.stdout + result.stderr
    broken = [text for text in result.stdout.splitlines() if text.endswith("BROKEN") or "BROKEN" in text]
    assert any(contract in text for text in broken), result.stdout

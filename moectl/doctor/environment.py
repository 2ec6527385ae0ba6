"""``moectl doctor``: what this machine has, against what moectl asks for."""

from __future__ import annotations

import os
import platform
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from moectl import __version__
from moectl.doctor import home
from moectl.doctor.lines import Line, line
from moectl.doctor.report import Report
from moectl.errors import MoectlError

OWN = "moectl"
#: Extras that are not for users.
_NOT_SHOWN = frozenset({"dev"})


def environment(
    progress: Callable[[float, float, str], None] = lambda done, total, note: None,
) -> Report:
    """Look at versions, devices, transformers' releases, plug-ins, registry, disk, git and terminal.

    Nothing is changed, made or fetched. What cannot be looked at is a line that says so.
    """
    steps: tuple[tuple[str, Callable[[], Iterator[Line]]], ...] = (
        ("versions", versions),
        ("devices", devices),
        ("transformers", router_logits),
        ("plug-ins", home.plugins),
        ("registry", home.registry),
        ("disk", home.disk),
        ("surroundings", home.surroundings),
    )
    lines: list[Line] = []
    for number, (name, look) in enumerate(steps):
        progress(number, len(steps), name)
        try:
            lines += look()
        except (MoectlError, ImportError, OSError, RuntimeError, ValueError) as error:
            said = next(iter(str(error).splitlines()), "")
            todo = getattr(error, "hint", None) or "Mend what it names, and run `moectl doctor` again."
            lines.append(line(name, f"cannot be looked at: {type(error).__name__}: {said}", "problem", todo))
    return Report.of("environment", lines, [f"moectl {__version__}, home {home.where()}"])


def versions() -> Iterator[Line]:
    """Python and every dependency against the requirements of moectl's own metadata."""
    python, required, extras = requirements()
    yield _version("python", platform.python_version(), python)
    for requirement in required:
        yield _installed(requirement, needed=True)
    for extra, members in extras.items():
        missing = [each.name for each in members if _found(each.name) is None]
        if missing:
            install = f"optional, not installed ({', '.join(missing)} missing): pip install 'moectl[{extra}]'"
            yield line(f"extra '{extra}'", install)
        else:
            yield from (_installed(each, needed=False) for each in members)


def requirements() -> tuple[str, list[Any], dict[str, list[Any]]]:
    """(Python's specifier, requirements, requirements by extra), from the installed metadata or pyproject.toml.

    Raises:
        MoectlError: there is neither.
    """
    from packaging.requirements import Requirement

    plain: list[tuple[str, str]] = []
    try:
        found = metadata.metadata(OWN)
        python = found["Requires-Python"] or ""
        texts = metadata.requires(OWN) or []
    except metadata.PackageNotFoundError:
        python, texts, plain = _from_source()
    required, extras = [], {}  # type: tuple[list[Any], dict[str, list[Any]]]
    for text in texts:
        requirement = Requirement(text)
        marker = str(requirement.marker or "")
        if "extra" not in marker:
            required.append(requirement)
            continue
        plain.append((marker.partition("extra ==")[2].strip(" '\")"), text.partition(";")[0]))
    for extra, text in plain:
        if extra not in _NOT_SHOWN:
            extras.setdefault(extra, []).append(Requirement(text))
    return python, required, extras


def _from_source() -> tuple[str, list[str], list[tuple[str, str]]]:
    """The same of a source tree that is not installed."""
    file = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not file.is_file():
        raise MoectlError("moectl is not installed, and its requirements cannot be read", "pip install moectl")
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = [(extra, text) for extra, texts in project["optional-dependencies"].items() for text in texts]
    return project["requires-python"], list(project["dependencies"]), extras


def _installed(requirement: Any, *, needed: bool) -> Line:
    version = _found(requirement.name)
    if version is None:
        return line(requirement.name, "not installed", "problem", f"pip install '{requirement}'")
    return _version(requirement.name, version, str(requirement.specifier), needed=needed)


def _version(name: str, version: str, asked: str, *, needed: bool = True) -> Line:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(asked).contains(version, prereleases=True):
        return line(name, f"{version} (asked for: {asked})" if asked else version)
    todo = f"pip install '{name}{asked}'" if name != "python" else f"Use a Python {asked}."
    return line(name, f"{version}, but moectl asks for {asked}", "problem" if needed else "warning", todo)


def _found(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Line]:
    """CUDA devices with their memory and bfloat16; threads, cores, and the CPU's bfloat16."""
    import torch

    from moectl.moe.products import cpu_has_bfloat16

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield line("cuda", f"no device ({built}): everything runs on the CPU")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        yield _cuda(index)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    said = f"{threads} of {cores} cores in use ({os.cpu_count()} in the machine)"
    if threads > cores:
        todo = f"Set OMP_NUM_THREADS={cores}: more threads than cores wait for each other."
        yield line("threads", f"{threads} threads on {cores} cores", "warning", todo)
    elif threads * 2 < cores:  # half of them is torch's own choice where two make one core
        todo = "Unset OMP_NUM_THREADS, or set train.threads, unless other processes need the cores."
        yield line("threads", said, "warning", todo)
    else:
        yield line("threads", said)
    has = cpu_has_bfloat16()
    means = "multiplied in hardware" if has else "no instructions for it: train in float32 on this CPU"
    yield line("cpu bfloat16", f"{platform.machine()}: {means}")


def _cuda(index: int) -> Line:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
    said = (
        f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free,"
        f" bfloat16 {'in hardware' if bfloat16 else 'emulated'}"
    )
    if free < 0.1 * total:
        return line(f"cuda:{index}", said, "warning", "Another process fills it: see nvidia-smi.")
    if not bfloat16:
        return line(f"cuda:{index}", said, "warning", "Train in float32 on it (train.precision: float32).")
    return line(f"cuda:{index}", said)


def router_logits() -> Iterator[Line]:
    """Whether the installed transformers returns probabilities as ``router_logits``: by what is known, and by trial."""
    from moectl.hf import releases

    version = releases.installed_version()
    if version is None:
        return  # said among the versions
    code, todo = "MOE057", "Upgrade: pip install 'transformers>=5.17'."
    bad = releases.known_bad(version)
    taught = [entry for entry in bad if entry.balance_loss]
    others = ", ".join(family for entry in bad if not entry.balance_loss for family in entry.families)
    besides = f"; {others} return probabilities, and take no balance loss from them" if others else ""
    if taught:
        families = ", ".join(family for entry in taught for family in entry.families)
        said = f"in {version} router_logits are probabilities, for {families} ({taught[0].source})"
        yield line("router_logits, known", said, "problem", todo, code)
    else:
        yield line("router_logits, known", f"{version} is in no known bad range{besides}", code=code)
    probe = releases.probe_router_logits()
    low, high = probe.row_sums
    said = f"of a tiny Qwen3-MoE rows sum to {low:.3g} … {high:.3g}, and the least value is {probe.smallest:.3g}"
    if probe.probabilities:
        yield line("router_logits, tried", f"probabilities: {said}", "problem", todo, code)
    else:
        yield line("router_logits, tried", f"logits: {said}; they are x·Wᵀ, to {probe.exact:.1g}", code=code)

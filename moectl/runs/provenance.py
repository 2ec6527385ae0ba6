"""Where a run comes from, recorded before its first step: code, command, environment, machine.

The commit and the changes are those of the working folder's repository and, apart from them, of
moectl's own source. Everything is masked (``runs.secrets``) before anybody sees it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import moectl
from moectl.runs.files import dumps, write_atomic
from moectl.runs.git import UNKNOWN, Repository, read_repository, tracked
from moectl.runs.secrets import MASK, looks_secret, mask_command, mask_text

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pydantic", "sqlalchemy",
    "triton", "accelerate", "peft", "nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12",
)  # fmt: skip
_ENVIRONMENT = re.compile(
    r"(CUDA_|CUBLAS_|CUDNN_|NVIDIA_VISIBLE|NVIDIA_TF32|OMP_|GOMP_|KMP_|MKL_|OPENBLAS_|BLIS_|ATEN_|PYTORCH_|TORCH_"
    r"|TORCHINDUCTOR_|TORCHDYNAMO_|TRITON_|NCCL_|GLOO_|MOECTL_).*"
    r"|PYTHONHASHSEED|PYTHONOPTIMIZE|TOKENIZERS_PARALLELISM|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
    r"|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|SLURM_(JOB_ID|NNODES|NTASKS|PROCID|CPUS_PER_TASK)"
)


@dataclass(frozen=True)
class Provenance:
    """What ``collect`` found, masked. ``commit`` is hex or "unknown"; ``dirty`` None when not known."""

    commit: str
    dirty: bool | None
    patch: str
    source_commit: str
    source_dirty: bool | None
    source_patch: str
    source_sha256: str
    command: str
    environment: dict[str, str]
    versions: dict[str, str]
    host: str
    machine: dict[str, Any]
    repository: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The fields of run.json that come from here."""
        return {
            "commit": self.commit,
            "dirty": self.dirty,
            "source_commit": self.source_commit,
            "source_dirty": self.source_dirty,
            "source_sha256": self.source_sha256,
            "command": self.command,
            "versions": self.versions,
            "host": self.host,
        }

    def write(self, folder: Path) -> None:
        """env.json, and diff.patch and source.patch where there are changes."""
        env = {
            "command": self.command,
            "environment": self.environment,
            "versions": self.versions,
            "host": self.host,
            "machine": self.machine,
            "repository": self.repository,
            "source": {"commit": self.source_commit, "dirty": self.source_dirty, "sha256": self.source_sha256},
            "warnings": self.warnings,
        }
        write_atomic(folder / "env.json", dumps(env, indent=1) + "\n")
        for name, text in (("diff.patch", self.patch), ("source.patch", self.source_patch)):
            if text:
                write_atomic(folder / name, text)


def collect(
    command: Sequence[str] | None = None, *, commit: str | None = None, folder: Path | None = None
) -> Provenance:
    """Gather everything; about 50 ms, nothing heavy imported, never a failure.

    Args:
        command: the command line, ``sys.argv`` by default.
        commit: the working folder's commit as the user gave it; else ``MOECTL_GIT_COMMIT``, else git's.
        folder: the working folder, the current one by default.
    """
    warnings: list[str] = []
    here = read_repository(Path.cwd() if folder is None else folder)
    source = _source_repository(here)
    given = commit or os.environ.get("MOECTL_GIT_COMMIT", "").strip() or None
    if given is None:
        if here.commit == UNKNOWN:
            warnings.append(f"the commit of this run is unknown: {here.problem}. Give it with --commit.")
        elif here.problem:
            warnings.append(f"whether files are changed is unknown: {here.problem}")
    elif here.commit != UNKNOWN and not here.commit.startswith(given.lower()):
        warnings.append(f"the commit given is {given[:12]}, but git says {here.commit[:12]}; the one given is recorded")
    source_sha256 = _source_sha256()
    if source.commit == UNKNOWN:
        warnings.append(
            f"the commit of moectl's own source is unknown ({source.problem}): "
            f"version {moectl.__version__} and source hash {source_sha256[:12]} are recorded"
        )
    patch = mask_text(here.patch)
    return Provenance(
        commit=mask_text(given) if given else here.commit,
        dirty=here.dirty,
        patch=patch,
        source_commit=source.commit,
        source_dirty=source.dirty,
        # The same repository: diff.patch has it all.
        source_patch="" if source.root == here.root else mask_text(source.patch),
        source_sha256=source_sha256,
        command=_joined(mask_command(sys.argv if command is None else command)),
        environment=_environment(os.environ),
        versions=_versions(),
        host=platform.node(),
        machine=_machine(),
        repository={
            "git_commit": here.commit,
            "untracked": here.untracked,
            "patch_masked": patch != here.patch,
            "source_is_same": source.root is not None and source.root == here.root,
            "problem": None if here.problem is None else mask_text(here.problem),
        },
        warnings=[mask_text(warning) for warning in warnings],
    )


def _joined(arguments: Sequence[str]) -> str:
    """One line to paste into a shell, the masks readable (quoting would wrap them)."""
    return " ".join(argument if MASK in argument else shlex.quote(argument) for argument in arguments)


def _source_repository(here: Repository) -> Repository:
    """The repository of moectl's own source; unknown when it is installed without one."""
    package = Path(moectl.__file__).resolve().parent
    if not tracked(package / "__init__.py"):
        return Repository(
            problem=here.problem if here.problem == "there is no git program" else "it is not in a git checkout"
        )
    if here.root is not None and here.root.resolve() in package.parents:
        return here
    return read_repository(package)


def _source_sha256() -> str:
    """SHA-256 over the names and bytes of moectl's Python files: which code ran, git or not."""
    package = Path(moectl.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what is computed; by allow-list, never one with a secret-looking name."""
    return {
        name: mask_text(value)
        for name, value in sorted(variables.items())
        if _ENVIRONMENT.fullmatch(name) and not looks_secret(name)
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "moectl": moectl.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    """System, processor and memory (bytes), as far as this platform tells."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, memory = platform.processor() or platform.machine(), None
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        pass
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "python": sys.version.split("\n")[0],
        "cpu": model,
        "cpu_count": os.cpu_count(),
        "cpu_usable": usable,
        "memory_bytes": memory,
    }

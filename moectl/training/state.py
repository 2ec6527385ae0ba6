"""The checkpoint contract: a checkpoint is complete or it is not there, and a damaged one is never used.

Saving first asks whether the disk has room, then writes into a temporary folder beside the others, fsyncs every
file, lists each with size and SHA-256 in a manifest, renames the folder, fsyncs the parent, and prunes old
checkpoints last: whatever kills the process, the newest complete checkpoint survives. Loading walks from newest
to oldest, verifies, and sets bad ones aside by name. A missing, unexpected or wrongly shaped key is an error;
nothing is skipped in silence.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moectl.disk import describe
from moectl.errors import CheckError, MoectlError, NotFoundError
from moectl.models.language_model import LanguageModel
from moectl.training import checkpoint_files as files
from moectl.training.checkpoint_root import (
    STEP,
    TEMPORARY,
    checkpoint_steps,
    clean,
    locked,
    make_root,
    prune,
    publish,
    restore_replaced,
    restored_steps,
    set_aside,
    step_name,
)
from moectl.training.optim_state import pack_optimizer, unpack_optimizer
from moectl.training.rng import restore_rng, rng_state

__all__ = [
    "Checkpoint",
    "checkpoint_steps",
    "keep_checkpoints",
    "load_checkpoint",
    "load_model_strict",
    "newest_checkpoint",
    "newest_usable",
    "pack_optimizer",
    "restore_rng",
    "restored_steps",
    "rng_state",
    "save_checkpoint",
    "step_name",
    "unpack_optimizer",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What keeps this process from one checkpoint, and says nothing of the others.
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
Used = TypeVar("Used")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[part][name]`` on the CPU, and the JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    folder: Path

    @property
    def sha256(self) -> str:
        """Of the manifest, which holds the hash of every file: names this checkpoint and no other."""
        return str(describe(self.folder / files.MANIFEST)["sha256"])


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write ``root/step-XXXXXXXX`` and return it; afterwards the newest ``keep`` and ``protect`` remain.

    Each part of ``tensors`` becomes one safetensors file. ``state`` is JSON; NaN, infinities and tuples come
    back as they were. A checkpoint of the same step is replaced once the new one is complete. What killed
    processes left behind is removed first.

    Raises:
        MoectlError: the disk is full, or would be, or is not writable; what was there before stays as it was.
        TypeError, ValueError: something that safetensors or JSON cannot hold.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, not {keep} and {step}")
    final = root / step_name(step)
    temporary = root / f"{TEMPORARY}{final.name}-{secrets.token_hex(4)}"
    try:
        make_root(root)
        with locked(root):
            clean(root)
            files.refuse_full_disk(root, tensors)
            try:
                temporary.mkdir()
                files.write_folder(temporary, step, tensors, state)
                publish(temporary, final)
            finally:
                files.remove(temporary)
            prune(root, {*checkpoint_steps(root)[-keep:], *protect, step})
    except OSError as error:
        raise _write_error(final, error) from error
    return final


def load_checkpoint(folder: Path, *, parts: Collection[str] | None = None) -> Checkpoint:
    """Read one checkpoint, or only some ``parts`` of it, after verifying each file that is read.

    Raises:
        NotFoundError: there is no such folder, or no such part in it.
        CheckError: naming the file that is damaged, missing or unexpected.
        MoectlError: the system refuses to read it, which says nothing about the checkpoint.
    """
    try:
        if not folder.is_dir():
            raise NotFoundError(f"there is no checkpoint {folder}", _available(folder.parent))
        manifest = files.read_manifest(folder)
        step: int = manifest["step"]
        named = STEP.fullmatch(folder.name)
        if named and int(named[1]) != step:
            raise CheckError(f"{folder / files.MANIFEST} is that of step {step}")
        aliases: dict[str, dict[str, str]] = manifest["aliases"]
        if absent := sorted(set(parts or ()) - aliases.keys()):
            raise NotFoundError(f"{folder} has no part '{absent[0]}'", f"It has {', '.join(sorted(aliases))}.")
        wanted = [part for part in aliases if parts is None or part in parts]
        for name in (files.STATE, *(f"{part}{files.SUFFIX}" for part in wanted)):
            files.verify_file(folder / name, manifest["files"][name])
        tensors = {p: files.read_tensors(folder / f"{p}{files.SUFFIX}", aliases[p]) for p in wanted}
        return Checkpoint(step, tensors, files.read_state(folder), folder)
    except OSError as error:
        raise _read_error(folder, error) from error


def newest_checkpoint(root: Path, *, parts: Collection[str] | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that verifies, and one message for every bad one on the way: :func:`newest_usable`."""
    checkpoint, _, messages = newest_usable(root, lambda checkpoint: None, parts=parts)
    return checkpoint, messages


def newest_usable(
    root: Path, use: Callable[[Checkpoint], Used], *, parts: Collection[str] | None = None
) -> tuple[Checkpoint, Used, list[str]]:
    """The newest checkpoint that verifies and that ``use`` takes, what ``use`` made of it, and a message for every
    one that was passed over.

    What does not verify is renamed to ``step-XXXXXXXX.bad-N`` and kept; where that is not allowed, it is left
    alone and skipped. What verifies but is refused by ``use`` (it raises CheckError) is renamed once an older one
    was taken: if none is, the fault is rather the caller's. What may not be read is skipped and stays. With
    ``parts``, only those parts are verified and read.

    Raises:
        NotFoundError: there is no checkpoint at all, or no such part in it.
        CheckError: there are some, and every one is bad; or what ``use`` said of the newest.
    """
    messages: list[str] = []
    refused: dict[Path, tuple[str, CheckError]] = {}
    unreadable: dict[Path, MoectlError] = {}
    try:
        while True:
            # Nobody may save, replace or prune while it is read: a folder in motion would look damaged.
            with locked(root):
                with suppress(OSError):
                    restore_replaced(root)
                checkpoint = _next_intact(root, refused.keys(), unreadable, messages, parts)
                sha256 = "" if checkpoint is None else checkpoint.sha256
            if checkpoint is None:
                break
            try:
                used = use(checkpoint)
            except CheckError as refusal:
                refused[checkpoint.folder] = sha256, refusal
                continue
            with locked(root) if refused else nullcontext():
                for folder, (read_sha256, problem) in refused.items():
                    with suppress(OSError):  # it may be another one by now, or none
                        if describe(folder / files.MANIFEST)["sha256"] == read_sha256:
                            messages.append(f"{set_aside(folder)}: {problem.message}")
            return checkpoint, used, messages
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no checkpoint folder {root}", _available(root)) from error
    except OSError as error:
        raise _read_error(root, error) from error
    for why in (*(each for _, each in refused.values()), *unreadable.values()):
        raise why
    if not messages:
        raise NotFoundError(f"there is no checkpoint in {root}", _available(root))
    raise CheckError(
        f"no checkpoint in {root} is intact. " + " ".join(f"{message}." for message in messages),
        "Start the run anew, or put back a copy of one of them under its step-XXXXXXXX name.",
    )


def _next_intact(
    root: Path,
    passed: Collection[Path],
    unreadable: dict[Path, MoectlError],
    messages: list[str],
    parts: Collection[str] | None,
) -> Checkpoint | None:
    """The newest that verifies, but for those ``passed``: what is bad is set aside, what may not be read noted."""
    for step in reversed(checkpoint_steps(root)):
        folder = root / step_name(step)
        if folder in passed or folder in unreadable:
            continue
        try:
            return load_checkpoint(folder, parts=parts)
        except CheckError as error:
            messages.append(f"{set_aside(folder)}: {error.message}")
        except MoectlError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _UNREADABLE:
                raise
            unreadable[folder] = error
            messages.append(f"checkpoint {folder.name} is skipped: {error.message}")
    return None


def keep_checkpoints(root: Path, *, keep: int, protect: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` and ``protect``, and what killed processes left behind."""
    with locked(root):
        clean(root)
        prune(root, {*checkpoint_steps(root)[-keep:], *protect})


def load_model_strict(model: nn.Module | LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into ``model``, all of it or nothing.

    Raises:
        CheckError: listing every missing and unexpected key, every other shape or dtype, and every pair that
            the model ties but the checkpoint holds different values for. The model is unchanged then.
    """
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in own]
    shared = [name for name in own if name in tensors]
    for name in shared:
        have, want = tensors[name], own[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"differs: {name} is {list(have.shape)} {have.dtype} in the checkpoint, "
                f"{list(want.shape)} {want.dtype} in the model"
            )
    if not problems:
        problems = [
            f"differs: {name} and {first} are one tensor in the model, two in the checkpoint"
            for name, first in files.find_aliases(own).items()
            if not _same_bits(tensors[name], tensors[first])
        ]
    if problems:
        raise CheckError(
            f"the checkpoint does not fit the model in {len(problems)} place(s):\n  " + "\n  ".join(problems),
            "Use the config that the checkpoint was trained with.",
        )
    model.load_state_dict(dict(tensors), strict=True)


def _available(root: Path) -> str:
    steps = checkpoint_steps(root)
    if steps:
        return f"There are checkpoints of the steps {', '.join(map(str, steps))}."
    aside = sorted(entry.name for entry in root.glob("step-*.bad-*")) if root.is_dir() else []
    return f"Set aside as bad: {', '.join(aside)}." if aside else "The run has saved none yet."


def _read_error(folder: Path, error: OSError) -> MoectlError:
    message = f"cannot read {error.filename or folder}: {error.strerror or error}"
    if error.errno == errno.EIO:  # the disk cannot read its own sectors: damage, unlike missing rights
        return CheckError(message)
    return MoectlError(message, "The checkpoint itself may well be good: make it readable and try again.")


def _write_error(final: Path, error: OSError) -> MoectlError:
    with suppress(OSError):
        steps = [step for step in checkpoint_steps(final.parent) if step_name(step) != final.name]
        before = f"the checkpoint of step {steps[-1]} is untouched" if steps else "there is none before it"
        if error.errno in _FULL:
            return MoectlError(
                f"the disk is full: checkpoint {final.name} was not written ({error.strerror}); {before}",
                f"Free some space on the disk of {final.parent} (`moectl runs ls`, `moectl runs rm`), and resume. In"
                " another run, train.keep_checkpoints=1 and train.keep_best=false keep fewer.",
            )
        return MoectlError(
            f"cannot write checkpoint {final}: {error.strerror or error}; {before}",
            "Choose a folder that you can write to (MOECTL_HOME).",
        )
    return MoectlError(f"cannot write checkpoint {final}: {error.strerror or error}")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)

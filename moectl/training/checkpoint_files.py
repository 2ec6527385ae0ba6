"""What a checkpoint folder holds, file by file: tensors, JSON, and the manifest that vouches for both.

``<part>.safetensors`` (one per part), ``state.json`` and ``manifest.json``. The manifest lists every other
file with its size and SHA-256, and carries a SHA-256 of itself, because neither safetensors nor the file
system notices a flipped byte. No pickle anywhere: reading a checkpoint never runs code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moectl.disk import describe, fsync
from moectl.errors import CheckError, MoectlError
from moectl.training.exact_json import decode, encode

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


# --- tensors ------------------------------------------------------------------------------------------


def find_aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of one and the same tensor (tied embeddings): ``{later name: first name}``."""
    aliases: dict[str, str] = {}
    views: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (*_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            first = views.setdefault((*place, tensor.dtype, tensor.is_conj(), tensor.is_neg()), name)
            if first != name:
                aliases[name] = first
    return aliases


def split_shared(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors takes them, and the aliases it refuses.

    One tensor of many names is written once. Everything else that is not contiguous, or shares memory with
    another tensor, is written as a copy of its values.

    Raises:
        TypeError: not a dense tensor with data.
        ValueError: the name safetensors reserves.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"'{name}' is not a dense tensor with data, and cannot be saved")
        if name == "__metadata__":
            raise ValueError("'__metadata__' is reserved by safetensors and cannot name a tensor")
    aliases = find_aliases(tensors)
    unique = {
        name: tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        for name, tensor in tensors.items()
        if name not in aliases
    }
    users = Counter(_storage(tensor) for tensor in unique.values() if tensor.numel())
    for name, tensor in unique.items():
        if tensor.numel() and users[_storage(tensor)] > 1:
            unique[name] = tensor.clone()
    return unique, aliases


def _storage(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Raises OSError for what the system refused, TypeError for an unknown dtype."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        # safetensors hides the system's error in its text.
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise MoectlError(f"cannot write {path.name}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except KeyError as error:
        raise TypeError(f"safetensors cannot hold {error.args[0]} ({path.name})") from error


def read_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one file on the CPU, aliases sharing one tensor as they did when saved."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy: what safetensors hands out is mapped from the file, which may be pruned or replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckError(f"{path} cannot be read: {error}") from error
    missing = sorted(set(aliases.values()) - tensors.keys())
    if missing:
        raise CheckError(f"{path} lacks {', '.join(missing)}, which other names stand for")
    return tensors | {name: tensors[first] for name, first in aliases.items()}


# --- the folder ---------------------------------------------------------------------------------------


def write_folder(folder: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Fill the empty ``folder`` with a complete checkpoint, every file and the folder itself fsynced."""
    encoded = encode(state)
    aliases: dict[str, dict[str, str]] = {}
    _write_json(folder / STATE, encoded)
    mode = (folder / STATE).stat().st_mode
    for part, tensors in parts.items():
        if not _PART.fullmatch(part):
            raise ValueError(f"'{part}' cannot name a part: letters, digits, '-' and '_' only")
        unique, aliases[part] = split_shared(tensors)
        path = folder / f"{part}{SUFFIX}"
        write_tensors(path, unique)
        path.chmod(mode)  # safetensors makes files that only their owner can read
    files = {path.name: describe(path) for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "step": step, "files": files, "aliases": aliases}
    _write_json(folder / MANIFEST, content | {"sha256": _digest(content)})
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, found whole, with every file that it lists there in its full size and no other file.

    Hidden files (``.DS_Store``, ``.nfs...``) are not ours and do not count.

    Raises:
        CheckError: naming the file that is damaged, missing or too many.
        MoectlError: a format of a later release.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckError(f"{path} is missing: the checkpoint is not complete")
    try:
        manifest = json.loads(path.read_bytes())
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        whole, written_as = manifest["sha256"] == _digest(content), manifest["format"]
        formed = written_as != FORMAT or _well_formed(manifest)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckError(f"{path} is damaged: {error!r}") from error
    if not whole:
        raise CheckError(f"{path} is damaged: its SHA-256 differs")
    if not formed:
        raise CheckError(f"{path} is damaged: it does not say what a manifest says")
    if written_as != FORMAT:
        raise MoectlError(
            f"{folder} has checkpoint format {written_as}, this release reads {FORMAT}",
            "Use the moectl release that wrote it.",
        )
    present = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - {MANIFEST}
    for name, listed in manifest["files"].items():
        if name not in present:
            raise CheckError(f"{folder / name} is missing")
        size = (folder / name).stat().st_size
        if size != listed["size"]:
            raise CheckError(f"{folder / name} has {size} bytes, the manifest says {listed['size']}")
    if extra := sorted(present - manifest["files"].keys()):
        raise CheckError(f"{folder / extra[0]} is not in the manifest")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether it lists state.json and each part's file with size and SHA-256, and nothing is of another type."""
    listed, aliases = manifest["files"], manifest["aliases"]
    return (
        type(manifest["step"]) is int
        and all(each.keys() == {"size", "sha256"} for each in listed.values())
        and all(isinstance(first, str) for names in aliases.values() for first in names.values())
        and {STATE, *(f"{part}{SUFFIX}" for part in aliases)} <= listed.keys()
    )


def verify_file(path: Path, listed: Mapping[str, Any]) -> None:
    """Raise CheckError unless the file's size and SHA-256 are those that the manifest lists."""
    if describe(path) != listed:
        raise CheckError(f"{path} is damaged: its SHA-256 is not the one in the manifest")


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state, decoded. The caller has verified the file; CheckError where it was never a state."""
    try:
        state = decode(json.loads((folder / STATE).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckError(f"{folder / STATE} is no state: {error}") from error
    if not isinstance(state, dict):
        raise CheckError(f"{folder / STATE} is no state: it holds a {type(state).__name__}")
    return state


def refuse_full_disk(root: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise OSError (ENOSPC) where the file system of ``root`` has not the room that ``parts`` will take.

    An estimate: the tensors' bytes, and 256 for each in headers and JSON. Quotas are not seen here; what a quota
    refuses is met in writing.
    """
    needed = 0
    for tensors in parts.values():
        dense = {n: t for n, t in tensors.items() if isinstance(t, Tensor) and t.layout == torch.strided}
        once = dense.keys() - find_aliases(dense).keys()
        needed += sum(256 + dense[name].numel() * dense[name].element_size() for name in once)
    there = os.statvfs(root)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise OSError(errno.ENOSPC, f"it takes about {_megabytes(needed)}, and {_megabytes(free)} are free", str(root))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def remove(path: Path) -> None:
    """Remove a folder or file as far as it goes; what stays is tried again at the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="ascii")

"""Which files of a checkpoint folder hold tensors, and what each of them holds; nothing is believed unread.

Only safetensors are opened. A pickle runs whatever code its author put into it, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from moectl.errors import ConfigError, MoectlError, NotFoundError, unknown
from moectl.hf.family import FAMILIES, Family
from moectl.hf.family import family as family_of

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LFS = b"version https://git-lfs"


class CheckpointError(MoectlError):
    """A checkpoint that cannot be read, or does not hold what its config promises (exit code 1)."""


class Stored(NamedTuple):
    """One tensor on disk.

    Attributes:
        name: as the file has it.
        file: where it is.
        dtype: safetensors' name, such as ``BF16``.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Found(NamedTuple):
    """All tensors of a folder, and where its index is wrong about them.

    Attributes:
        tensors: every one, under a name that occurs twice as often.
        unlisted: ``file: name`` of tensors that the index does not place there.
        absent: ``file: name`` of tensors that the index promises and the file has not.
    """

    tensors: tuple[Stored, ...]
    unlisted: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def read_config(path: Path, family: str | None = None) -> tuple[Family, dict[str, Any]]:
    """A ``config.json``, given as the file or its folder, of one of the families that moectl knows.

    Args:
        family: which one it must be, by moectl's or transformers' name; None for any.

    Raises:
        NotFoundError: there is no such file.
        CheckpointError: it is no JSON object.
        ConfigError: another family, or a quantised model.
    """
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        what = f"{path} has no {CONFIG}" if path.is_dir() else f"there is no {path}"
        raise NotFoundError(what, "Give a folder that transformers' save_pretrained wrote, or its config.json.")
    config = json_object(_within(file.parent, file.name) if path.is_dir() else file)
    model_type = config.get("model_type")
    known = {known.model_type: known for known in FAMILIES.values()}
    if not isinstance(model_type, str):
        raise ConfigError(f"{file} names no model_type", f"Known: {', '.join(sorted(known))}.")
    if model_type not in known:
        raise unknown("model_type", model_type, known)
    if family is not None and family_of(family) is not known[model_type]:
        raise ConfigError(
            f"{file} is of the family '{known[model_type].name}', not '{family_of(family).name}'",
            f"Compare it with: moectl compare-hf {known[model_type].name}",
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(
            f"{file} has a quantization_config: a quantised checkpoint is compared with nothing exactly",
            "Give the checkpoint that it was made from, or dequantise it and save it in bfloat16 or wider.",
        )
    return known[model_type], config


def find_tensors(folder: Path) -> Found:
    """Every tensor in the folder's safetensors files.

    Raises:
        NotFoundError: no weights at all, or shards that are not there (all of them named).
        CheckpointError: pickles only; an index that is broken or points outside; files that cannot be read
            (all of them named); shards without an index.
    """
    present = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    if (folder / INDEX).is_file():
        return _indexed(folder, _weight_map(folder), present)
    if len(present) > 1:
        raise CheckpointError(
            f"{folder} has {len(present)} safetensors files and no {INDEX}: which belong together is not said",
            f"Fetch the {INDEX} that was saved with them, or leave the one file that is meant.",
        )
    if not present:
        raise _no_weights(folder)
    return Found(tuple(_headers([_within(folder, present[0])])))


def refuse_file(path: Path) -> MoectlError:
    """Why ``path``, which is no folder, is no checkpoint."""
    if path.suffix in PICKLES:
        return _pickled(path.parent, [path.name])
    if path.is_file():
        return NotFoundError(f"{path} is a file", "Give the folder that holds config.json and the safetensors files.")
    return NotFoundError(f"there is no folder {path}")


def _indexed(folder: Path, weight_map: Mapping[str, str], present: Iterable[str]) -> Found:
    shards = sorted(set(weight_map.values()))
    files = {shard: _within(folder, shard) for shard in shards}
    absent = [shard for shard, file in files.items() if not file.is_file()]
    if absent:
        raise NotFoundError(
            f"{folder / INDEX} names {len(absent)} of {len(shards)} shards that are not there: {', '.join(absent)}",
            "Fetch them: a checkpoint is read whole or not at all.",
        )
    files |= {name: _within(folder, name) for name in present}  # a stray file is read too, and its tensors told
    tensors = tuple(_headers(files.values()))
    there = {(tensor.file, tensor.name) for tensor in tensors}
    return Found(
        tensors,
        tuple(f"{t.file.name}: {t.name}" for t in tensors if files.get(weight_map.get(t.name, "")) != t.file),
        tuple(f"{shard}: {name}" for name, shard in weight_map.items() if (files[shard], name) not in there),
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard, each of which lies in the folder."""
    index = json_object(_within(folder, INDEX))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to file names")
    pickled = sorted({shard for shard in weight_map.values() if Path(shard).suffix in PICKLES})
    if pickled:
        raise _pickled(folder, pickled)
    return weight_map


def _within(folder: Path, name: str) -> Path:
    """``folder / name``, refused where that is another place: by ``..``, an absolute path or a link.

    A snapshot in transformers' own cache is made of links into the ``blobs`` beside it; those are let through.
    """
    inside = folder.resolve()
    home = inside.parent.parent if inside.parent.name == "snapshots" else inside
    plain = PurePosixPath(name)
    outside = plain.is_absolute() or Path(name).is_absolute() or ".." in plain.parts or "\\" in name
    target = (folder / name).resolve()
    allowed = target.is_relative_to(inside) or (home != inside and target.is_relative_to(home / "blobs"))
    if outside or not allowed:
        raise CheckpointError(
            f"{folder} refers to '{name}', which is not in that folder",
            "A checkpoint's files lie beside its config.json: copy them there if you trust them.",
        )
    return folder / name


def _headers(files: Iterable[Path]) -> list[Stored]:
    """What each file says it holds; the file's size is checked against it, no tensor is read.

    Raises:
        CheckpointError: naming all files that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    found, broken = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    part = opened.get_slice(name)
                    found.append(Stored(name, file, tuple(part.get_shape()), str(part.get_dtype())))
        except (SafetensorError, OSError) as error:
            broken.append(f"{file.name}: {_why_broken(file, error)}")
    if broken:
        raise CheckpointError(
            f"{len(broken)} file{'s' if len(broken) > 1 else ''} of the checkpoint cannot be read:\n  "
            + "\n  ".join(broken),
            "Fetch them again; an interrupted download or copy leaves such files.",
        )
    return found


def _why_broken(file: Path, error: Exception) -> str:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_LFS))
    except OSError:
        return str(error)
    if start == _LFS:
        return "a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    return f"a truncated file or a corrupt header ({error})"


def _no_weights(folder: Path) -> MoectlError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        return _pickled(folder, pickles)
    return NotFoundError(f"{folder} holds no *.safetensors", "Give the folder that the weights were saved in.")


def _pickled(folder: Path, names: list[str]) -> CheckpointError:
    convert = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')"
    return CheckpointError(
        f"{folder} holds its weights as pickles ({', '.join(names)}), which may run any code when they are loaded",
        "If you trust them, convert them once with transformers, which writes safetensors:"
        f" {convert}. A bare state dict: safetensors.torch.save_file(torch.load(FILE, weights_only=True),"
        " 'model.safetensors'). See: moectl explain MOE069",
    )


def json_object(file: Path) -> dict[str, Any]:
    """What a JSON file holds, refused where that is no object or names a key twice."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice, JSON readers take the last and say nothing."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"named twice: {', '.join(twice)}")
    return dict(pairs)

"""A folder of safetensors as weights under canonical names, read when they are asked for.

Fused tensors are memory-mapped; experts stored one by one are copied into a stack, one canonical tensor at
a time. Whatever does not fit the config is told in one report: nothing is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moectl.hf.build import config_object
from moectl.hf.checkpoint_files import CheckpointError, Found, Stored, find_tensors, read_config, refuse_file
from moectl.hf.checkpoint_layouts import Part, Place, fuse, parts_of, place_of, stored_name
from moectl.hf.family import Family

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
Kind = Literal["missing", "unknown", "wrong shape", "duplicated", "wrong dtype", "not in the index", "tied"]


class Problem(NamedTuple):
    """A tensor that is not as the config has it.

    Attributes:
        name: as on disk, or as it would be there.
    """

    kind: Kind
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}{f' ({self.detail})' if self.detail else ''}"


class Tensors(Mapping[str, Tensor]):
    """Canonical name to tensor; each access reads anew, so that nothing is held that nobody holds.

    Args:
        sources: of each canonical tensor, its parts on disk; a part for no expert is the whole.
        shapes: of the canonical tensors.
        prefix: of the names that are shown, and cut off.
        dtype: what is read is converted to it; None for as stored.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[Place, Stored]],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        prefix: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._sources, self._shapes, self._prefix, self._dtype = sources, shapes, prefix, dtype

    def part(self, prefix: str) -> Tensors:
        """Of one component, under its own names: ``part("model.layers.3.")["mlp.gate.weight"]``."""
        return Tensors(self._sources, self._shapes, prefix=self._prefix + prefix, dtype=self._dtype)

    def to(self, dtype: torch.dtype) -> Tensors:
        """The same, converted as it is read; a tensor that has the dtype already stays memory-mapped."""
        return Tensors(self._sources, self._shapes, prefix=self._prefix, dtype=dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self._shapes[self._prefix + name]

    def __getitem__(self, name: str) -> Tensor:
        canonical = self._prefix + name
        sources = self._sources[canonical]
        first = next(iter(sources.values()))
        if Place(canonical) in sources:
            tensor = _read(first)
            return tensor if self._dtype is None else tensor.to(self._dtype)
        with ExitStack() as files:
            opened = {stored.file: files.enter_context(_open(stored.file)) for stored in sources.values()}

            def read(expert: int, part: Part) -> Tensor:
                stored = sources[Place(canonical, expert, part)]
                return _tensor(opened[stored.file], stored)

            dtype = self._dtype or _DTYPES[first.dtype]
            return fuse(self._shapes[canonical], dtype, read, down=canonical.endswith(".down_proj"))

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._sources if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._prefix + name in self._sources


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked through.

    Attributes:
        folder: where.
        family: moectl's name of it.
        config: as in config.json.
        layout: how its experts are stored.
        tensors: by canonical name, whatever of them is whole; of a tied head, the embedding alone.
        problems: what does not fit; none after a strict reading.
    """

    folder: Path
    family: str
    config: dict[str, Any]
    layout: Literal["per-expert", "fused", "mixed"]
    tensors: Tensors
    problems: tuple[Problem, ...] = field(default=())


def read_folder(path: Path | str, *, family: str | None = None, strict: bool = True) -> Checkpoint:
    """Look through a checkpoint folder: names, shapes and dtypes of all its tensors against its config.

    Args:
        family: which it must be, by moectl's or transformers' name; None for any that moectl knows.
        strict: whether a tensor that does not fit is an error, or told in ``problems``.

    Raises:
        NotFoundError: no such folder, no config.json, no weights, or absent shards.
        ConfigError: another family, a quantised model, or a config that transformers refuses.
        CheckpointError: pickles, paths that lead outside, broken files; when strict, tensors that do not
            fit, all of them listed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise refuse_file(folder)
    known, config = read_config(folder, family)
    found, wanted = find_tensors(folder), canonical_shapes(known, config)
    sources, problems = _by_place(found, known)
    faults = {name: list(_faults(name, parts, wanted, known)) for name, parts in sources.items()}
    problems += [fault for name in faults for fault in faults[name] if name != HEAD or name in wanted]
    problems += [Problem("missing", name, str(list(shape))) for name, shape in wanted.items() if name not in sources]
    problems += _tied(known, config, sources)
    whole = {name: sources[name] for name in wanted if name in sources and not faults[name]}
    if strict and problems:
        listing = "\n  ".join(map(str, problems))
        hint = "Names and shapes follow from config.json; is it this checkpoint's own?"
        if all(not stored.name.startswith("model.") for stored in found.tensors):
            hint = "No name starts with 'model.': save the causal language model, not its base model alone."
        raise CheckpointError(f"{len(problems)} tensors of {folder} do not fit its config:\n  {listing}", hint)
    return Checkpoint(folder, known.name, config, _layout(sources), Tensors(whole, wanted), tuple(problems))


def canonical_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of all that a checkpoint of this config holds, by transformers itself; no memory is taken.

    A tied head is its embedding's copy and not listed.

    Raises:
        ConfigError: transformers refuses the config.
    """
    settings = config_object(family, config)
    with torch.device("meta"):
        model = family.class_of("model")(settings)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def _by_place(found: Found, family: Family) -> tuple[dict[str, dict[Place, Stored]], list[Problem]]:
    """Stored tensors by the canonical one that they are part of, and what the index and names say wrong."""
    sources: dict[str, dict[Place, Stored]] = defaultdict(dict)
    problems = [Problem("not in the index", name) for name in found.unlisted]
    problems += [Problem("missing", name, "the index says that it is there") for name in found.absent]
    for stored in found.tensors:
        place = place_of(stored.name, family.name)
        if (same := sources[place.canonical].get(place)) is not None:
            problems.append(Problem("duplicated", stored.name, _both(same, stored)))
        else:
            sources[place.canonical][place] = stored
    return dict(sources), problems


def _faults(
    canonical: str, parts: Mapping[Place, Stored], wanted: Mapping[str, tuple[int, ...]], family: Family
) -> Iterator[Problem]:
    """What is wrong with one canonical tensor's parts."""
    shapes: dict[Place, tuple[int, ...]] = {}
    if canonical in wanted:
        by_expert = parts_of(canonical, wanted[canonical], family.name)
        shapes = {Place(canonical): wanted[canonical], **by_expert}
        one_by_one = Place(canonical) not in parts
        for place in by_expert if one_by_one else ():
            if place not in parts:
                yield Problem("missing", stored_name(place, family.name), str(list(by_expert[place])))
        for place, stored in parts.items() if not one_by_one and len(parts) > 1 else ():
            if place.expert is not None:
                yield Problem("duplicated", stored.name, f"{canonical} holds all experts already")
    dtypes = {stored.dtype for stored in parts.values()}
    for place, stored in parts.items():
        if place not in shapes:
            yield Problem("unknown", stored.name, str(list(stored.shape)))
        elif stored.shape != shapes[place]:
            yield Problem("wrong shape", stored.name, f"{list(stored.shape)}, must be {list(shapes[place])}")
        if stored.dtype not in _DTYPES:
            yield Problem("wrong dtype", stored.name, f"{stored.dtype}, must be one of {', '.join(_DTYPES)}")
        elif len(dtypes) > 1:
            yield Problem("wrong dtype", stored.name, f"{stored.dtype}, where other experts have another")


def _tied(family: Family, config: Mapping[str, Any], sources: Mapping[str, Mapping[Place, Stored]]) -> list[Problem]:
    """A head that is stored although it is tied must be the embedding's copy."""
    if not config_object(family, config).tie_word_embeddings or HEAD not in sources or EMBEDDINGS not in sources:
        return []
    head, embeddings = (sources[name][Place(name)] for name in (HEAD, EMBEDDINGS))
    if head[2:] == embeddings[2:] and head.dtype in _DTYPES and torch.equal(_read(head), _read(embeddings)):
        return []
    return [Problem("tied", HEAD, f"it is not {EMBEDDINGS}, although the config ties them")]


def _layout(sources: Mapping[str, Mapping[Place, Stored]]) -> Literal["per-expert", "fused", "mixed"]:
    """By the tensors that may be stored in either way."""
    apart = any(place.expert is not None for parts in sources.values() for place in parts)
    stacked = any(".experts." in name and Place(name) in parts for name, parts in sources.items())
    return "mixed" if apart and stacked else "per-expert" if apart else "fused"


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def _read(stored: Stored) -> Tensor:
    """One stored tensor, memory-mapped."""
    with _open(stored.file) as opened:
        return _tensor(opened, stored)


def _tensor(opened: Any, stored: Stored) -> Tensor:
    tensor: Tensor = opened.get_tensor(stored.name)
    return tensor


def _both(one: Stored, other: Stored) -> str:
    return f"in {one.file.name} as {one.name}, and in {other.file.name}"

"""The two ways in which experts are stored, and their names: one tensor per expert, or all of them stacked.

Canonical names are transformers' own in memory, with stacked experts: ``mlp.experts.gate_up_proj [E, 2F, D]``,
gate rows first, and ``mlp.experts.down_proj [E, D, F]``. Files mostly have ``mlp.experts.3.gate_proj.weight
[F, D]``; Mixtral's have ``block_sparse_moe.experts.3.w1.weight``. Source: ``conversion_mapping.py`` of transformers.

Shape legend: D hidden, E experts, F expert intermediate.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moectl.errors import ConfigError

Part = Literal["gate", "up", "down"]
_EXPERT = re.compile(r"^(?P<block>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight$")


class Layout(NamedTuple):
    """How a family's files name experts that are stored one by one.

    Attributes:
        parts: of one expert's matrices.
        block: what the MoE block is called in files, where canonical names say ``mlp``; None: the same.
    """

    parts: Mapping[str, Part]
    block: str | None = None


_PROJECTIONS: dict[str, Part] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_NUMBERED: dict[str, Part] = {"w1": "gate", "w3": "up", "w2": "down"}
#: By family; gpt-oss has never stored its experts one by one.
LAYOUTS: dict[str, Layout] = {
    "qwen3": Layout(_PROJECTIONS),
    "qwen2_moe": Layout(_PROJECTIONS),
    "olmoe": Layout(_PROJECTIONS),
    "deepseek_v3": Layout(_PROJECTIONS),
    "mixtral": Layout(_NUMBERED, block="block_sparse_moe"),
    "gpt_oss": Layout({}),
}


class Place(NamedTuple):
    """What of a canonical tensor a stored one is.

    Attributes:
        canonical: its name.
        expert: whose part; None for the whole tensor.
    """

    canonical: str
    expert: int | None = None
    part: Part | None = None


def place_of(name: str, family: str) -> Place:
    """Where a stored tensor belongs, by its name alone."""
    layout = LAYOUTS[family]
    if layout.block is not None:
        name = name.replace(f".{layout.block}.", ".mlp.", 1)
    match = _EXPERT.match(name)
    part = layout.parts.get(match["part"]) if match else None
    if match is None or part is None:
        return Place(name)
    return Place(f"{match['block']}.{'down_proj' if part == 'down' else 'gate_up_proj'}", int(match["expert"]), part)


def stored_name(place: Place, family: str) -> str:
    """The name of a part in the family's per-expert layout: :func:`place_of` read backwards."""
    layout, name = LAYOUTS[family], place.canonical
    if place.expert is not None:
        word = next(word for word, part in layout.parts.items() if part == place.part)
        name = f"{name.rpartition('.')[0]}.{place.expert}.{word}.weight"
    return name if layout.block is None else name.replace(".mlp.", f".{layout.block}.", 1)


def parts_of(canonical: str, shape: tuple[int, ...], family: str) -> dict[Place, tuple[int, ...]]:
    """The per-expert tensors that make up a canonical one, with their shapes; none for what is not experts'."""
    if not LAYOUTS[family].parts or len(shape) != 3 or not re.search(r"(^|\.)experts\.(gate_up|down)_proj$", canonical):
        return {}
    count, rows, columns = shape
    if canonical.endswith(".down_proj"):
        return {Place(canonical, expert, "down"): (rows, columns) for expert in range(count)}
    half: tuple[Part, ...] = ("gate", "up")
    return {Place(canonical, expert, part): (rows // 2, columns) for expert in range(count) for part in half}


def fuse(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[int, Part], Tensor], *, down: bool) -> Tensor:
    """All experts' parts in one tensor of ``shape``, copied one by one as ``read`` gives them."""
    fused = torch.empty(shape, dtype=dtype)
    for expert in range(shape[0]):
        if down:
            fused[expert].copy_(read(expert, "down"))
            continue
        gate, up = fused[expert].chunk(2)
        gate.copy_(read(expert, "gate"))
        up.copy_(read(expert, "up"))
    return fused


def to_per_expert(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Canonical weights under the names of the family's files, one tensor per expert and matrix.

    They are views: nothing is copied. ``safetensors.torch.save_file`` wants them ``.contiguous()``.
    """
    stored: dict[str, Tensor] = {}
    for canonical, tensor in weights.items():
        parts = parts_of(canonical, tuple(tensor.shape), family)
        if not parts:
            stored[stored_name(Place(canonical), family)] = tensor
        for place in parts:
            assert place.expert is not None
            expert = tensor[place.expert]
            if place.part != "down":
                gate, up = expert.chunk(2)
                expert = gate if place.part == "gate" else up
            stored[stored_name(place, family)] = expert
    return stored


def to_fused(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Weights under any of the family's stored names as canonical ones; experts are copied into stacks.

    Raises:
        ConfigError: experts of which a part is missing, there twice, or of another shape (all are named).
    """
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, Part], Tensor]] = defaultdict(dict)
    faults = []
    for name, tensor in weights.items():
        place = place_of(name, family)
        if place.expert is None or place.part is None:
            if place.canonical in fused:
                faults.append(f"{name} is there twice")
            fused[place.canonical] = tensor
        elif (place.expert, place.part) in experts[place.canonical]:
            faults.append(f"{name} is there twice")
        else:
            experts[place.canonical][place.expert, place.part] = tensor
    for canonical, parts in experts.items():
        count, one = 1 + max(expert for expert, _ in parts), next(iter(parts.values()))
        down = canonical.endswith(".down_proj")
        shape = (count, one.shape[0] * (1 if down else 2), *one.shape[1:])
        wanted = parts_of(canonical, shape, family)
        missing = [place for place in wanted if (place.expert, place.part) not in parts]
        faults += [f"{stored_name(place, family)} is missing" for place in missing]
        found = {place: parts[place.expert, place.part] for place in wanted if place not in missing}  # type: ignore[index]
        faults += [f"{stored_name(p, family)} is {list(t.shape)}" for p, t in found.items() if t.shape != one.shape]
        faults += [f"{canonical} is there twice"] if canonical in fused else []
        if not faults:
            fused[canonical] = fuse(shape, one.dtype, lambda e, p, parts=parts: parts[e, p], down=down)  # type: ignore[misc]
    if faults:
        raise ConfigError("the experts do not make whole tensors: " + "; ".join(faults))
    return fused

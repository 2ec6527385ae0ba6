"""The role of every tensor of a module: its path taken apart, in the context of its neighbours.

Sizes: D hidden, F expert intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from moectl.parity.candidate import words
from moectl.parity.candidate.words import Words, words_of
from moectl.parity.case import Level

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Named:
    """A tensor and what it seems to be.

    Attributes:
        name: the candidate's.
        shape: as it is.
        linear: whether torch fixes its orientation as ``[out, in]`` (``nn.Linear``, ``nn.Embedding``).
        layer: number of its layer, None outside or in a lone component.
        role: see :mod:`moectl.parity.candidate.words`; None where no name is known.
        expert, head: which one it belongs to, None where it holds all.
        remark: what was assumed.
    """

    name: str
    shape: Shape
    linear: bool
    layer: int | None = None
    role: str | None = None
    expert: int | None = None
    head: int | None = None
    remark: str | None = None


@dataclass
class NamedTensors:
    """All of them, in the module's order; sentences on what is unclear; pairs that are one tensor."""

    found: dict[str, Named] = field(default_factory=dict)
    unclear: list[str] = field(default_factory=list)
    tied: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Place:
    """A tensor's path in its layer."""

    named: Named
    words: Words
    segments: tuple[str, ...]  # below the layer
    index: int | None  # the last index below the layer
    attention: bool
    shared: bool


def named_tensors(module: nn.Module, level: Level, sizes: Mapping[str, int]) -> NamedTensors:
    """Parameters and buffers with their roles."""
    result = NamedTensors(tied=_tied(module))
    places = [_place(name, tensor, module, level) for name, tensor in _tensors(module)]
    ffn: dict[tuple[object, ...], list[_Place]] = defaultdict(list)
    routers: dict[int | None, list[_Place]] = defaultdict(list)
    for place in places:
        role = _simple_role(place, level, sizes)
        if role is not None:
            _put(result, place, role)
        elif _may_route(place, level, sizes):
            routers[place.named.layer].append(place)
        elif level != "attention" and not place.attention:
            ffn[_group(place)].append(place)
        else:
            result.found[place.named.name] = place.named
    for contenders in routers.values():
        _choose_router(contenders, result)
    for group in ffn.values():
        _ffn(group, result, sizes)
    order = {name: number for number, (name, _) in enumerate(_tensors(module))}
    result.found = dict(sorted(result.found.items(), key=lambda item: order[item[0]]))
    return result


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, then floating-point buffers. Buffers matter where a family's choice bias is one."""
    buffers = [(name, b) for name, b in module.named_buffers() if b.is_floating_point()]
    return [*module.named_parameters(), *buffers]


def _tied(module: nn.Module) -> tuple[tuple[str, str], ...]:
    first: dict[int, str] = {}
    pairs = []
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if id(tensor) in first:
            pairs.append((first[id(tensor)], name))
        first.setdefault(id(tensor), name)
    return tuple(pairs)


def _place(name: str, tensor: Tensor, module: nn.Module, level: Level) -> _Place:
    taken = words_of(name)
    layer, segments, indices = None, taken.segments, list(taken.indices)
    if level == "model" and indices:
        at, number = indices[0]
        before = segments[at - 1] if at else ""
        if before not in words.EXPERTS and (before in words.LAYERS or at <= 2):
            layer, segments = number, segments[at:]
            indices = [(place - at, index) for place, index in indices[1:]]
    owner = module.get_submodule(name.rpartition(".")[0])
    linear = isinstance(owner, (nn.Linear, nn.Embedding))
    attention = level == "attention" or any(segment in words.ATTENTION for segment in segments)
    shared = any(segment in words.SHARED or segment.startswith("shared") for segment in segments)
    return _Place(
        Named(name, tuple(tensor.shape), linear, layer),
        taken,
        segments,
        indices[-1][1] if indices else None,
        attention,
        shared,
    )


def _simple_role(place: _Place, level: Level, sizes: Mapping[str, int]) -> str | None:
    """Roles that the path alone decides: all but routers and feed-forward weights."""
    segments, shape = place.segments, place.named.shape
    last = segments[-1] if segments else ""
    outside = level == "model" and place.named.layer is None
    if outside:
        found = words.model_role(last) or (words.model_role(segments[-2]) if len(segments) > 1 else None)
        wide = len(shape) == 2
        if found == "final_norm":
            return "final_norm" if not wide and not place.words.bias else None
        return found if found is None or wide or place.words.bias else None
    if words.is_choice_bias(last) and shape == (sizes["E"],) and level != "attention":
        return "choice_bias"
    if level not in ("moe", "router"):
        inside = place.attention
        for segment in reversed(segments):
            role = words.attention_role(segment, inside=inside)
            if role is not None and (
                role.endswith("norm") == (len(shape) == 1 and not place.words.bias) or place.words.bias
            ):
                return role
            if segment in words.ATTENTION:
                break
        if len(shape) == 1 and not place.words.bias:
            return next(filter(None, (words.norm_role(segment) for segment in reversed(segments))), None)
    return None


def _may_route(place: _Place, level: Level, sizes: Mapping[str, int]) -> bool:
    """Whether it has the shape of a router's weight or bias and stands where routers stand."""
    if level == "attention" or place.attention or place.index is not None:
        return False
    shape, last = place.named.shape, place.segments[-1] if place.segments else ""
    if place.shared:
        return False
    if place.words.bias:
        return shape == (sizes["E"],)
    return len(shape) == 2 and set(shape) == {sizes["E"], sizes["D"]} and not _is_ffn_word(last, place)


def _is_ffn_word(last: str, place: _Place) -> bool:
    plainly = words.is_router(last) or last in ("weight", "w")
    return not plainly and bool(words.ffn_roles({last: place.named.shape}))


def _choose_router(places: list[_Place], result: NamedTensors) -> None:
    weights = [place for place in places if not place.words.bias]
    known = [place for place in weights if any(words.is_router(segment) for segment in place.segments)]
    quiet = [place for place in known or weights if "nois" not in place.named.name.lower()]
    chosen = quiet if len(quiet) == 1 else [p for p in quiet if words.is_router(p.segments[-1])] or quiet
    if len(chosen) > 1:
        names = " and ".join(place.named.name for place in chosen)
        result.unclear.append(f"{names} all have the shape of a router's weight")
    for place in weights:
        if len(chosen) == 1 and place is chosen[0]:
            remark = None if place in known else "by its shape"
            result.found[place.named.name] = replace(place.named, role="router", remark=remark)
        else:
            result.found[place.named.name] = place.named
    for place in places:
        if place.words.bias:
            beside = bool(chosen) and _parent(place) == _parent(chosen[0])
            result.found[place.named.name] = replace(place.named, role="router.bias" if beside else None)


def _parent(place: _Place) -> str:
    return place.named.name.rpartition(".")[0]


def _group(place: _Place) -> tuple[object, ...]:
    """Tensors of one expert, or of one stack, belong together."""
    own = place.named.name.split(".")
    numbers = [part for part in own if part.isdigit()]
    return place.named.layer, place.shared, place.index, len(numbers), place.words.bias


def _ffn(group: list[_Place], result: NamedTensors, sizes: Mapping[str, int]) -> None:
    shared = group[0].shared
    shapes: dict[str, Shape] = {}
    heads = {place.named.name: _ffn_word(place) for place in group}
    for place in group:
        shapes.setdefault(heads[place.named.name], place.named.shape)
    if shared:
        for place in group:
            if place.segments and (words.is_shared_router(place.segments[-1]) or place.named.shape == (1, sizes["D"])):
                shapes.pop(heads[place.named.name], None)
    roles = words.ffn_roles(shapes)
    for place in group:
        role, remark = roles.get(heads[place.named.name], (None, None))
        if role is None and shared and place.segments and place.named.shape == (1, sizes["D"]):
            role = "router"
        if role is not None and shared:
            role = f"shared_{role}"
        if role is not None and place.words.bias:
            role += ".bias"
        result.found[place.named.name] = replace(
            place.named, role=role, expert=None if shared else _expert(place, sizes), remark=remark
        )


def _ffn_word(place: _Place) -> str:
    """The name that tells gate, up and down apart: the last that does, outwards."""
    for segment in reversed(place.segments):
        if words.ffn_roles({segment: place.named.shape}) or segment[-1:].isdigit():
            return segment
    return place.segments[-1] if place.segments else ""


def _expert(place: _Place, sizes: Mapping[str, int]) -> int | None:
    expected = 1 if place.words.bias else 2
    return (
        place.index
        if place.index is not None and len(place.named.shape) == expected and place.index < sizes["E"]
        else None
    )


def _put(result: NamedTensors, place: _Place, role: str) -> None:
    head = place.index if place.attention and role in ("q", "k", "v") else None
    biased = place.words.bias and role != "choice_bias"
    result.found[place.named.name] = replace(place.named, role=f"{role}.bias" if biased else role, head=head)

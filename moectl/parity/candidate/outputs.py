"""What a candidate returns, recognised by names, dtypes and shapes.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BALANCE = ("aux_loss", "balance_loss", "load_balancing_loss", "router_loss", "moe_loss", "lb_loss", "auxiliary_loss")
_ALWAYS = 1e-3  # rows of probabilities sum to one, in bfloat16 to three digits


def tensors_in(output: Any, label: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in tuples, lists, mappings, dataclasses and objects with attributes, with a label."""
    if isinstance(output, Tensor):
        yield label, output
        return
    items: list[tuple[str, Any]]
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        items = list(zip(output._fields, output, strict=True))
    elif isinstance(output, (tuple, list)):
        items = [(str(place), value) for place, value in enumerate(output)]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = [(each.name, getattr(output, each.name)) for each in dataclasses.fields(output)]
    elif hasattr(output, "__dict__") and not isinstance(output, (torch.nn.Module, type)):
        items = list(vars(output).items())
    else:
        return
    for key, value in items:
        yield from tensors_in(value, f"{label}.{key}" if label else key)


def main_output(output: Any, leading: tuple[int, int], width: int) -> Tensor | None:
    """The ``[B, S, width]`` in ``output``, the one called logits, hidden or out first; None where there is none."""
    batch, length = leading
    shapes = ((batch, length, width), (batch * length, width))
    fitting = [(name, t) for name, t in tensors_in(output) if tuple(t.shape) in shapes and t.is_floating_point()]
    if not fitting:
        return None
    named = [
        t for name, t in fitting if name.rpartition(".")[2] in ("logits", "output", "out", "hidden_states", "lm_logits")
    ]
    chosen = named[0] if named else fitting[0][1]
    return chosen.reshape(batch, length, width)


def balance_loss_in(output: Any) -> Tensor | None:
    """A scalar that is called a balance loss."""
    for name, tensor in tensors_in(output):
        if tensor.dim() == 0 and name.rpartition(".")[2] in _BALANCE and tensor.is_floating_point():
            return tensor
    return None


def describe(output: Any) -> str:
    """What was returned, in a few words."""
    found = [
        f"{name + ': ' if name else ''}{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in tensors_in(output)
    ]
    kind = type(output).__name__
    return f"{kind} of {', '.join(found[:6])}" if found and kind != "Tensor" else found[0] if found else kind


class RouterReading(NamedTuple):
    """Which of a router's returned tensors (by place) means what; None where it is not returned."""

    logits: int | None = None
    probs: int | None = None
    weights: int | None = None
    indices: int | None = None
    dense: int | None = None
    mapped: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether a choice can be read."""
        return self.indices is not None or self.dense is not None or self.mapped is not None

    def __str__(self) -> str:
        names = {"logits": "logits [T, E]", "probs": "probabilities [T, E]", "weights": "weights [T, K]",
                 "indices": "indices [T, K]", "dense": "dense weights [T, E]", "mapped": "a map [T, E]"}  # fmt: skip
        places = {place: names[key] for key, place in self._asdict().items() if place is not None}
        return ", ".join(places[place] for place in sorted(places)) or "nothing known"


def read_router(output: Any, *, tokens: int, num_experts: int, top_k: int) -> RouterReading:
    """Recognise a router's output. ``tokens``, ``num_experts`` and ``top_k`` must be three different numbers."""
    found: dict[str, int] = {}
    for place, (label, tensor) in enumerate(tensors_in(output)):
        role = _role_of(label.rpartition(".")[2].lower(), tensor, tokens, num_experts, top_k)
        if role is not None:
            found.setdefault(role, place)
    return RouterReading(**found)


def _role_of(label: str, tensor: Tensor, tokens: int, num_experts: int, top_k: int) -> str | None:
    last, count = tensor.shape[-1] if tensor.dim() else 0, tensor.numel()
    if last == top_k and count == tokens * top_k:
        return "weights" if tensor.is_floating_point() else "indices"
    if last != num_experts or count != tokens * num_experts:
        return None
    if not tensor.is_floating_point():
        values = tensor.reshape(-1, num_experts)
        return "mapped" if bool(((values == 0) | (values == 1)).all()) else None
    if "logit" in label:
        return "logits"
    values = tensor.detach().reshape(-1, num_experts)
    nonzero_T = (values != 0).sum(dim=-1)
    if bool((nonzero_T <= top_k).all()):
        return "mapped" if bool(((values == 0) | (values == 1)).all()) and top_k > 1 else "dense"
    sums_T = values.float().sum(dim=-1)
    if bool((values >= 0).all()) and bool(((sums_T - 1).abs() < _ALWAYS).all()):
        return "probs"
    return "logits"


class Routed(NamedTuple):
    """What a router did, spread over experts; None where it does not show it."""

    logits_TE: Tensor | None = None
    chosen_TE: Tensor | None = None
    weights_TE: Tensor | None = None


def routed(output: Any, reading: RouterReading, *, num_experts: int) -> Routed:
    """Take a router's output apart as ``reading`` says."""
    tensors = [tensor for _, tensor in tensors_in(output)]

    def get(place: int | None) -> Tensor | None:
        return None if place is None or place >= len(tensors) else tensors[place].reshape(-1, tensors[place].shape[-1])

    logits, weights_TK, indices_TK = get(reading.logits), get(reading.weights), get(reading.indices)
    dense_TE, map_TE = get(reading.dense), get(reading.mapped)
    if indices_TK is not None:
        spread = spread_out(weights_TK, indices_TK, num_experts)
        return Routed(logits, spread[0], spread[1] if dense_TE is None else dense_TE)
    if map_TE is not None:
        return Routed(logits, map_TE.bool(), dense_TE)
    return Routed(logits, None if dense_TE is None else dense_TE != 0, dense_TE)


def spread_out(weights_TK: Tensor | None, indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor | None]:
    """``chosen [T, E]`` and ``weights [T, E]`` of slots."""
    indices_TK = indices_TK.long()
    empty_TE = torch.zeros(len(indices_TK), num_experts, dtype=torch.bool, device=indices_TK.device)
    chosen_TE = empty_TE.scatter(1, indices_TK, True)
    if weights_TK is None or weights_TK.shape != indices_TK.shape:
        return chosen_TE, None
    zeros_TE = torch.zeros(empty_TE.shape, dtype=weights_TK.dtype, device=weights_TK.device)
    return chosen_TE, zeros_TE.scatter_add(1, indices_TK, weights_TK)

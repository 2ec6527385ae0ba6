"""What somebody's code computes between its modules: torch's functions, watched as they are called.

A router that is three lines inside a block has no module to hook. Its product with the router's weight, its ``topk``,
what becomes of the chosen scores, and the arguments of ``scaled_dot_product_attention`` are seen here; ``topk`` is
also where another side's choice is put in.

Shape suffixes: B batch, S sequence, T tokens, H heads, G key/value heads, P head dimension, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"linear", "matmul", "mm", "__matmul__", "__rmatmul__", "einsum", "addmm", "bmm", "inner"}
_SAME = {"to", "float", "double", "bfloat16", "half", "t", "transpose", "contiguous", "type", "type_as", "clone",
         "__get__", "view", "reshape", "permute", "unsqueeze", "squeeze", "detach", "swapaxes"}  # fmt: skip
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}
_UNRELATED = {"zeros_like", "ones_like", "empty_like", "rand_like", "randn_like", "full_like", "log", "dropout"}
_CHOICES = {"topk", "sort", "argsort", "argmax", "max"}
#: ``choose(logits [T, E]) -> indices [T, K]``, or None where nothing is put in.
Choose = Callable[[Tensor], Tensor]


@dataclass
class Routing:
    """What was seen of one block's routing.

    Attributes:
        tokens: how many; num_experts, top_k: the family's.
        weight, bias: the router's own parameters.
        logits: the product, as it came.
        indices: of the last choice of ``top_k`` among ``num_experts``.
        weights: what became of the chosen scores, as long as no expert had run; ``dense``: spread over experts.
        replaced: whether another side's choice was put in.
    """

    tokens: int
    num_experts: int
    top_k: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    experts: tuple[Tensor, ...] = ()
    choose: Choose | None = None
    logits: Tensor | None = None
    indices: Tensor | None = None
    weights: Tensor | None = None
    dense: Tensor | None = None
    ended: bool = False
    replaced: bool = False
    made: list[Tensor] = field(default_factory=list)

    def is_choice(self, scores: Any) -> bool:
        return isinstance(scores, Tensor) and scores.numel() == self.tokens * self.num_experts and (
            scores.shape[-1] == self.num_experts
        )  # fmt: skip


class Watch(TorchFunctionMode):
    """Looks at every torch function; changes nothing unless a choice is put in.

    Attributes:
        routing: the block that is running, None between blocks.
        attended: called with query, key and value of each ``scaled_dot_product_attention``.
    """

    def __init__(self, attended: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.routing: Routing | None = None
        self.attended = attended
        self.asleep = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.asleep:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            self.attended(*[*args, *(kwargs[k] for k in ("query", "key", "value")[len(args) :])][:3])
        routing = self.routing
        if routing is None or routing.ended:
            return func(*args, **kwargs)
        if name in _CHOICES and args and routing.is_choice(args[0]):
            return self._choice(routing, name, func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            _see(routing, name, [*_flat(args), *kwargs.values()], result)
        return result

    def _choice(
        self, routing: Routing, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        scores, result = args[0], func(*args, **kwargs)
        indices = result if isinstance(result, Tensor) else result[1] if len(result) > 1 else None
        if indices is None or indices.is_floating_point():
            return result
        wide = name in ("sort", "argsort")
        slots = indices[..., : routing.top_k] if wide else indices
        if slots.numel() != routing.tokens * routing.top_k:
            return result
        if routing.choose is not None and routing.logits is not None and not routing.replaced:
            with torch.no_grad():
                chosen_TK = routing.choose(routing.logits.reshape(-1, routing.num_experts))
            if wide:
                rest = torch.zeros(len(chosen_TK), routing.num_experts, dtype=torch.int64).scatter(1, chosen_TK, 1)
                chosen_TK = torch.cat([chosen_TK, rest.argsort(dim=1, stable=True)[:, : -chosen_TK.shape[1]]], dim=1)
            new = chosen_TK.reshape(indices.shape).to(indices.dtype)
            lone = indices.dim() < scores.dim()
            values = scores.gather(-1, new.unsqueeze(-1) if lone else new).reshape(indices.shape)
            result = new if isinstance(result, Tensor) else type(result)((values, new))
            indices, routing.replaced = new, True
        routing.indices = indices[..., : routing.top_k] if wide else indices
        routing.made.append(indices)
        routing.weights = None if isinstance(result, Tensor) or wide else result[0]
        return result


def _see(routing: Routing, name: str, args: list[Any], result: Tensor) -> None:
    """Follow the router's weight, the logits and the chosen scores through one call."""
    if any(_among(expert, args) for expert in routing.experts):
        routing.ended = routing.indices is not None and name not in ("__get__", "to")
        return
    if name in _SAME and args and args[0] is routing.weight:
        routing.weight = result
    elif (name in _PRODUCTS and _among(routing.weight, args) and routing.is_choice(result)) or (
        name in _SUMS and _among(routing.logits, args) and _among(routing.bias, args)
    ):
        routing.logits = result
    if routing.indices is None or name in _UNRELATED:
        return
    indexed = any(_among(each, args) for each in (routing.indices, *routing.made))
    spread = indexed and name.startswith(("scatter", "index_put"))
    if not result.is_floating_point():
        if name in _SAME and args and args[0] is routing.indices:
            routing.indices = result
        # With all experts chosen, [T, K] has the shape of [T, E]: `indices == e` is no map of experts.
        mapped = spread or (indexed and routing.top_k != routing.num_experts)
        if (mapped or _among(routing.dense, args)) and routing.is_choice(result):
            routing.dense = result
        return
    if routing.is_choice(result) and (spread or _among(routing.dense, args)):
        routing.dense = result
    if result.numel() == routing.tokens * routing.top_k and result.shape[-1] == routing.indices.shape[-1]:
        masked = _among(routing.weights, args) and _loses(routing.weights, result)
        if (_among(routing.weights, args) and not masked) or (indexed and name in ("gather", "take_along_dim")):
            routing.weights = result


def _loses(before: Tensor | None, after: Tensor) -> bool:
    """Whether some weights became zero: one expert's share was cut out."""
    return before is not None and bool(((after == 0) & (before.reshape(after.shape) != 0)).any())


def _among(tensor: Tensor | None, args: list[Any]) -> bool:
    """Identity, not equality: tensors compare entry by entry."""
    return tensor is not None and any(arg is tensor for arg in args)


def _flat(args: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for arg in args:
        flat += list(arg) if isinstance(arg, (list, tuple)) else [arg]
    return flat

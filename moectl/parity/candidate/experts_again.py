"""Every expert's own output on every token: each is called once more, apart from the routing.

Shape suffixes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moectl.parity.candidate.user_code import attempt
from moectl.parity.candidate.wiring import LayerWiring

_INDICES = ("ind", "idx", "id", "select", "expert")
_WEIGHTS = ("weight", "score", "prob", "gate", "coef")


@torch.no_grad()
def every_expert(module: nn.Module, layer: LayerWiring, x_TD: Tensor, num_experts: int) -> Tensor | None:
    """``[T, E, D]``; None where the experts cannot be called one by one."""
    calls: list[Callable[[], Any]]
    if layer.experts:
        calls = [lambda path=path: module.get_submodule(path)(x_TD.clone()) for path in layer.experts]  # type: ignore[misc]
    else:
        stack = module.get_submodule(layer.stack or "")
        names = [each.name for each in inspect.signature(stack.forward).parameters.values()][1:]
        indices = [name for name in names if any(word in name.lower() for word in _INDICES)]
        weights = [name for name in names if name not in indices and any(word in name.lower() for word in _WEIGHTS)]
        if len(names) != 2 or len(indices) != 1 or len(weights) != 1:
            return None
        ones_T1 = x_TD.new_ones(len(x_TD), 1)
        calls = [
            lambda e=e: stack(  # type: ignore[misc]
                x_TD.clone(), **{indices[0]: torch.full_like(ones_T1, e, dtype=torch.int64), weights[0]: ones_T1}
            )
            for e in range(num_experts)
        ]
    outputs = []
    for call in calls:
        out = attempt(call)
        if not isinstance(out, Tensor) or out.shape != x_TD.shape:
            return None
        outputs.append(out)
    return torch.stack(outputs, dim=1)

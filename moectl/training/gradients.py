"""How large the gradients are: of router, experts and the rest, and of each expert. Before any clipping.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moectl.moe.layer import MoELayer

#: Metrics by group of the optimizer: weight decay is no matter here.
GROUPS = {"router": "router", "experts": "experts"} | dict.fromkeys(("dense", "adapters", "head", "no_decay"), "dense")


def group_norms(groups: Iterable[Mapping[str, Any]], layers: Mapping[int, MoELayer]) -> dict[str, float]:
    """``grad_norm/router``, ``grad_norm/experts``, ``grad_norm/dense`` (all else), and of each expert.

    The squares of the three sum to the square of ``train/grad_norm``. An expert's norm is over its slices of
    the stacked weights and biases: ``grad_norm/layer.N.expert.M``. A group without a gradient is left out.

    Args:
        groups: the optimizer's, with their ``name``.
        layers: MoE layers by layer number.
    """
    of_experts = {id(p): None for layer in layers.values() for p in layer.experts.parameters()}
    squares: dict[str, list[Tensor]] = {}
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None and id(parameter) not in of_experts:
                name = GROUPS.get(group["name"], group["name"])
                squares.setdefault(name, []).append(_square(parameter.grad))
    each_expert: dict[str, Tensor] = {}
    for number, layer in layers.items():
        squares_E = _expert_squares(layer)
        if squares_E is not None:
            squares.setdefault("experts", []).append(squares_E.sum())
            each_expert |= {f"grad_norm/layer.{number}.expert.{e}": norm for e, norm in enumerate(squares_E.sqrt())}
    norms = {f"grad_norm/{name}": torch.stack(each).sum().sqrt() for name, each in squares.items()} | each_expert
    # One copy from the device for all of them.
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}


def expert_norms(layer: MoELayer) -> Tensor | None:
    """The gradient's norm by expert ``[E]``, float64; None where nothing of the experts has a gradient."""
    squares_E = _expert_squares(layer)
    return None if squares_E is None else squares_E.sqrt()


def _expert_squares(layer: MoELayer) -> Tensor | None:
    grads = [parameter.grad for parameter in layer.experts.parameters() if parameter.grad is not None]
    return torch.stack([_square(grad, each=True) for grad in grads]).sum(0) if grads else None


def _square(grad: Tensor, each: bool = False) -> Tensor:
    """The sum of squares in float64, of all or of each slice of the first dimension."""
    exact = grad.to_dense() if grad.is_sparse else grad
    flat = exact.detach().flatten(1) if each else exact.detach().flatten()
    return torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float64).square()

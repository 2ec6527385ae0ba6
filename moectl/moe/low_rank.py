"""Low-rank adapters of stacked expert weights: each expert's matrix becomes ``W + scale · B·A``, with its own A and B.

A parametrization of torch: the experts stay what they are, and whoever reads ``gate_up_proj`` or ``down_proj`` (every
backend, ``one``, ``stacked``) gets the adapted weights. The sum is made anew in every forward pass, in the weights'
dtype, and backward makes the whole gradient of a layer before it is projected to A and B: adapters of experts save
the optimizer's state, not the weights' transient gradient. Source: Hu et al. 2021, arXiv:2106.09685.

Shape suffixes: E experts, O output columns, I input columns, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moectl.moe.experts import Experts


class LowRank(nn.Module):
    """``weight [E, O, I]`` to ``weight + scale · B·A``.

    Args:
        weight: whose shape, dtype and device the factors follow.
        rank: R.
        scale: alpha / rank.

    Attributes:
        lora_A: ``[E, R, I]``, each expert's drawn as torch draws a linear layer's weight (Kaiming uniform, a = √5).
        lora_B: ``[E, O, R]``, zero at first: the function is unchanged until a step moves it.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        experts, columns, inputs = weight.shape
        self.scale = scale
        self.lora_A = nn.Parameter(weight.new_empty(experts, rank, inputs))
        self.lora_B = nn.Parameter(weight.new_zeros(experts, columns, rank))
        bound = math.sqrt(1.0 / inputs)  # of Kaiming uniform with a = √5: √6 / √(1 + 5) / √fan_in
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # small differences would drown in bfloat16
            return torch.baddbmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def adapt(experts: Experts, rank: int, scale: float) -> None:
    """Give every matrix of ``experts`` an adapter, and freeze all else of them (biases too).

    Raises:
        ValueError: they have adapters already.
    """
    if adapters_of(experts):
        raise ValueError("these experts have adapters already")
    experts.requires_grad_(False)
    matrices = [name for name, parameter in experts.named_parameters(recurse=False) if parameter.dim() == 3]
    for name in matrices:
        parametrize.register_parametrization(experts, name, LowRank(getattr(experts, name), rank, scale))


def adapters_of(experts: Experts) -> dict[str, LowRank]:
    """By the name of the matrix; empty where there are none."""
    chains: Any = experts.parametrizations if parametrize.is_parametrized(experts) else {}
    return {name: chain[0] for name, chain in chains.items() if isinstance(chain[0], LowRank)}


@torch.no_grad()
def merge(experts: Experts) -> None:
    """Put the adapters into the weights, for good: bit for bit what the adapted experts compute with.

    Not by torch's ``remove_parametrizations``, which takes the attribute from the class, and a deep copy shares its
    class with the original.
    """
    adapted = adapters_of(experts)
    if not adapted:
        return
    weights = {name: getattr(experts, name).detach().clone() for name in adapted}
    plain = parametrize.type_before_parametrizations(experts)
    del experts.parametrizations
    experts.__class__ = plain
    for name, weight in weights.items():
        experts.register_parameter(name, nn.Parameter(weight))

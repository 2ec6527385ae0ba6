"""RMSNorm, softmax and gated activations, and in which dtype each of them computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.parity.formula import ExpertsFormula, NormFormula

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wide(x: Tensor, casts: str) -> Tensor:
    """What Hugging Face computes in float32: in float32 where casts are the reference's, else as it is."""
    return x.to(torch.float32) if casts == "reference" else x


def softmax(x: Tensor, dim: int, casts: str) -> Tensor:
    return torch.softmax(wide(x, casts), dim=dim).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, rule: NormFormula, casts: str) -> Tensor:
    """``w · x / √(mean(x²) + ε)`` over the last dimension.

    The weight multiplies after the result is back in ``x``'s dtype, as in Llama and all that follow it.

    Args:
        weight: broadcasts against ``x``; None where the rule applies none.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if rule.kind == "identity":
        return x
    normed = x
    if rule.kind != "weight_only":
        inner = centred(x.to(DTYPES[rule.dtype]) if rule.dtype else wide(x, casts), rule)
        mean_square = inner.pow(2).mean(dim=-1, keepdim=True)
        if rule.statistic_alone:
            inner = centred(wide(x, casts), rule)
            mean_square = mean_square.to(inner.dtype)
        if rule.statistic_detached:
            mean_square = mean_square.detach()
        if rule.eps_place == "inside":
            normed = (inner * torch.rsqrt(mean_square + rule.eps)).to(x.dtype)
        else:
            normed = (inner / (torch.sqrt(mean_square) + rule.eps)).to(x.dtype)
    if weight is None:
        return normed
    return (1.0 + weight) * normed if rule.weight == "one_plus" else weight * normed


def centred(x: Tensor, rule: NormFormula) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True) if rule.kind == "layer" else x


#: Of the gate, by :class:`ExpertsFormula`'s names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def gated(gate: Tensor, up: Tensor, rule: ExpertsFormula) -> Tensor:
    """``act(gate) · up`` (Shazeer 2020, arXiv:2002.05202), or gpt-oss's clamped form (arXiv:2508.10925)."""
    if rule.glu == "swiglu":
        return ACTIVATIONS[rule.activation](gate) * up
    gate, up = gate.clamp(max=rule.limit), up.clamp(min=-rule.limit, max=rule.limit)
    return (up + 1) * (gate * torch.sigmoid(rule.alpha * gate))

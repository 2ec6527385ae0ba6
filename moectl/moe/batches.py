"""What the expert computation works on: stacked weights, a plan cut into batches of experts, slots for gradients.

Shape suffixes: D hidden, E experts, F expert intermediate, H pre-activation columns (F, or 2F when gated), A
assignments sorted by expert, I and O features in and out, N rows of one batch, M of one expert in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.moe.products import outer_product


class Weights(NamedTuple):
    """Stacked expert weights: ``up [E, H, D]``, ``down [E, D, F]``, ``up_bias [E, H]``, ``down_bias [E, D]``.

    Both biases or none.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Weights:
        biases = (None if bias is None else bias.to(dtype) for bias in (self.up_bias, self.down_bias))
        return Weights(self.up.to(dtype), self.down.to(dtype), *biases)


class Plan(NamedTuple):
    """What is read of a dispatch plan: ``token_ids [A]``, combine weights ``[A]``, ``tokens_per_expert [E]``."""

    token_ids: Tensor
    weights: Tensor
    tokens_per_expert: Tensor

    def batches(self, rows: int) -> list[Batch]:
        """The experts that have tokens, in order, consecutive ones together up to so many rows.

        Reads the counts: one host sync.
        """
        counts = self.tokens_per_expert.tolist()
        groups: list[list[int]] = []
        for expert in (expert for expert, count in enumerate(counts) if count):
            if groups and sum(counts[other] for other in groups[-1]) + counts[expert] <= rows:
                groups[-1].append(expert)
            else:
                groups.append([expert])
        sizes = [[counts[expert] for expert in group] for group in groups]
        totals = [sum(each) for each in sizes]
        ids, weights = (tensor[: sum(totals)].split(totals) for tensor in (self.token_ids, self.weights))
        # On a CPU the question costs microseconds. A straight-through router's weights are all 1 in training.
        whole = self.weights.device.type == "cpu" and bool((self.weights[: sum(totals)] == 1).all())
        return [
            Batch(*each, whole) for each in zip(groups, sizes, ids, (part[:, None] for part in weights), strict=True)
        ]


class Batch(NamedTuple):
    """Experts whose rows go through everything but the products together.

    Attributes:
        experts: their numbers, ascending.
        sizes: rows of each.
        ids: tokens ``[N]``, expert by expert.
        weights: combine weights ``[N, 1]``.
        whole: all of them are known to be 1: nothing need be multiplied by them.
    """

    experts: list[int]
    sizes: list[int]
    ids: Tensor
    weights: Tensor
    whole: bool = False

    def of(self, stacked: Tensor) -> list[Tensor]:
        """The part of each expert: by one call, for with small experts each call counts."""
        first = self.experts[0]
        parts = stacked[first : self.experts[-1] + 1].unbind(0)
        return [parts[expert - first] for expert in self.experts]

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each expert."""
        return rows.split_with_sizes(self.sizes)

    def weighted(self, rows: Tensor) -> Tensor:
        """``rows`` times the combine weights, in place."""
        return rows if self.whole else rows.mul_(self.weights)


class Slot(NamedTuple):
    """Where the gradient of one stacked parameter goes, and whether it is added to what is there."""

    grad: Tensor
    add: bool

    def put_outer(self, batch: Batch, grad_NO: Tensor, x_NI: Tensor) -> None:
        """``gradᵀ · x`` of each expert, straight into its part where dtypes allow it."""
        fits = self.grad.dtype == grad_NO.dtype
        rows = zip(batch.experts, batch.of(self.grad), batch.split(grad_NO), batch.split(x_NI), strict=True)
        for expert, part, grad_MO, x_MI in rows:
            if fits:
                outer_product(grad_MO, x_MI, out=part, add=self.add)
            else:
                self.put(expert, grad_MO.t() @ x_MI)

    def put_sum(self, batch: Batch, grad_NO: Tensor) -> None:
        """The sum over each expert's rows."""
        for expert, grad_MO in zip(batch.experts, grad_NO.split(batch.sizes), strict=True):
            self.put(expert, grad_MO.sum(0))

    def put(self, expert: int, value: Tensor) -> None:
        part = self.grad[expert]
        if self.add:
            part.add_(value.to(part.dtype))
        else:
            part.copy_(value)


Slots = Mapping[str, Slot]

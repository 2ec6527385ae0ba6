"""Gaussian noise on router logits: in training only, annealed to zero, or set by a schedule.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from moectl.config.settings import Fraction, NonNegative
from moectl.moe.router import RouterConfig


class NoiseOptions(RouterConfig):
    """Options of routers that explore with annealed Gaussian noise."""

    noise_std: NonNegative = Field(0.1, description="of Gaussian noise on the logits, in training only")
    noise_anneal_fraction: Fraction = Field(0.25, description="of the steps, over which the noise falls to zero")


class AnnealedNoise(nn.Module):
    """Gaussian noise, annealed linearly to zero.

    At full strength until :meth:`set_schedule`; then zero after ``anneal_fraction`` of the
    optimizer steps. The step counter is a buffer: saved, restored, advanced once per optimizer step.
    :meth:`set_std` puts a schedule of somebody else's in the annealing's place.
    """

    step: Tensor
    anneal_steps: Tensor
    given_std: Tensor

    def __init__(self, std: float, anneal_fraction: float) -> None:
        super().__init__()
        self.std = std
        self.anneal_fraction = anneal_fraction
        self.scheduled = False
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("anneal_steps", torch.full((), -1, dtype=torch.int64))
        # A tensor, so that a new value recompiles nothing; not saved, because whoever sets it does so every step.
        self.register_buffer("given_std", torch.zeros((), dtype=torch.float32), persistent=False)

    def set_schedule(self, total_steps: int) -> None:
        self.anneal_steps.fill_(math.ceil(self.anneal_fraction * total_steps))

    def set_std(self, std: float) -> None:
        """This standard deviation from now on: the annealing is off.

        Raises:
            ValueError: not a finite number >= 0.
        """
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"the noise's standard deviation must be a finite number >= 0, not {std}")
        self.scheduled = True
        self.given_std.fill_(std)

    def advance(self) -> None:
        self.step += 1

    def scale(self) -> Tensor:
        """The present standard deviation, a 0-d float32 tensor on the counter's device (no sync)."""
        if self.scheduled:
            return self.given_std
        remaining = 1.0 - self.step.float() / self.anneal_steps.clamp(min=1).float()
        annealed = remaining.clamp(0.0, 1.0) * (self.anneal_steps > 0)
        return self.std * torch.where(self.anneal_steps < 0, torch.ones_like(annealed), annealed)

    def forward(self, logits_TE: Tensor) -> Tensor:
        if not self.training or (self.std == 0.0 and not self.scheduled):
            return logits_TE
        return logits_TE + self.scale().to(logits_TE.dtype) * torch.randn_like(logits_TE)

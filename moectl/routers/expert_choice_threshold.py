"""``expert-choice-threshold``: expert choice made causal by a running threshold per expert.

Expert Threshold Routing (Sun et al. 2026, arXiv:2603.11535), on the scores of expert choice (Zhou et al. 2022,
arXiv:2202.09368).

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moectl.routers.expert_choice import ExpertChoiceRouter


class ExpertChoiceThresholdRouter(ExpertChoiceRouter):
    """An expert takes every token that scores at least its threshold; no token asks what the others score.

    The threshold lies half-way between the last token that expert choice would have taken and the next,
    averaged over the training steps so far (exponentially, and plainly over the first ones). Training,
    evaluation and decoding all compare with the same number, so that a token's route depends on itself
    alone, and cached decoding does what the full forward pass does. The load is even on average, not in
    every batch.

    Attributes:
        threshold: ``[E]`` float32; saved. 1/E, the mean score, before the first step.
        steps: optimizer steps that it has seen; saved.
    """

    class Config(ExpertChoiceRouter.Config):
        threshold_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
            0.9, description="of the running threshold, per optimizer step"
        )

    config: Config
    causal = True
    threshold: Tensor
    steps: Tensor
    _border_E: Tensor
    _tokens: Tensor

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.register_buffer("threshold", torch.full((num_experts,), 1.0 / num_experts, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # The present step's thresholds, summed over its micro-batches and weighted by their real tokens.
        # Recomputation under checkpointing adds each of them twice, which leaves the mean alone.
        self.register_buffer("_border_E", torch.zeros(num_experts, dtype=torch.float32), persistent=False)
        self.register_buffer("_tokens", torch.zeros((), dtype=torch.float32), persistent=False)

    def take(self, scores_TE: Tensor, real_T: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and len(scores_TE):  # a probe without gradients leaves no trace
            self._observe(scores_TE, real_T.sum())
        return scores_TE >= self.threshold

    def _observe(self, scores_TE: Tensor, real: Tensor) -> None:
        taken = torch.minimum(self.capacity(real), real)
        # With a last row of zeros, for experts that take every token there is.
        ranked_TE = F.pad(scores_TE.sort(dim=0, descending=True).values, (0, 0, 0, 1))
        border_E = ranked_TE.index_select(0, torch.stack([taken - 1, taken]).clamp(min=0)).clamp(min=0.0).mean(0)
        self._border_E += torch.where(real > 0, border_E * real, 0.0)
        self._tokens += real

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Move the threshold towards the step's own; nothing where the step had no training forward."""
        seen = self._tokens > 0
        self.steps += seen
        rate = torch.clamp(1.0 / self.steps.clamp(min=1), min=1.0 - self.config.threshold_decay)
        self.threshold += seen * rate * (self._border_E / self._tokens.clamp(min=1) - self.threshold)
        self._border_E.zero_()
        self._tokens.zero_()

    def calibrate(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """One step's move, from ``x`` alone."""
        training = self.training
        with torch.enable_grad():
            self.train()(x, token_mask)
        self.train(training)
        self.after_step(torch.zeros_like(self.threshold))

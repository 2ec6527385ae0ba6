"""Token choice: each token picks its own k experts. The shared ground of most routers, open to plug-ins.

Shape suffixes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moectl.config.settings import Fraction, Positive, PositiveInt
from moectl.moe.noise import AnnealedNoise, NoiseOptions
from moectl.moe.router import Router, RouterConfig, entropy, stable_topk
from moectl.moe.types import RouterOutput

FEW_EXPERTS = 32


class TokenChoiceOptions(RouterConfig):
    """Options of every router under which tokens choose."""

    logit_clamp: Positive | None = Field(None, description="logits that choose and weigh stay within ± this")
    expert_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="training: chance of each expert to be unavailable for a call (at least k stay)"
    )
    random_routing: Fraction = Field(0.0, description="training: share of tokens that get random experts")
    new_experts: Annotated[int, Field(ge=0)] = Field(
        0, description="the last so many experts came later: closed at first, then opened step by step"
    )
    opening_steps: PositiveInt = Field(200, description="optimizer steps until new experts are wholly open")

    @model_validator(mode="after")
    def _opening(self) -> TokenChoiceOptions:
        if not self.new_experts and self.opening_steps != type(self).model_fields["opening_steps"].default:
            raise ValueError(f"opening_steps = {self.opening_steps} has no effect: new_experts is 0")
        if self.new_experts and self.expert_dropout:
            raise ValueError("expert_dropout and new_experts do not go together: too few experts may be left open")
        return self


class TokenChoiceRouter(Router):
    """A router whose tokens choose by score: :meth:`choose` is the choice that all of them share."""

    class Config(TokenChoiceOptions):
        """The common options only."""

    config: TokenChoiceOptions
    opened_steps: Tensor

    def __init__(self, config: TokenChoiceOptions, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        if config.new_experts:
            self.register_buffer("opened_steps", torch.zeros((), dtype=torch.int64))

    def check_top_k(self, k: int) -> None:
        super().check_top_k(k)
        new = self.config.new_experts
        if k > self.num_experts - new:
            raise ValueError(f"top_k is {k}, but {new} of {self.num_experts} experts are new and closed at first")

    def clamp(self, logits_TE: Tensor) -> Tensor:
        """The logits that choose and weigh; the raw ones stay what the z-loss sees, and pulls back."""
        bound = self.config.logit_clamp
        return self.hold_back(logits_TE if bound is None else logits_TE.clamp(-bound, bound))

    def hold_back(self, scores_TE: Tensor) -> Tensor:
        """Scores with ``log(share of the opening done)`` added for new experts: -inf, and so never, at first."""
        new = self.config.new_experts
        if not new:
            return scores_TE
        share = (self.opened_steps.to(scores_TE.dtype) / self.config.opening_steps).clamp(max=1.0)
        return torch.cat([scores_TE[:, :-new], scores_TE[:, -new:] + share.log()], dim=-1)

    def end_step(self, load_E: Tensor, *, tokens: int) -> None:
        """The common end of a step; new experts are a little more open after it."""
        super().end_step(load_E, tokens=tokens)
        if self.config.new_experts:
            self.opened_steps += 1

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The ``top_k`` experts of the highest score, best first, ties to the lowest index: ``[T, K]``."""
        return stable_topk(self.explore(scores_TE.detach()), self.top_k)

    def explore(self, scores_TE: Tensor) -> Tensor:
        """Scores as training lets chance change them: random for some tokens, -inf for unavailable experts."""
        if self.training and self.config.random_routing > 0.0:
            random_T1 = torch.rand_like(scores_TE[:, :1]) < self.config.random_routing
            scores_TE = torch.where(random_T1, self.hold_back(torch.rand_like(scores_TE)), scores_TE)
        if self.training and self.config.expert_dropout > 0.0:
            luck_E = torch.rand(self.num_experts, device=scores_TE.device)
            enough = luck_E.topk(self.top_k).values[-1]  # the k luckiest stay, whatever the draw
            available_E = (luck_E >= self.config.expert_dropout) | (luck_E >= enough)
            scores_TE = scores_TE.masked_fill(~available_E, -math.inf)
        return scores_TE


class SoftmaxRouter(TokenChoiceRouter):
    """Shared ground of routers that choose by a softmax: they say how chance enters, and what the chosen weigh."""

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        """The logits that choose and weigh in this call: with noise, where a router has any."""
        return logits_TE

    @abstractmethod
    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """The weights ``[T, K]`` of the chosen experts, with the router's gradient."""

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        clean_TE = self.clamp(logits_TE)
        noisy_TE = self.perturb(clean_TE, x_TD)
        probs_TE = softmax_of_few(noisy_TE)
        probs_clean_TE = probs_TE if noisy_TE is clean_TE else softmax_of_few(clean_TE)
        # By logits, not probabilities: two of those may both be 0 where the logits still differ.
        indices_TK = self.choose(noisy_TE)
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=self.combine_weights(noisy_TE, probs_TE, indices_TK),
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_clean_TE,
            entropy=entropy(probs_clean_TE),
        )


def softmax_of_few(logits_TE: Tensor) -> Tensor:
    """``softmax`` over experts. On a CPU columns of many tokens are seven times as fast as rows of few experts."""
    if logits_TE.device.type != "cpu" or logits_TE.shape[-1] > FEW_EXPERTS:
        return torch.softmax(logits_TE, dim=-1)
    return torch.softmax(logits_TE.t().contiguous(), dim=0).t().contiguous()


class NoisySoftmaxRouter(SoftmaxRouter):
    """A softmax router that explores with annealed Gaussian noise: ``top1``, ``switch``, ``topk``."""

    class Config(TokenChoiceOptions, NoiseOptions):
        """Noise and the common options."""

    config: Config

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.noise = AnnealedNoise(config.noise_std, config.noise_anneal_fraction)

    def perturb(self, logits_TE: Tensor, x_TD: Tensor) -> Tensor:
        noisy_TE: Tensor = self.noise(logits_TE)
        return noisy_TE

    def set_schedule(self, total_steps: int) -> None:
        self.noise.set_schedule(total_steps)

    def set_noise_std(self, std: float) -> None:
        self.noise.set_std(std)

    def after_step(self, load_E: Tensor) -> None:
        self.noise.advance()

"""The router contract: the one extension point that a new routing idea needs.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.config.schema import Settings
from moectl.errors import ConfigError
from moectl.moe.types import RouterOutput

GATE_INIT_STD = 0.02


class RouterError(ConfigError, ValueError):
    """A router that does not hold to the contract."""


class RouterConfig(Settings):
    """Base of every router's options: strict (an unknown option is an error) and frozen."""


class Router(nn.Module, ABC):
    """Decides which experts each token visits, and with which weights.

    A new router subclasses this, declares its options as a nested ``Config``, and implements
    :meth:`route`. Shapes, masks, dtypes and autocast are taken care of here.

    Args:
        config: the router's own options.
        hidden_size: ``D``.
        num_experts: ``E``.

    Attributes:
        weight: the gate, ``[E, D]``, no bias; starts from a small normal, because a zero gate
            ties every token to the same experts.

    Raises:
        ValueError: ``top_k`` is not in ``[1, E]``.
    """

    class Config(RouterConfig):
        """No options."""

    #: Whether a token's route depends on itself and earlier tokens only.
    causal: bool = True

    def __init__(self, config: RouterConfig, *, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k: int = getattr(config, "top_k", 1)
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {num_experts} experts: choose 1 to {num_experts}")
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=GATE_INIT_STD)

    @abstractmethod
    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        """Route ``T`` tokens. ``x_TD`` is float32 (float64 for float64 input), autocast is off."""

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> RouterOutput:
        """Route ``[T, D]`` or ``[B, S, D]``; ``token_mask`` (``[T]`` or ``[B, S]`` bool) marks real tokens.

        Router arithmetic runs in float32, or in float64 for float64 input, whatever the autocast
        dtype: bfloat16 logits change the expert set of 2-3 % of tokens. Padding is seen as zeros.

        Raises:
            ValueError: another rank, another hidden size, or a mask of another shape or dtype.
            RouterError: :meth:`route` returned something of another shape or dtype than it must.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"router input must be [T, {self.hidden_size}] or [B, S, {self.hidden_size}], got {tuple(x.shape)}"
            )
        mask_T = flatten_mask(token_mask, x)
        x_TD = at_least_float32(x.reshape(-1, self.hidden_size))
        if mask_T is not None:
            # Padding may hold NaN (attention over nothing), which would reach the gate's gradient as NaN · 0.
            x_TD = x_TD.masked_fill(~mask_T[:, None], 0.0)
        with torch.autocast(device_type=x.device.type, enabled=False):
            out = self.route(x_TD, mask_T)
        self._check(out, x_TD.shape[0])
        return out if mask_T is None else _drop_padding(out, mask_T)

    def _check(self, out: RouterOutput, tokens: int) -> None:
        """What a router must hold to, so that a wrong one is named here and not felt later (shapes alone: no sync)."""
        chosen, experts = (tokens, self.top_k), (tokens, self.num_experts)
        expected: dict[str, tuple[int, ...]]
        expected = {"topk_indices": chosen, "topk_weights": chosen, "router_logits": experts, "router_probs": experts}
        expected |= {"router_probs_clean": experts, "entropy": (tokens,)}
        for name, shape in expected.items():
            if tuple(getattr(out, name).shape) != shape:
                raise RouterError(
                    f"{type(self).__name__}.route() returned {name} of shape {tuple(getattr(out, name).shape)},"
                    f" not {shape}" + (f"; its top_k is {self.top_k}" if shape == chosen else "")
                )
        if out.topk_indices.dtype != torch.int64:
            dtype = out.topk_indices.dtype
            raise RouterError(f"{type(self).__name__}.route() returned topk_indices as {dtype}, not int64")

    def logits(self, x_TD: Tensor) -> Tensor:
        """Raw router logits ``x · Wᵀ``: ``[T, E]``."""
        return F.linear(x_TD, self.weight.to(x_TD.dtype))

    def set_schedule(self, total_steps: int) -> None:
        """Tell the router how many optimizer steps the run has (for noise and other schedules)."""

    def after_step(self, load_E: Tensor) -> None:
        """Called once per optimizer step with the global load ``[E]`` of that step's real tokens."""

    def training_problem(self) -> str | None:
        """Why this configuration must not be trained, or None."""
        if not bool(self.weight.detach().any()):
            return "its gate is all zeros, which ties every token to the same experts"
        if self.num_experts == 1:
            return "with one expert every combine weight is constant, so that the gate learns nothing"
        return None

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.model_dump().items())
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, {options}"


class AnnealedNoise(nn.Module):
    """Gaussian noise on router logits, in training only, annealed linearly to zero.

    At full strength until :meth:`set_schedule`; then zero after ``anneal_fraction`` of the
    optimizer steps. The step counter is a buffer: saved, restored, advanced once per optimizer step.
    """

    step: Tensor
    anneal_steps: Tensor

    def __init__(self, std: float, anneal_fraction: float) -> None:
        super().__init__()
        self.std = std
        self.anneal_fraction = anneal_fraction
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("anneal_steps", torch.full((), -1, dtype=torch.int64))

    def set_schedule(self, total_steps: int) -> None:
        self.anneal_steps.fill_(math.ceil(self.anneal_fraction * total_steps))

    def advance(self) -> None:
        self.step += 1

    def scale(self) -> Tensor:
        """The present standard deviation, a 0-d float32 tensor on the counter's device (no sync)."""
        remaining = 1.0 - self.step.float() / self.anneal_steps.clamp(min=1).float()
        annealed = remaining.clamp(0.0, 1.0) * (self.anneal_steps > 0)
        return self.std * torch.where(self.anneal_steps < 0, torch.ones_like(annealed), annealed)

    def forward(self, logits_TE: Tensor) -> Tensor:
        if not self.training or self.std == 0.0:
            return logits_TE
        return logits_TE + self.scale().to(logits_TE.dtype) * torch.randn_like(logits_TE)


class NoiseOptions(RouterConfig):
    """Options of routers that explore with annealed Gaussian noise."""

    noise_std: float = 0.1
    noise_anneal_fraction: float = 0.25

    def model_post_init(self, context: object, /) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"noise_std must be a finite number >= 0, not {self.noise_std}")
        if not 0 <= self.noise_anneal_fraction <= 1:
            raise ValueError(f"noise_anneal_fraction must be in [0, 1], not {self.noise_anneal_fraction}")


class NoisySoftmaxRouter(Router):
    """Shared ground of ``top1``, ``switch`` and ``topk``: a softmax over (noisy) logits."""

    class Config(NoiseOptions):
        """Noise only."""

    def __init__(self, config: NoiseOptions, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.noise = AnnealedNoise(config.noise_std, config.noise_anneal_fraction)

    @abstractmethod
    def combine_weights(self, noisy_TE: Tensor, probs_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """The weights ``[T, K]`` of the chosen experts, with the router's gradient."""

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        noisy_TE = self.noise(logits_TE)
        probs_TE = torch.softmax(noisy_TE, dim=-1)
        indices_TK = stable_topk(noisy_TE.detach(), self.top_k)
        clean_TE = probs_TE if noisy_TE is logits_TE else torch.softmax(logits_TE, dim=-1)
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=self.combine_weights(noisy_TE, probs_TE, indices_TK),
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=clean_TE,
            entropy=entropy(clean_TE),
        )

    def set_schedule(self, total_steps: int) -> None:
        self.noise.set_schedule(total_steps)

    def after_step(self, load_E: Tensor) -> None:
        self.noise.advance()


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Indices ``[T, k]`` of the k largest scores, best first; ties go to the lowest index on every device.

    ``torch.topk`` does not promise an order among ties; a stable sort does, and so does ``argmax``.
    """
    if k == 1:
        return scores_TE.argmax(dim=-1, keepdim=True)
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def entropy(probs_TE: Tensor) -> Tensor:
    """Entropy ``[T]`` in nats of each row of a distribution; 0·log 0 is 0."""
    return torch.special.entr(probs_TE).sum(dim=-1)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, unless it is float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def flatten_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """``token_mask`` as ``[T]`` for an input ``[T, D]`` or ``[B, S, D]``.

    Raises:
        ValueError: the mask is not bool or its shape is not the input's without the last dimension.
    """
    if token_mask is None:
        return None
    if token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"token_mask must be bool of shape {tuple(x.shape[:-1])}, got {token_mask.dtype} {tuple(token_mask.shape)}"
        )
    return token_mask.reshape(-1)


def _drop_padding(out: RouterOutput, mask_T: Tensor) -> RouterOutput:
    """Padding is routed nowhere: its slots are unused and carry weight 0."""
    used_TK = mask_T[:, None].expand_as(out.topk_indices)
    keep_TK = used_TK if out.keep is None else out.keep & used_TK
    return out._replace(topk_weights=out.topk_weights.masked_fill(~keep_TK, 0.0), keep=keep_TK)

"""The router contract: the one extension point that a new routing idea needs.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K slots per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.config.settings import Settings
from moectl.errors import ConfigError, MoectlError
from moectl.moe.contract import RouterError as RouterError
from moectl.moe.contract import check_form, check_values
from moectl.moe.types import RouterOutput

GATE_INIT_STD = 0.02


class RouterConfig(Settings):
    """Base of every router's options: strict (an unknown option is an error) and frozen."""


class Router(nn.Module, ABC):
    """Decides which experts each token visits, and with which weights.

    A new router subclasses this, declares its options as a nested ``Config``, and implements
    :meth:`route`. Shapes, masks, dtypes and autocast are taken care of here, and what ``route`` returns
    is checked here. Everything else may be overridden where it says so, and has a default.

    Args:
        config: the router's own options. ``top_k``, where it is one, is the number of experts per token.
        hidden_size: ``D``.
        num_experts: ``E``.

    Attributes:
        weight: the gate, ``[E, D]``, no bias; starts from a small normal, because a zero gate
            ties every token to the same experts. The only parameter of that shape.
        label: how errors name this router. Who builds it may say more: "layer 3's router 'mine'".
        step_tokens: real tokens of the optimizer step, set by the trainer just before :meth:`after_step`.

    Raises:
        ValueError: ``top_k`` is not in ``[1, E]``.
    """

    class Config(RouterConfig):
        """No options."""

    #: Whether a token's route depends on itself and earlier tokens only.
    causal: bool = True
    #: Whether each token picks its experts, and not experts their tokens: what expert capacity presumes.
    token_choice: bool = True
    #: Whether the gate is learned. A router that follows a fixed rule (a hash, say) declares False.
    learns: bool = True
    #: ``moe.lb_coef`` where the config does not say; None: the config's own default. 0.0: balanced without a loss.
    default_lb_coef: float | None = None

    def __init__(self, config: RouterConfig, *, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.label = type(self).__name__
        self.step_tokens = 0
        self._own_top_k = int(getattr(config, "top_k", 1))  # once: torch.compile cannot trace pydantic's getattr
        self._scheduled_top_k: int | None = None
        self._modes_checked: set[bool] = set()
        self.frozen = False
        self.check_top_k(self.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self._declared: dict[str, torch.dtype] = {}
        self.register_load_state_dict_pre_hook(_note_buffer_dtypes)
        self.register_load_state_dict_post_hook(_restore_buffer_dtypes)
        self.reset_parameters()

    # --- what a subclass implements, or may override

    @abstractmethod
    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        """Route ``T`` tokens. ``x_TD`` is float32 (float64 for float64 input), autocast is off.

        Must run under ``torch.compile(fullgraph=True)``: no ``.item()``, no ``if`` on a tensor's values.
        """

    def reset_parameters(self) -> None:
        """Draw the gate. Called before a subclass's own parameters exist."""
        nn.init.normal_(self.weight, std=GATE_INIT_STD)

    @property
    def slots(self) -> int:
        """``K``, the width of the output; more than ``top_k`` where a token may have any number of experts."""
        return self.top_k

    def check_top_k(self, k: int) -> None:
        """Raise ValueError unless ``k`` experts per token can be had. Called before a subclass's own set-up."""
        if not 1 <= k <= self.num_experts:
            there = "is 1 expert" if self.num_experts == 1 else f"are {self.num_experts} experts"
            raise ValueError(f"top_k is {k}, but there {there}: choose 1 to {self.num_experts}")

    def set_schedule(self, total_steps: int) -> None:
        """Told once how many optimizer steps the run has (for annealing)."""

    def set_noise_std(self, std: float) -> None:
        """Noise of this standard deviation in training from now on, in place of the router's own annealing.

        Raises:
            ConfigError: the router has no such noise. ValueError: not a finite number >= 0.
        """
        raise ConfigError(f"{self.label} has no noise to schedule", "Leave moe.schedule.noise_std away.")

    def after_step(self, load_E: Tensor) -> None:
        """Told once per optimizer step the global load ``[E]`` of that step's real tokens."""

    def calibrate(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Set running statistics from one batch, as training would have: for a gate that is used untrained."""

    def training_problem(self) -> str | None:
        """Why this configuration must not be trained, or None."""
        if not self.learns:
            return None
        if not bool(self.weight.detach().any()):
            return "its gate is all zeros, which ties every token to the same experts"
        if self.num_experts == 1:
            return "with one expert there is nothing to choose, and a constant combine weight teaches the gate nothing"
        return None

    # --- what the base class sees to

    @property
    def top_k(self) -> int:
        """Experts per token: the config's (default 1), or in training mode what :meth:`set_top_k` said."""
        if self.training and self._scheduled_top_k is not None:
            return self._scheduled_top_k
        return self._own_top_k

    def set_top_k(self, k: int) -> None:
        """Choose ``k`` experts per token in training from now on (a schedule); eval always uses the config's.

        Raises:
            ConfigError: a router whose ``top_k`` cannot be chosen. ValueError: ``k`` is not in ``[1, E]``.
        """
        field = type(self.config).model_fields.get("top_k")
        if field is None or get_origin(field.annotation) is Literal:
            hint = "Use the router 'topk', or leave moe.schedule.top_k away."
            raise ConfigError(f"{self.label} does not let top_k be chosen", hint)
        self.check_top_k(k)
        self._scheduled_top_k = k

    def logits(self, x_TD: Tensor) -> Tensor:
        """Raw router logits ``x · Wᵀ``: ``[T, E]``."""
        return F.linear(x_TD, self.weight.to(x_TD.dtype))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> RouterOutput:
        """Route ``[T, D]`` or ``[B, S, D]``; ``token_mask`` (``[T]`` or ``[B, S]`` bool) marks real tokens.

        Router arithmetic runs in float32, or in float64 for float64 input, whatever the autocast
        dtype: bfloat16 logits change the expert set of 2-3 % of tokens. Padding is seen as zeros.

        Raises:
            ValueError: another rank, another hidden size, or a mask of another shape or dtype.
            RouterError: :meth:`route` raised, or returned what it must not (:mod:`moectl.moe.contract`).
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
            out = self._call_route(x_TD, mask_T)
        check_form(out, self.label, tokens=x_TD.shape[0], slots=self.slots, num_experts=self.num_experts)
        out = _clear_unused(out, mask_T)
        if not torch.compiler.is_compiling() and self.training not in self._modes_checked and x_TD.shape[0] > 0:
            self._modes_checked.add(self.training)  # once in training, once in eval: it waits for the device
            check_values(out, self.label, inputs=(x_TD, *self.parameters()))
        return out

    def freeze(self) -> None:
        """Route as in evaluation from now on, in training too: weights, biases, thresholds stay; no noise explores."""
        self.requires_grad_(False)
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """As any module's; a frozen router stays in evaluation."""
        return super().train(mode and not self.frozen)

    def end_step(self, load_E: Tensor, *, tokens: int) -> None:
        """:meth:`after_step`, after an optimizer step over ``tokens`` real tokens; a frozen router is not told.

        Raises:
            RouterError: :meth:`after_step` raised.
        """
        if self.frozen:
            return
        self.step_tokens = tokens
        with self._named_errors("after_step"):
            self.after_step(load_E)

    def _call_route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        if torch.compiler.is_compiling():
            return self.route(x_TD, mask_T)
        with self._named_errors("route"):
            return self.route(x_TD, mask_T)

    @contextmanager
    def _named_errors(self, method: str) -> Iterator[None]:
        """Whatever ``method`` raises within becomes an error that names this router."""
        try:
            yield
        except Exception as error:
            # torch raises for control flow too: checkpointing ends a recomputation early, memory may run out.
            if isinstance(error, MoectlError) or type(error).__module__.partition(".")[0] == "torch":
                raise
            raise RouterError(f"{self.label}: {method}() raised {type(error).__name__}: {error}") from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moves and casts as any module does, but floating-point buffers keep their dtype.

        A balancing bias that moves by 1e-3 stands still in bfloat16.
        """
        before = {id(module): dict(module._buffers) for module in self.modules()}
        super()._apply(fn, recurse)
        for module in self.modules():
            for name, buffer in before[id(module)].items():
                applied = module._buffers[name]
                if buffer is not None and applied is not None and applied.dtype != buffer.dtype:
                    module._buffers[name] = buffer.to(applied.device)
        return self

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.model_dump().items())
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, {options}"


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


def _clear_unused(out: RouterOutput, mask_T: Tensor | None) -> RouterOutput:
    """Padding is routed nowhere, and an unused slot carries weight 0."""
    keep_TK = out.keep
    if mask_T is not None:
        real_TK = mask_T[:, None].expand_as(out.topk_indices)
        keep_TK = real_TK if keep_TK is None else keep_TK & real_TK
    if keep_TK is None:
        return out
    return out._replace(topk_weights=out.topk_weights.masked_fill(~keep_TK, 0.0), keep=keep_TK)


def _note_buffer_dtypes(router: nn.Module, *_: Any) -> None:
    assert isinstance(router, Router)
    router._declared = {name: buffer.dtype for name, buffer in router.named_buffers() if buffer.is_floating_point()}


def _restore_buffer_dtypes(router: nn.Module, _: Any) -> None:
    """``load_state_dict(assign=True)`` of a file in low precision must not leave buffers in it.

    Nor may loading change a dtype that the router chose itself: its checkpoint would not fit its own code again.
    """
    assert isinstance(router, Router)
    for name, dtype in router._declared.items():
        owner, _, own = name.rpartition(".")
        module = router.get_submodule(owner)
        buffer = module._buffers[own]
        if buffer is not None and buffer.dtype != dtype:
            module._buffers[own] = buffer.to(dtype)

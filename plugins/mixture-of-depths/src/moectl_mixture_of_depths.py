"""``mixture-of-depths``: tokens may skip the layer (Raposo et al. 2024, arXiv:2404.02258), causally.

In the paper a scalar ``r_t = w · x_t`` scores each token, the top share of a sequence is processed,
and the output is weighted by ``r``; everything else goes by on the residual stream (equation 1):

    y_t = r_t · f(x_t)   if r_t > P(R), the percentile of the sequence's scores, else 0

The percentile needs later tokens. Here, as where the paper samples, each token is judged alone:
``r_t > threshold``. The threshold is moved after every optimizer step until the wanted share of
tokens passes, in place of the paper's predictor. Tokens that pass go to the best of ``E`` experts
(the paper's MoDE joins the two likewise). With ``p = softmax(x Wᵀ)`` and ``σ`` the logistic function,
which keeps weights in (0, 1):

    y_t = σ(r_t) · Σ_{e in top k} p_te · f_e(x_t)   if r_t > threshold, else 0

Shape suffixes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk


class MixtureOfDepthsRouter(Router):
    """A share of the tokens is processed, by their best experts; the others skip the layer. Causal.

    Skipped tokens have no slot in use (``keep`` is False) and get zeros. ``router_probs`` says which
    expert a token would go to, skipped or not; balance counts only what was processed.

    Attributes:
        weight: ``[E, D]``, which expert.
        depth_weight: ``[D]``, whether at all.
        threshold: float32 scalar buffer; fixed in eval, so that cached decoding equals the full pass.
    """

    class Config(RouterConfig):
        top_k: Annotated[int, Field(ge=1, description="experts of a token that is processed")] = 1
        token_share: Annotated[float, Field(gt=0, le=1, description="share of tokens to process")] = 0.5
        calibration_rate: Annotated[
            float, Field(ge=0, allow_inf_nan=False, description="threshold's move per step and unit of share")
        ] = 0.3

    config: Config
    threshold: Tensor

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.depth_weight = nn.Parameter(torch.empty(hidden_size))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "depth_weight"):  # not yet, when the base class draws its own
            # Scores of about unit size for normed input, whatever D: the threshold's steps are measured by them.
            nn.init.normal_(self.depth_weight, std=self.hidden_size**-0.5)

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        depth_T = x_TD @ self.depth_weight.to(x_TD.dtype)
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(dim=-1)
        indices_TK = stable_topk(logits_TE.detach(), self.top_k)
        keep_TK = (depth_T.detach() > self.threshold)[:, None].expand_as(indices_TK)
        weights_TK = depth_T.sigmoid()[:, None] * probs_TE.gather(1, indices_TK)
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=weights_TK,  # 0 where keep is False: the base class sees to that
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=entropy(probs_TE),
            keep=keep_TK,
        )

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        """Raise the threshold if more than ``token_share`` of the step's tokens passed, lower it if fewer did."""
        if self.step_tokens:
            share = load_E.sum() / (self.top_k * self.step_tokens)
            self.threshold += self.config.calibration_rate * (share.to(self.threshold) - self.config.token_share)

    @torch.no_grad()
    def calibrate(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Put the threshold where ``token_share`` of these tokens passes."""
        depth_T = x.reshape(-1, self.hidden_size).float() @ self.depth_weight.float()
        if token_mask is not None:
            depth_T = depth_T[token_mask.reshape(-1)]
        if len(depth_T):
            self.threshold.copy_(depth_T.quantile(1 - self.config.token_share))

    def training_problem(self) -> str | None:
        if not bool(self.depth_weight.detach().any()):
            return "its depth gate is all zeros, which lets all tokens pass or none"
        return super().training_problem()

"""``hash``: a fixed rule instead of a learned gate (Hash Layers, Roller et al. 2021, arXiv:2106.04426).

The paper sends token id ``t`` to expert ``hash(t)`` for good, and takes that expert's output whole:
``y = f_hash(t)(x)``. A router is given hidden states, not token ids, and ids cannot be had from a
hidden state that attention has been through. So there are two keys:

- ``hidden`` (default; works everywhere): ``hash(x) = argmax_e (x · w_e + b_e)`` with a random ``W`` that
  is never trained, a locality-sensitive hash. This departs from the paper: the same token goes to other
  experts in other contexts and as the model below changes. Trained hidden states share a large common
  direction, which alone would send nearly all of them to one expert; ``b`` takes that out again: it
  moves after each step against the load, ``b_e += rate · sign(mean load - load_e)``, never by gradient.
- ``token``: the paper's random hash of the token id. Somebody must hand over the ids:
  :func:`follow_token_ids`, once per model.

Shape suffixes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import stable_topk

PRIME = 2**31 - 1  # larger than any vocabulary, and small enough that products fit 64 bits


class HashRouter(Router):
    """One expert per token by a hash, with weight exactly 1; no gate is learned, no balance loss needed.

    The rule is certain, so that ``router_probs`` is 1 at the chosen expert and its entropy 0.

    Attributes:
        weight: ``[E, D]``, frozen: the projection of the key ``hidden``, unused by the key ``token``.
        expert_bias: ``[E]`` float32 buffer, ``b`` of the key ``hidden``; stands still in eval.
        token_ids: the ids of the tokens to be routed next (key ``token``), of any shape, or None.
        followed: whether :func:`follow_token_ids` keeps ``token_ids`` up to date.
    """

    class Config(RouterConfig):
        key: Annotated[Literal["hidden", "token"], Field(description="what is hashed")] = "hidden"
        balance_rate: Annotated[
            float, Field(ge=0, allow_inf_nan=False, description="step of the bias against the load (key hidden)")
        ] = 0.01
        seed: Annotated[int, Field(ge=0, description="which hash of the token id (key token)")] = 0

    config: Config
    expert_bias: Tensor
    learns = False
    default_lb_coef = 0.0

    def __init__(self, config: Config, *, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        self.weight.requires_grad_(False)
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.token_ids: Tensor | None = None
        self.followed = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last batch's ids behind."""
        return {**self.__dict__, "token_ids": None}

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        if self.config.key == "token":
            expert_T = hash_ids(self._ids(len(x_TD)), self.num_experts, self.config.seed)
            logits_TE = F.one_hot(expert_T, self.num_experts).to(x_TD.dtype)
            indices_TK = expert_T[:, None]
        else:
            logits_TE = self.logits(x_TD).detach()  # no loss on the logits may reach the model through them
            indices_TK = stable_topk(logits_TE + self.expert_bias.to(x_TD.dtype), 1)
        probs_TE = torch.zeros_like(logits_TE).scatter(1, indices_TK, 1.0)
        return RouterOutput(
            topk_indices=indices_TK,
            topk_weights=torch.ones_like(indices_TK, dtype=x_TD.dtype),
            router_logits=logits_TE,
            router_probs=probs_TE,
            router_probs_clean=probs_TE,
            entropy=torch.zeros_like(probs_TE[:, 0]),
        )

    def _ids(self, tokens: int) -> Tensor:
        if self.token_ids is None:
            raise ValueError("key=token, but no token ids were handed over: call moectl_hash.follow_token_ids once")
        if self.token_ids.numel() != tokens:
            raise ValueError(f"{self.token_ids.numel()} token ids were handed over, but {tokens} tokens are routed")
        return self.token_ids.reshape(-1)

    @torch.no_grad()
    def after_step(self, load_E: Tensor) -> None:
        if self.config.key == "hidden":
            load_E = load_E.to(self.expert_bias)
            self.expert_bias += self.config.balance_rate * (load_E.mean() - load_E).sign()

    @torch.no_grad()
    def calibrate(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Take the common direction of these tokens out at once."""
        x_TD = x.reshape(-1, self.hidden_size)
        x_TD = x_TD if token_mask is None else x_TD[token_mask.reshape(-1)]
        if self.config.key == "hidden" and self.config.balance_rate and len(x_TD):
            self.expert_bias.copy_(-self.logits(x_TD.to(torch.float32)).mean(dim=0))

    def training_problem(self) -> str | None:
        if self.config.key == "token":
            return (
                None
                if self.followed
                else (
                    "the key 'token' needs token ids, and nobody hands them over (from Python, call"
                    " moectl_hash.follow_token_ids(model, embedding); from the command line, use the key 'hidden')"
                )
            )
        return None if bool(self.weight.any()) else "its projection is all zeros, which hashes every token alike"


def follow_token_ids(model: nn.Module, embedding: nn.Module) -> RemovableHandle:
    """Hand the ids that ``embedding`` is called with to every hash router of ``model``, from now on.

    Works for any model that embeds its ids through a module (``model.embed_tokens`` of moectl's
    decoder, ``model.get_input_embeddings()`` of Hugging Face's), in training and in cached decoding,
    and for copies of the model. ``.remove()`` of the result ends it.
    """
    routers = [module for module in model.modules() if isinstance(module, HashRouter)]
    for router in routers:
        router.followed = True
    return embedding.register_forward_pre_hook(partial(_hand_over, routers))


def _hand_over(routers: Sequence[HashRouter], embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
    for router in routers:
        router.token_ids = args[0]


def hash_ids(ids: Tensor, num_experts: int, seed: int = 0) -> Tensor:
    """``((a · id + b) mod p) mod E`` with ``a`` and ``b`` drawn from ``seed``: the same on every machine.

    A universal hash (Carter and Wegman 1979), in place of the paper's random table: it needs no
    vocabulary size, and like the table gives every expert about as many token ids.
    """
    draw = random.Random(seed)
    a, b = draw.randrange(1, PRIME), draw.randrange(PRIME)
    return (ids.long() * a + b) % PRIME % num_experts

"""Checks of one answer: what ``route()`` returns for ordinary tokens, field by field.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch

from moectl.moe.router import entropy
from moectl.moe.types import RouterOutput
from moectl.testing.results import Failure
from moectl.testing.subject import (
    BATCH,
    MODES,
    PROBABILITY_TOLERANCE,
    SEQUENCE,
    TOKENS,
    Subject,
    first_token,
    floats,
    require_same_plan,
    seeded,
)


def route(subject: Subject) -> str:
    """``route()`` answers with a RouterOutput."""
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        if not isinstance(out, RouterOutput):
            raise Failure(f"in {mode} route() returned a {type(out).__name__}, not a RouterOutput")
    return f"answers for {TOKENS} tokens, in training and in eval"


def shapes(subject: Subject) -> str:
    """Every field has its shape."""
    router = subject.router()
    chosen, experts = (TOKENS, router.slots), (TOKENS, subject.num_experts)
    expected: dict[str, tuple[int, ...]]
    expected = {"topk_indices": chosen, "topk_weights": chosen, "router_logits": experts, "router_probs": experts}
    expected |= {"router_probs_clean": experts, "entropy": (TOKENS,), "keep": chosen}
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        for name, shape in expected.items():
            value = getattr(out, name)
            if value is None and name == "keep":
                continue
            if not isinstance(value, torch.Tensor):
                raise Failure(f"in {mode} {name} is a {type(value).__name__}, not a tensor")
            if tuple(value.shape) != shape:
                why = f"; its slots are {router.slots}" if shape == chosen else ""
                raise Failure(f"in {mode} {name} has the shape {tuple(value.shape)}, not {shape}{why}")
    return f"K = {router.slots}: topk_* {list(chosen)}, router_* {list(experts)}, entropy [{TOKENS}]"


def dtypes(subject: Subject) -> str:
    """Indices are int64, keep is bool, all else has the dtype of the router's arithmetic."""
    for mode, train in MODES.items():
        for dtype in (torch.float32, torch.float64):
            out = subject.raw(train=train, dtype=dtype)
            if out.topk_indices.dtype != torch.int64:
                raise Failure(f"in {mode} topk_indices is {out.topk_indices.dtype}, not torch.int64")
            if out.keep is not None and out.keep.dtype != torch.bool:
                raise Failure(f"in {mode} keep is {out.keep.dtype}, not torch.bool")
            for name, value in floats(out).items():
                if value.dtype != dtype:
                    raise Failure(f"in {mode} {name} is {value.dtype} for tokens of {dtype}")
    return "topk_indices int64; float32 for float32 tokens, float64 for float64 tokens"


def indices(subject: Subject) -> str:
    """Experts exist, and no token visits one twice."""
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        wrong_TK = (out.topk_indices < 0) | (out.topk_indices >= subject.num_experts)
        if bool(wrong_TK.any()):
            token = first_token(wrong_TK)
            raise Failure(
                f"in {mode} token {token} is sent to expert {int(out.topk_indices[wrong_TK][0])}, but there are"
                f" experts 0 to {subject.num_experts - 1}"
            )
        used_TK = torch.ones_like(out.topk_indices) if out.keep is None else out.keep.long()
        visits_TE = torch.zeros(TOKENS, subject.num_experts, dtype=torch.int64)
        visits_TE.scatter_add_(1, out.topk_indices, used_TK)
        if bool((visits_TE > 1).any()):
            token = first_token(visits_TE > 1)
            raise Failure(
                f"in {mode} token {token} is sent to expert {int(visits_TE[token].argmax())} more than once; mark a"
                " slot that is not needed as unused: keep False, weight 0"
            )
    return f"all in [0, {subject.num_experts}), each expert at most once per token"


def weights(subject: Subject) -> str:
    """Combine weights of slots in use are finite."""
    seen = []
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        values_TK = out.topk_weights.detach()
        if out.keep is not None:
            values_TK = values_TK.masked_fill(~out.keep, 0.0)
        if not bool(values_TK.isfinite().all()):
            token = first_token(~values_TK.isfinite())
            raise Failure(f"in {mode} topk_weights is {values_TK[token].tolist()} for token {token}")
        seen.append(values_TK)
    low, high = float(torch.cat(seen).min()), float(torch.cat(seen).max())
    return f"finite, from {low:.4g} to {high:.4g}"


def probabilities(subject: Subject) -> str:
    """Both distributions are distributions, and the logits are numbers."""
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        for name in ("router_probs", "router_probs_clean"):
            probs_TE = getattr(out, name).detach()
            sums_T = probs_TE.sum(dim=-1)
            wrong_T = ~((sums_T - 1).abs() <= PROBABILITY_TOLERANCE) | (probs_TE < 0).any(dim=-1)
            if bool(wrong_T.any()):
                token = first_token(wrong_T)
                raise Failure(
                    f"in {mode} {name} of token {token} is no distribution: it sums to {float(sums_T[token]):.6g}, and"
                    f" its least is {float(probs_TE[token].min()):.4g}"
                )
        if not bool(out.router_logits.isfinite().all()):
            raise Failure(
                f"in {mode} router_logits of token {first_token(~out.router_logits.isfinite())} are not finite"
            )
    return "router_probs and router_probs_clean are at least 0 and sum to 1; router_logits are finite"


def clean_entropy(subject: Subject) -> str:
    """Logits, clean distribution and entropy know nothing of the noise."""
    tokens_TD = subject.tokens()
    for mode, train in MODES.items():
        out = subject.raw(train=train)
        with seeded(3):
            again = subject.router(train=train).route(tokens_TD, None)
        for name in ("router_logits", "router_probs_clean"):
            if not torch.equal(getattr(out, name), getattr(again, name)):
                raise Failure(f"in {mode} {name} changes from draw to draw of the noise, but it must be noise-free")
        expected_T = entropy(out.router_probs_clean)
        off = float((out.entropy - expected_T).abs().nan_to_num(nan=torch.inf).max())
        if not off <= PROBABILITY_TOLERANCE:
            raise Failure(f"in {mode} entropy is off -Σ p·log p of router_probs_clean (nats) by up to {off:.4g}")
    return f"-Σ p·log p of router_probs_clean, {float(out.entropy.mean()):.3f} nats on average; noise-free"


def forward(subject: Subject) -> str:
    """``forward()`` takes ``[T, D]`` and ``[B, S, D]``, and gives the same for both."""
    for mode, train in MODES.items():
        tokens_TD = subject.tokens()
        with seeded(2):
            flat = subject.router(train=train)(tokens_TD)
        with seeded(2):
            deep = subject.router(train=train)(tokens_TD.reshape(BATCH, SEQUENCE, -1))
        if not train:  # whether training repeats at all is another question
            require_same_plan(deep, flat, 0.0, f"in {mode}, [B, S, D] instead of [T, D]")
    return "takes [T, D] and [B, S, D], and routes them alike"

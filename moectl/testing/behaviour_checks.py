"""Checks of how answers hang together: over masks, batches, dtypes, extremes, and later tokens.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.moe.causality import first_leak
from moectl.moe.router import Router, RouterError
from moectl.moe.types import RouterOutput
from moectl.testing.learning_checks import gradient_is_finite
from moectl.testing.results import Failure, NotApplicable
from moectl.testing.subject import (
    BATCH,
    FLOAT64_TOLERANCE,
    MODES,
    PROBABILITY_TOLERANCE,
    SEQUENCE,
    TOKENS,
    Subject,
    first_token,
    floats,
    plan,
    require_same_plan,
    seeded,
)


def determinism(subject: Subject) -> str:
    """Eval answers the same twice and changes nothing; training repeats under a seed."""
    tokens_TD, router = subject.tokens(), subject.router()
    before = {name: value.clone() for name, value in router.state_dict().items()}
    answers = []
    for seed in (4, 5):
        with seeded(seed):
            answers.append(router(tokens_TD))
    for name in RouterOutput._fields:
        first, second = (getattr(out, name) for out in answers)
        if first is not second and not torch.equal(first, second):
            raise Failure(f"in eval {name} differs between two calls on the same tokens")
    for name, value in router.state_dict().items():
        if not torch.equal(value, before[name]):
            raise Failure(f"a call in eval changed its state: {name}")
    again = []
    for _ in range(2):
        with seeded(4):
            again.append(subject.router(train=True)(tokens_TD))
    require_same_plan(again[1], again[0], 0.0, "in training, twice under the same torch.manual_seed")
    return "eval answers alike under two seeds and moves no state; training repeats under torch.manual_seed"


def padding(subject: Subject) -> str:
    """Padding, wherever it is and whatever it holds, changes nothing for real tokens and is routed nowhere."""
    generator = torch.Generator().manual_seed(6)
    right_BS = torch.arange(SEQUENCE) < torch.tensor([SEQUENCE, 9, 1, 0])[:, None]
    masks = {"right": right_BS, "left": right_BS.flip(1)}
    masks["scattered"] = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.6
    tokens_BSD = subject.tokens(torch.float64).reshape(BATCH, SEQUENCE, -1)
    for where, mask_BS in masks.items():
        router, mask_T = subject.router(dtype=torch.float64), mask_BS.reshape(-1)
        garbage_BSD = tokens_BSD.masked_fill(~mask_BS[:, :, None], float("nan"))
        out, alone = router(garbage_BSD, mask_BS), router(tokens_BSD[mask_BS])
        require_same_plan(plan(out)[mask_T], alone, FLOAT64_TOLERANCE, f"with padding ({where}) among them")
        _padding_is_unused(out, mask_T, where)
        gradient_is_finite(subject, garbage_BSD, mask_BS)
    nothing = torch.zeros(TOKENS, dtype=torch.bool)
    _padding_is_unused(subject.router()(subject.tokens(), nothing), nothing, "everywhere")
    return (
        "left, right, scattered and everywhere, holding NaN: real tokens go where they go without it, padding nowhere"
    )


def _padding_is_unused(out: RouterOutput, mask_T: Tensor, where: str) -> None:
    if out.keep is None or bool(out.keep[~mask_T].any()):
        raise Failure(f"padding ({where}) keeps slots in use: keep must be False there")
    if bool(out.topk_weights.detach()[~mask_T].any()):
        raise Failure(f"padding ({where}) has another combine weight than 0")


def empty_batch(subject: Subject) -> str:
    """No tokens are no trouble."""
    for mode, train in MODES.items():
        for shape in ((0,), (0, SEQUENCE), (BATCH, 0)):
            router = subject.router(train=train)
            out = router(torch.zeros(*shape, subject.hidden_size))
            if out.topk_indices.shape != (0, router.slots):
                raise Failure(f"in {mode} topk_indices has the shape {tuple(out.topk_indices.shape)} for no tokens")
    return "[0, D], [0, S, D] and [B, 0, D] are routed nowhere, without an error"


def one_token(subject: Subject) -> str:
    """A single token is routed."""
    for mode, train in MODES.items():
        router = subject.router(train=train)
        out = router(subject.tokens(count=1))
        for name, value in floats(out).items():
            if not bool(value.isfinite().all()):
                raise Failure(f"in {mode} {name} of a single token is not finite")
        if out.topk_indices.shape != (1, router.slots):
            raise Failure(f"in {mode} topk_indices has the shape {tuple(out.topk_indices.shape)} for one token")
    return "[1, D] is routed, in training and in eval"


def decode(subject: Subject) -> str:
    """In eval a causal router sends a token alone, as cached decoding sees it, where it sent it within the batch."""
    router = subject.router(dtype=torch.float64)
    if not router.causal:
        raise NotApplicable("non-causal, as declared: a token's route depends on the rest of the batch")
    tokens_TD = subject.tokens(torch.float64)
    together_TE = plan(router(tokens_TD))
    alone_TE = torch.cat([plan(router(token_TD)) for token_TD in tokens_TD.split(1)])
    require_same_plan(alone_TE, together_TE, FLOAT64_TOLERANCE, "alone instead of with the rest of the batch")
    return f"each of {TOKENS} tokens goes alone where it goes within the batch, as cached decoding needs"


def ties(subject: Subject) -> str:
    """Equal logits give the lowest experts, every time."""
    for mode, train in MODES.items():
        router = subject.router(train=train)
        zeros_TD = torch.zeros(TOKENS, subject.hidden_size)
        answers = []
        for _ in range(2):
            with seeded(2):
                answers.append(router(zeros_TD))
        require_same_plan(answers[1], answers[0], 0.0, f"in {mode}, on tied logits, the second time")
    out = answers[0]  # in eval: no noise breaks the ties
    tied_T = (out.router_logits == out.router_logits[:, :1]).all(dim=-1)
    if not (router.token_choice and router.learns and bool(tied_T.all())):
        return "equal tokens are routed alike, twice; there is no lowest-expert rule for this router"
    used_TK = torch.ones_like(out.topk_indices, dtype=torch.bool) if out.keep is None else out.keep
    wrong_TK = (out.topk_indices >= router.top_k) & used_TK
    if bool(wrong_TK.any()):
        chosen = out.topk_indices[first_token(wrong_TK)].tolist()
        raise Failure(
            f"all logits equal, and it chose {chosen}, not the lowest {router.top_k}: break ties by a stable sort"
            " (moectl.moe.router.stable_topk), which torch.topk does not promise"
        )
    return f"all logits equal give the lowest {router.top_k}, twice"


def extreme_logits(subject: Subject) -> str:
    """Logits of ±80 and beyond stay finite, forward and backward."""
    unit = float(subject.router()(subject.tokens()).router_logits.detach().abs().max())
    reached = 0.0
    for size in (80.0, 800.0):
        tokens_TD = subject.tokens() * (size / unit if 0 < unit < torch.inf else size)
        try:
            reached = max(reached, *(_stays_finite(subject, tokens_TD, mode) for mode in MODES))
            gradient_is_finite(subject, tokens_TD, None)
        except (Failure, RouterError) as error:
            raise Failure(f"with logits of ±{size:.0f}: {error}") from error
    return f"finite forward and backward with logits up to ±{reached:.0f}"


def _stays_finite(subject: Subject, tokens_TD: Tensor, mode: str) -> float:
    """The largest logit that was reached."""
    with seeded(2):
        out = subject.router(train=MODES[mode])(tokens_TD)
    for name, value in floats(out).items():
        if not bool(value.isfinite().all()):
            raise Failure(f"in {mode} {name} is not finite")
    off = float((out.router_probs.detach().sum(dim=-1) - 1).abs().max())
    if not off <= PROBABILITY_TOLERANCE:
        raise Failure(f"in {mode} router_probs sums to 1 ± {off:.4g}")
    return float(out.router_logits.detach().abs().max())


def low_precision(subject: Subject) -> str:
    """bfloat16 tokens, parameters and autocast change no route: the arithmetic is float32."""
    logits_TE = subject.router()(subject.tokens()).router_logits
    if subject.build().learns and torch.equal(logits_TE, logits_TE.bfloat16().float()):
        raise Failure("router_logits of float32 tokens are bfloat16 numbers: route() computes in low precision")
    low_TD = subject.tokens(torch.bfloat16)
    expected = subject.router()(low_TD.float())
    got = subject.router()(low_TD)
    require_same_plan(got, expected, 0.0, "on bfloat16 tokens instead of the same numbers in float32")
    with torch.autocast("cpu", torch.bfloat16):
        cast = subject.router()(low_TD.float())
    require_same_plan(cast, expected, 0.0, "under bfloat16 autocast")
    lowered = subject.router().to(torch.bfloat16)
    twin = subject.router()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), lowered.parameters(), strict=True):
            mine.copy_(theirs)
    half = lowered(low_TD)
    require_same_plan(half, twin(low_TD.float()), 0.0, "with bfloat16 parameters instead of the same in float32")
    for name, value in {**floats(got), **floats(cast), **floats(half)}.items():
        if value.dtype != torch.float32:
            raise Failure(f"{name} is {value.dtype} for bfloat16 tokens, not torch.float32")
    return "bfloat16 tokens, parameters and autocast give the experts and weights of float32"


def causality(subject: Subject) -> str:
    """Later tokens change no earlier route, if it declares so."""
    router = subject.router()
    leak = first_leak(_Plan(router), subject.tokens().reshape(BATCH, SEQUENCE, -1))
    if not router.causal:
        return f"non-causal, as declared: {leak or 'though no later token was seen to change an earlier route'}"
    if leak is not None:
        raise Failure(f"it declares causal = True, but {leak}")
    return "causal, as declared: other later tokens changed no earlier route, in training and in eval"


class _Plan(nn.Module):
    """A router as a layer whose output is its combine weights, for the probe of whole layers."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        return plan(self.router(x))

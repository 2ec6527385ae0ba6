"""Mistakes that only gradients show: every forward tensor agrees, and nothing flows back where something should."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moectl.parity.hypotheses.kinds import Hypothesis, Look, Variant, whole

#: Where a gradient may end, and what that is called.
PLACES = {
    "router": {
        "router_input": "the router's input",
        "normaliser": "the sum that the chosen probabilities are divided by",
    },
    "experts": {"expert_input": "the experts' input", "expert_outputs": "the experts' outputs"},
    "attention": {"q": "the queries", "k": "the keys", "v": "the values"},
    "model": {"attn_residual": "the residual beside attention", "mlp_residual": "the residual beside the MLP"},
}


def _detached(*places: str, called: str) -> Variant:
    return Variant(f"{called} detached", lambda formula, _: replace(formula, detached=(*formula.detached, *places)))


def _router(look: Look) -> Iterator[Variant]:
    yield _detached("weights", called="the combine weights")


def _at(component: str) -> Iterator[Variant]:
    for place, called in PLACES[component].items():
        yield _detached(place, called=called)


def _block(look: Look) -> Iterator[Variant]:
    yield from _at("experts")
    yield _detached("router_input", "expert_input", called="the block's input")


def _attention(look: Look) -> Iterator[Variant]:
    yield from _at("attention")
    yield _detached("k", "v", called="keys and values")


def _norms(look: Look) -> Iterator[Variant]:
    own = tuple((role, replace(norm, statistic_detached=True)) for role, norm in look.formula.norms)
    yield whole("the norms' mean square detached", norm=replace(look.formula.norm, statistic_detached=True), norms=own)


CUT = ("MOE095",)
#: Computed with gradients, for candidates whose forward tensors all agree.
BACKWARD: tuple[Hypothesis, ...] = (
    Hypothesis("router-without-gradient", ("MOE032", *CUT), "no gradient reaches the router", "router", _router),
    Hypothesis("router-cut", CUT, "the router's gradient is cut", "router", lambda _: _at("router")),
    Hypothesis("experts-cut", CUT, "the experts' gradient is cut", "experts", _block),
    Hypothesis("attention-cut", CUT, "attention's gradient is cut", "attention", _attention),
    Hypothesis("norm-cut", CUT, "a norm's gradient is cut", "norm", _norms),
    Hypothesis("residual-cut", CUT, "the residual stream's gradient is cut", "model", lambda _: _at("model")),
)

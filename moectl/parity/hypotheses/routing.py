"""Mistakes in the router: which experts, with which weights, in which precision, and who is dropped.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moectl.parity.case import Case
from moectl.parity.formula import Formula
from moectl.parity.hypotheses.kinds import Hypothesis, Look, Variant, router
from moectl.parity.hypotheses.routes import capacities_of, logit_scales_of, weights_evidence

LOW = ("bfloat16", "float16")


def _norm_topk(look: Look) -> Iterator[Variant]:
    if look.formula.router.norm_topk:
        yield router("the chosen probabilities are not divided by their sum", norm_topk=False)
    else:
        yield router("the chosen probabilities are divided by their sum", norm_topk=True)


def _norm_all(look: Look) -> Iterator[Variant]:
    yield router("all probabilities divided by their sum, the chosen ones not", norm_all=True, norm_topk=False)


def _softmax_chosen(look: Look) -> Iterator[Variant]:
    yield router("softmax over the chosen logits alone", score="softmax_chosen")


def _softmax_twice(look: Look) -> Iterator[Variant]:
    yield router("another softmax over the chosen probabilities", score="softmax_twice")


def _softmax_tokens(look: Look) -> Iterator[Variant]:
    for norm in (look.formula.router.norm_topk, not look.formula.router.norm_topk):
        ending = "" if norm == look.formula.router.norm_topk else f", {'' if norm else 'not '}renormalised"
        yield router(f"softmax of the router logits over tokens{ending}", softmax_over="tokens", norm_topk=norm)


def _choice(look: Look) -> Iterator[Variant]:
    yield router("the smallest are chosen", choose="smallest")
    for pairing, label in (("sorted_indices", "weights by size, experts by number"), ("reversed", "weights reversed")):
        yield router(f"weights paired with other experts: {label}", pairing=pairing)


def _best_for_all(look: Look) -> Iterator[Variant]:
    if look.formula.router.top_k > 1:
        change = router("", pairing="best").formula
        yield Variant("every chosen expert gets the largest weight", change, either=("mlp.weights",))


def _logit_scale(look: Look) -> Iterator[Variant]:
    hidden, num_experts = look.formula.experts.hidden_size, look.formula.router.num_experts
    named = {hidden**-0.5: "1/√D", hidden**0.5: "√D", num_experts**-0.5: "1/√E", 1 / hidden: "1/D"}
    for scale in (*named, *(s for s in logit_scales_of(look) if all(abs(s / other - 1) > 1e-6 for other in named))):
        change = router("", logit_scale=scale).formula
        called = f"{named[scale]}, {scale:.6g}" if scale in named else f"{scale:.6g}"
        yield Variant(f"router logits multiplied by {called}", change, either=("mlp.router_logits",))


def _scores(look: Look) -> Iterator[Variant]:
    other = "sigmoid" if look.formula.router.score != "sigmoid" else "softmax"
    yield router(f"scores by {other}", score=other)
    yield router(f"scores by {other}, not renormalised", score=other, norm_topk=False)


def _low_precision(look: Look) -> Iterator[Variant]:
    for dtype in LOW:
        yield router(f"logits computed in {dtype}", dtype=dtype)
        yield router(f"probabilities rounded to {dtype}", probs_dtype=dtype)
        yield router(f"probabilities rounded to {dtype} and normalised in it", probs_dtype=dtype, probs_stay=True)
        yield router(f"softmax computed in {dtype}", softmax_dtype=dtype)
        yield router(f"softmax computed in {dtype}, and normalised in it", softmax_dtype=dtype, probs_stay=True)
        yield router(f"logits and probabilities in {dtype}", dtype=dtype, probs_dtype=dtype)
        low = {"dtype": dtype, "softmax_dtype": dtype, "probs_stay": True}
        yield router(f"everything from the logits on in {dtype}", **low)


def _bias_weighs(look: Look) -> Iterator[Variant]:
    if look.formula.router.choice_bias:
        yield router("the balancing bias reaches the weights", bias_weighs=True)


def _scaling(look: Look) -> Iterator[Variant]:
    if look.formula.router.scaling != 1.0:
        yield router(f"weights not multiplied by {look.formula.router.scaling:g}", scaling=1.0)


def _groups(look: Look) -> Iterator[Variant]:
    formula = look.formula.router
    if formula.groups_kept < formula.groups:
        yield router("experts chosen from all groups", groups=1, groups_kept=1)
        yield router("groups chosen by their best expert", group_score="max")


def _capacity(look: Look) -> Iterator[Variant]:
    """Drops, with a capacity that the missing assignments themselves give, case by case."""
    found = capacities_of(look)
    if not found or all(capacity is None for capacity, _ in found):
        return
    if any(capacity is not None and capacity >= fullest for capacity, fullest in found):
        return
    if all(capacity is None or capacity == fullest - 1 for capacity, fullest in found):
        return  # that is `_capacity_off_by_one`
    yield from _dropping(look, [capacity for capacity, _ in found])


def _capacity_off_by_one(look: Look) -> Iterator[Variant]:
    found = capacities_of(look)
    one_short = [capacity is None or capacity == fullest - 1 for capacity, fullest in found]
    if found and all(one_short) and any(capacity is not None for capacity, _ in found):
        yield from _dropping(look, [capacity for capacity, _ in found])


def _dropping(look: Look, capacities: list[int | None]) -> Iterator[Variant]:
    by_case = {id(case.inputs): capacity for case, capacity in zip(look.cases, capacities, strict=True)}
    told = sorted({capacity for capacity in capacities if capacity is not None})
    for order, label in (("tokens", "later tokens"), ("slots", "later choices"), ("weights", "smaller weights")):

        def change(formula: Formula, case: Case, order: str = order) -> Formula:
            experts = replace(formula.experts, capacity=by_case.get(id(case.inputs)), capacity_order=order)  # type: ignore[arg-type]
            return replace(formula, experts=experts)

        takes = f"{told[0]}" if len(told) == 1 else f"{told[0]} to {told[-1]} (as the case has many)"
        yield Variant(
            f"each expert takes {takes} tokens, {label} are dropped", change, either=("mlp.chosen", "mlp.weights")
        )


HYPOTHESES = (
    Hypothesis("norm-topk", ("MOE016",), "norm_topk_prob ignored", "router", _norm_topk, weights_evidence),
    Hypothesis(
        "norm-all",
        ("MOE011",),
        "all probabilities normalised instead of the chosen ones",
        "router",
        _norm_all,
        weights_evidence,
    ),
    Hypothesis(
        "softmax-after-topk", ("MOE015",), "softmax after the top-k", "router", _softmax_chosen, weights_evidence
    ),
    Hypothesis(
        "softmax-twice", ("MOE015",), "another softmax after the top-k", "router", _softmax_twice, weights_evidence
    ),
    Hypothesis("router-softmax", ("MOE003",), "router softmax over the wrong dimension", "router", _softmax_tokens),
    Hypothesis("router-choice", ("MOE071",), "the wrong experts chosen, or weights of others", "router", _choice),
    Hypothesis("best-weight", ("MOE102",), "one weight for all chosen experts", "router", _best_for_all),
    Hypothesis("logit-scale", ("MOE104",), "router logits scaled", "router", _logit_scale),
    Hypothesis("router-score", ("MOE100",), "scores by another function than the family's", "router", _scores),
    Hypothesis("router-precision", ("MOE027",), "router in low precision", "router", _low_precision),
    Hypothesis("bias-weighs", ("MOE073",), "balancing bias used in the weights", "router", _bias_weighs),
    Hypothesis("router-scaling", ("MOE075",), "routed scaling factor ignored", "router", _scaling, weights_evidence),
    Hypothesis("router-groups", ("MOE071",), "the wrong experts chosen: groups not limited", "router", _groups),
    Hypothesis("capacity", ("MOE028",), "tokens dropped by a capacity", "experts", _capacity, weights_evidence),
    Hypothesis(
        "capacity-off-by-one", ("MOE031",), "capacity off by one", "experts", _capacity_off_by_one, weights_evidence
    ),
)

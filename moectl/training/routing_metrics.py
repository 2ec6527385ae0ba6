"""The numbers of one optimizer step's routing, each beside what it would be when balanced and when collapsed.

Shape suffixes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from moectl.moe import stats
from moectl.moe.losses import BALANCE_LOSSES
from moectl.training.routing import StepRouting

Reference = Callable[[int, int], float]

#: What the number of a balance loss over a step is called.
KINDS = {"switch": "balance", "cv2": "cv2"}
#: By kind, the value at perfect balance and the value when the same k experts share all tokens and all probability.
REFERENCES: dict[str, tuple[Reference, Reference]] = {
    **{kind: (BALANCE_LOSSES[name].balanced, BALANCE_LOSSES[name].collapse) for name, kind in KINDS.items()},
    "max_share": (lambda experts, k: 1 / experts, lambda experts, k: 1 / k),
    "load_cv": (lambda experts, k: 0.0, lambda experts, k: math.sqrt(experts / k - 1)),
    "entropy": (lambda experts, k: math.log(experts), lambda experts, k: math.log(k)),
}


def step_metrics(routing: StepRouting) -> dict[str, float]:
    """What the log gets of a step: per layer always, the worst layer first, never a mean over layers.

    For each kind ``K`` of number: ``K/worst`` and ``K/worst_layer``; ``K/balanced_value`` and
    ``K/collapse_value`` for the k of this step; and ``K/layer.N``, worst layer first.

    - ``balance``: the Switch value of the whole step, whatever the losses and their scope; ``cv2``
      likewise, where it is a loss. ``K/running_deviation`` is how far the trained value is from it, in
      the worst layer: what running counts cost, and 0 (to rounding) with ``balance_exact``.
    - ``balance_micro``, ``balance_sequence`` (``cv2_...``): the same, as trained in a scope that is not global.
    - ``max_share``, ``load_cv``: of assignments. ``entropy``: of the noise-free distribution, nats.
    - ``logit_abs``: mean size of the raw router logits. ``dropped``: share of the assignments that
      capacity dropped, where there is one.
    """
    values: dict[str, float] = {}
    for name in dict.fromkeys(("switch", *routing.moe.balance_loss)):
        if name in KINDS:
            values |= _balance(routing, name)
    counts = {number: step.counts_E.cpu() for number, step in routing.steps.items()}
    whole = {number: step.done.load() for number, step in routing.steps.items()}
    values |= _ranked(routing, "max_share", {n: stats.max_share(counts_E) for n, counts_E in counts.items()})
    values |= _ranked(routing, "load_cv", {n: stats.load_cv(counts_E) for n, counts_E in counts.items()})
    values |= _ranked(routing, "entropy", {n: float(load.entropy) for n, load in whole.items()}, worst=min)
    logits = {n: float(step.logit_abs / whole[n].tokens.clamp(min=1)) for n, step in routing.steps.items()}
    values |= _ranked(routing, "logit_abs", logits)
    dropped = {
        number: float(step.dropped) / max(int(counts[number].sum()), 1)
        for number, step in routing.steps.items()
        if step.dropped is not None
    }
    return values | _ranked(routing, "dropped", dropped)


def _balance(routing: StepRouting, name: str) -> dict[str, float]:
    """One balance loss over the whole step, and, where it is trained, what it was trained on."""
    kind, scope = KINDS[name], routing.moe.balance_scope
    exact = {number: step.value(name) for number, step in routing.steps.items()}
    values = _ranked(routing, kind, exact)
    if name not in routing.moe.balance_loss:
        return values
    trained = {number: float(step.trained[name]) for number, step in routing.steps.items()}
    if scope != "global":
        return values | _ranked(routing, f"{kind}_{scope}", trained, references=kind)
    values[f"{kind}/running_deviation"] = max(abs(trained[number] - exact[number]) for number in exact)
    return values


def _ranked(
    routing: StepRouting,
    kind: str,
    values: Mapping[int, float],
    *,
    worst: Callable[..., int] = max,
    references: str | None = None,
) -> dict[str, float]:
    """One kind of number, the worst layer first (the largest value, unless ``worst`` is ``min``)."""
    if not values:
        return {}
    order = sorted(values, key=lambda number: values[number], reverse=worst is max)
    ranked = {f"{kind}/worst": values[order[0]], f"{kind}/worst_layer": float(order[0])}
    if (references or kind) in REFERENCES:
        router = routing.layers[order[0]].router
        balanced, collapse = REFERENCES[references or kind]
        ranked[f"{kind}/balanced_value"] = balanced(router.num_experts, router.top_k)
        ranked[f"{kind}/collapse_value"] = collapse(router.num_experts, router.top_k)
    return ranked | {f"{kind}/layer.{number}": values[number] for number in order}

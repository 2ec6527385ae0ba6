"""What the router does with one batch: who gets nothing, and what its balance is measured on.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moectl.doctor.model_subject import AuditedModel
from moectl.doctor.report import Checked, Finding, NotMade, Severity, by_layer, listed
from moectl.doctor.run_subject import AuditedRun
from moectl.doctor.subject import Audited, Layer
from moectl.hf.releases import are_probabilities

#: Chance, over all experts of all layers, of calling an expert dead that is not.
ERROR = 0.01
#: An expert with less than this share of an even load is as good as dead: the trainer's collapse check says so too.
STARVED = 0.1
#: A layer whose own balance value is so much above the pooled one, of which it is a part, is hidden by it.
HIDDEN = 0.1


def dead_experts(subject: Audited) -> Checked:
    """Experts that no token of the batch went to, and whether so many tokens can tell (MOE060)."""
    layers = subject.routed_layers()
    total = sum(layer.num_experts for layer in layers.values())
    findings, details = [], []
    for number, layer in layers.items():
        if number not in subject.seen.routes:
            continue
        counts_E = subject.seen.routes[number].counts(layer.num_experts)
        dead = [int(expert) for expert in (counts_E == 0).nonzero().flatten()]
        share = float(counts_E.max()) / max(int(counts_E.sum()), 1)
        said = f"{len(dead)} of {layer.num_experts} without a token, busiest {share:.0%}"
        details.append((-share - len(dead), f"layer {number}: {said} (even: {1 / layer.num_experts:.0%})"))
        if dead:
            findings += _dead(subject, layer, dead, total)
    if not details:
        raise NotMade("what the experts are handed could not be seen")
    return f"{subject.tokens.number:,} tokens; {by_layer(details)}", findings


def tokens_needed(num_experts: int, top_k: int, experts_in_all: int) -> int:
    """So many tokens without one for an expert say that it is starved: its share is under a tenth of an even one.

    A token goes to an expert with a starved share ``q = STARVED · k/E`` or less; ``(1 - q)^T`` is the chance that
    none of ``T`` does, and is kept under :data:`ERROR` over all experts (Bonferroni). Tokens of one text are not
    independent, so that this is the least number.
    """
    share = min(STARVED * top_k / num_experts, 1.0 - 1e-9)
    return math.ceil(math.log(ERROR / experts_in_all) / math.log1p(-share))


def _dead(subject: Audited, layer: Layer, dead: list[int], total: int) -> list[Finding]:
    tokens = subject.tokens.number
    needed = tokens_needed(layer.num_experts, layer.top_k, total)
    even = tokens * layer.top_k / layer.num_experts
    seen = (
        f"expert{'s' if len(dead) > 1 else ''} {listed(dead, 8)} of {layer.num_experts} got none of {tokens:,} tokens,"
        f" where an even load gives each {even:,.0f}"
    )
    todo = _revival(subject)
    severity: Severity = "problem"
    if tokens < needed:
        seen += f". {needed:,} tokens could tell it from a rare expert"
        severity, todo = "note", "Look at more tokens before you call it dead: moectl inspect routing reads them all."
    elif subject.tokens.drawn:
        seen += ". The tokens are random ids: real text may reach it"
        severity = "warning"
    elif taught := int(_in_training(subject, layer)[dead].sum()):
        seen += f"; in training mode, by its noise, they get {taught:,}"
        severity = "warning"
    findings = [Finding("MOE060", severity, layer.number, seen, todo)]
    last = layer.num_experts - 1
    if last in dead:
        shown = max(set(range(layer.num_experts)) - set(dead), default=-1) + 1
        seen = f"expert {last}, the last, is among them: bincount without minlength would show {shown} experts"
        findings.append(Finding("MOE043", "note", layer.number, seen, "Count with minlength = number of experts."))
    return findings


def _in_training(subject: Audited, layer: Layer) -> Tensor:
    """Tokens of each expert ``[E]`` in training mode, where noise or a schedule may send some that eval does not."""
    return subject.trained.routes[layer.number].counts(layer.num_experts)


def _revival(subject: Audited) -> str:
    """How experts without tokens are brought back, with what this model has."""
    if isinstance(subject, AuditedModel):
        return "When you train on, raise router_aux_loss_coef and set output_router_logits; watch each layer."
    return (
        "Train on and look again; if they stay, raise moe.lb_coef, or let dead experts start anew"
        " (moe.revive_dead: true)."
    )


def balance_pooled(subject: Audited) -> Checked:
    """Whether the balance loss is one per layer, or one over the pooled tokens of all (MOE038)."""
    layers = subject.routed_layers()
    if isinstance(subject, AuditedRun):
        balance = subject.seen.balance
        rows = [
            (-value, f"{name} {value:.3f} (1 … {layer.num_experts / layer.top_k:g})")
            for layer, (name, value) in zip(layers.values(), balance.items(), strict=True)
        ]
        return f"one loss per layer, balanced … collapsed: {by_layer(rows)}", []
    assert isinstance(subject, AuditedModel) and subject.opened is not None
    own = subject.seen.balance.get("over all layers")
    if own is None:
        raise NotMade(f"{subject.opened.architecture} returns no balance loss")
    parts = [_counts_and_probs(subject, layer) for layer in layers.values()]
    if any(part is None for part in parts):
        raise NotMade("its router logits could not be seen")
    if len(parts) == 1:
        return (
            f"one MoE layer: there is nothing to pool; its value is {own:.3f} (balanced: {_k(layers)}, that is k)",
            [],
        )
    shares, probs = (torch.stack(list(each)) for each in zip(*[p for p in parts if p is not None], strict=True))
    experts = shares.shape[1]
    each = experts * (shares * probs).sum(1)
    pooled = float(experts * (shares.mean(0) * probs.mean(0)).sum())
    mean, worst = float(each.mean()), int(each.argmax())
    detail = f"the model's value is {own:.4f}; of all layers pooled {pooled:.4f}, mean of each layer's {mean:.4f}"
    if abs(own - pooled) > 1e-3 * abs(pooled):
        return detail, []
    on = subject.opened.balance_on and bool(subject.opened.balance_coef)
    hidden = float(each[worst]) - own > HIDDEN * own
    seen = (
        f"the balance loss pools all {len(parts)} layers: {own:.3f}, where layer {list(layers)[worst]} alone has"
        f" {float(each[worst]):.3f} (balanced: {_k(layers)}, since it counts k per token)"
        + (f"; on these tokens it hides {'that layer' if hidden else 'nothing'}")
        + ("" if on else "; it is off (output_router_logits is false or the coefficient 0)")
    )
    todo = (
        "Layers that collapse on different experts score as balanced: judge each layer by itself, and train per layer."
    )
    return detail, [Finding("MOE038", "warning" if on and hidden else "note", None, seen, todo)]


def _k(layers: dict[int, Layer]) -> int:
    return next(iter(layers.values())).top_k


def _counts_and_probs(subject: Audited, layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Chosen experts per token (sums to k) and mean probability, ``[E]`` each, as the loss takes them."""
    route = subject.seen.routes.get(layer.number)
    if route is None or route.logits is None:
        return None
    shares_E = route.counts(layer.num_experts).double() / len(route.indices)
    return shares_E, torch.softmax(route.logits.double(), -1).mean(0)


def logits_are_logits(subject: Audited) -> Checked:
    """What the model calls ``router_logits`` are logits, not probabilities (MOE057)."""
    layers = subject.routed_layers()
    logits = {number: route.logits for number, route in subject.seen.routes.items()}
    if isinstance(subject, AuditedModel):  # what the model hands out, where it does: the losses are made of that
        with torch.no_grad():
            logits |= subject.call(subject.tokens.rows(2)).router_logits
    known = {number: values for number, values in logits.items() if values is not None and number in layers}
    if not known:
        raise NotMade("its router's logits could not be seen")
    bad = [number for number, values in known.items() if are_probabilities(values)]
    findings = [
        Finding(
            "MOE057",
            "problem",
            number,
            "router_logits are probabilities: every row is non-negative and sums to one, so that the balance loss takes"
            " the softmax of a softmax, which is nearly uniform whatever the router does",
            "Use a release whose router returns logits (moectl doctor names them), or compute the loss from the gate's"
            " own output.",
        )
        for number in bad
    ]
    return f"logits in {len(known) - len(bad)} of {len(known)} layers", findings


def dropped_in_eval(subject: Audited) -> Checked:
    """No token is dropped by a capacity outside training (MOE028)."""
    layers = subject.routed_layers()
    lost = {number: count for number, count in subject.seen.dropped.items() if count}
    findings = [
        Finding(
            "MOE028",
            "warning",
            number,
            f"{count} assignments are dropped in eval",
            "Leave moe.capacity.in_eval away: held-out losses are compared without drops.",
        )
        for number, count in lost.items()
    ]
    limited = sum(layer.limited for layer in layers.values())
    return f"{limited} of {len(layers)} layers have a capacity in eval", findings

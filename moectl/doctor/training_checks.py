"""What training does to the weights: which losses reach the gate, which parameters the optimizer moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moectl.doctor.model_subject import AuditedModel
from moectl.doctor.report import Checked, Finding, NotMade, by_layer, layer_of, listed
from moectl.doctor.subject import Audited, training_mode
from moectl.moe.router import at_least_float32

GRADIENT_TOKENS = 1024
#: A gate's gradient below this share of its experts' is rounding: p / p, the constant weight of one renormalised
#: expert, differentiates to 1e-9 to 5e-9 of it in float32; the gates of fresh models of six families get 8e-3 to 4e-2.
NO_GRADIENT = 1e-6
ROUNDING = 1e-6  # of a float32 number near 1: some units in the last place


class Gradients:
    """Of one batch in training mode, by layer: sizes of what reaches gate and experts."""

    def __init__(self, subject: Audited) -> None:
        layers = list(subject.layers.values())
        gates = [layer.gate for layer in layers]
        stacks = [list(layer.experts.values()) for layer in layers]
        rows = max(GRADIENT_TOKENS // subject.tokens.input_ids.shape[1], 1)
        with training_mode(subject.model), _unfrozen(subject):
            losses = subject.losses(subject.tokens.rows(rows))
            wanted = [*gates, *(p for stack in stacks for p in stack)]
            lm = _sizes(losses.lm, wanted, retain=True)
            self.balance = None if losses.balance is None else _sizes(losses.balance, gates)
        self.lm = lm[: len(gates)]
        self.no_balance = losses.no_balance
        sizes = iter(lm[len(gates) :])
        self.experts = [sum((next(sizes) or 0.0) ** 2 for _ in stack) ** 0.5 for stack in stacks]


@contextmanager
def _unfrozen(subject: Audited) -> Iterator[None]:
    """Frozen gates take part in the graph too: whether they are trained is another check's question."""
    frozen = [layer.gate for layer in subject.layers.values() if not layer.gate.requires_grad]
    for gate in frozen:
        gate.requires_grad_(True)
    try:
        yield
    finally:
        for gate in frozen:
            gate.requires_grad_(False)


def _sizes(loss: Tensor, wanted: Sequence[Tensor], *, retain: bool = False) -> list[float | None]:
    """Norms of the gradients; None where there is no way from the loss to the parameter."""
    learning = [tensor for tensor in wanted if tensor.requires_grad]
    if not loss.requires_grad or not learning:
        return [None for _ in wanted]
    found = torch.autograd.grad(loss, learning, retain_graph=retain, allow_unused=True)
    grads = {id(tensor): grad for tensor, grad in zip(learning, found, strict=True)}
    return [None if (grad := grads.get(id(t))) is None else float(grad.double().norm()) for t in wanted]


def lm_gradient(subject: Audited) -> Checked:
    """The language-model loss reaches every gate (MOE032)."""
    layers = subject.routed_layers()
    gradients = _gradients(subject)
    findings, details = [], []
    for (number, layer), size, experts in zip(layers.items(), gradients.lm, gradients.experts, strict=True):
        share = (size or 0.0) / experts if experts else 0.0
        details.append((share, f"layer {number}: gate {size or 0.0:.1e}, {share:.1%} of its experts'"))
        if not layer.learns or not _starved(size, experts):
            continue
        seen = (
            f"the language-model loss does not reach the gate: |∂LM/∂W| is {size or 0.0:.1e}, experts get {experts:.1e}"
        )
        todo = (
            "The combine weights must carry the router's gradient: with one expert per token use its probability, or"
            " straight-through (hard + soft - soft.detach()), and never p / p."
        )
        if experts == 0:
            seen, todo = (
                "no gradient of the language-model loss reaches the layer, its experts included",
                "Look for a detach, a zero combine weight, or a loss that is not finite.",
            )
        copies = subject.training.step == 0 and subject.training.copied
        if copies:
            seen += "; at step 0 its experts are copies of one MLP, whose weighted sum is the same under any gate"
            todo = "Nothing yet, if the copies part: look again after some steps, or raise moe.init_noise."
        findings.append(Finding("MOE032", "note" if copies else "problem", number, seen, todo))
    return f"|∂LM/∂W|, {by_layer(details)} (nothing: below {NO_GRADIENT:.4%})", findings


def _starved(size: float | None, experts: float) -> bool:
    return (size or 0.0) <= NO_GRADIENT * experts


def straight_through(subject: Audited) -> Checked:
    """With one expert per token: constant weights forward, and a gradient all the same (MOE032, MOE033)."""
    single = {number: layer for number, layer in subject.routed_layers().items() if layer.top_k == 1}
    if not single:
        raise NotMade("no layer sends a token to one expert only")
    found = _gradients(subject)
    gradients = dict(zip(subject.layers, zip(found.lm, found.experts, strict=True), strict=True))
    rows = max(GRADIENT_TOKENS // subject.tokens.input_ids.shape[1], 1)
    with training_mode(subject.model):
        taught = subject.look(subject.tokens.rows(rows)).routes
        subject.model.eval()
        answered = subject.look(subject.tokens.rows(rows)).routes
    findings, details = [], []
    for number, layer in single.items():
        if number not in taught or not layer.learns:
            continue
        weights = taught[number].weights.detach()
        constant = not _varies(weights)
        size, experts = gradients[number]
        kind = f"constant weight {float(weights.flatten()[0]):g}" if constant else "weight by probability"
        details.append((size or 0.0, f"layer {number}: {kind}, gradient {size or 0.0:.1e}"))
        if constant and _starved(size, experts):
            seen = f"its weight is constant ({float(weights.flatten()[0]):g}) and the straight-through gradient is zero"
            todo = "Use hard + soft - soft.detach() in training, so that the gate is taught."
            findings.append(Finding("MOE032", "problem", number, seen, todo))
        elif constant and answered[number].weights.requires_grad and not _varies(answered[number].weights):
            given = answered[number].weights.detach()
            off = float((given - given.round()).abs().max())
            seen = (
                f"straight-through is applied in eval too: the weights carry a gradient there, and are off by {off:.1g}"
            )
            findings.append(Finding("MOE033", "note", number, seen, "Return a plain 1.0 in eval."))
    return by_layer(details) or "no such gate is meant to learn", findings


def _varies(weights: Tensor) -> bool:
    """Whether the weights of different tokens differ: then they are probabilities, and no straight-through.

    ``hard + soft - soft.detach()``, taken from the left, misses 1 by a rounding error for one token in four.
    """
    low, high = weights.detach().aminmax()
    return float(high - low) > ROUNDING


def balance_gradient(subject: Audited) -> Checked:
    """The balance loss, where there is one, reaches every gate, and how strongly (MOE046)."""
    layers = subject.routed_layers()
    gradients = _gradients(subject)
    if gradients.balance is None:
        raise NotMade(f"no balance loss is added: {gradients.no_balance}")
    findings, details = [], []
    sizes = zip(gradients.balance, gradients.lm, gradients.experts, strict=True)
    for (number, layer), (size, lm, experts) in zip(layers.items(), sizes, strict=True):
        comparable = size is not None and lm is not None and not _starved(lm, experts)
        strength = f"{size / lm:.2g} of the LM's" if comparable else "no LM gradient to compare with"  # type: ignore[operator]
        details.append((size or 0.0, f"layer {number}: {size or 0.0:.1e} ({strength})"))
        if layer.learns and not size:
            seen = "the balance loss is computed, and its gradient does not reach the gate"
            todo = (
                "Compute it from probabilities that keep their graph (no detach), and add it to what is differentiated."
            )
            findings.append(Finding("MOE046", "problem", number, seen, todo))
    if isinstance(subject, AuditedModel) and not findings:
        assert subject.opened is not None
        if not subject.opened.balance_on:
            seen = (
                f"router_aux_loss_coef is {subject.opened.balance_coef:g}, but output_router_logits is false: the"
                " balance loss is neither computed nor added, in training too"
            )
            todo = "Set config.output_router_logits = True before training."
            findings.append(Finding("MOE046", "note", None, seen, todo))
    return f"|∂balance/∂W|, {by_layer(details)}", findings


def router_decay(subject: Audited) -> Checked:
    """No weight decay on routers: it pulls their logits together (MOE047)."""
    layers = subject.routed_layers()
    training = subject.training
    if training.groups is None and training.built is None:
        raise NotMade(
            f"{training.why}; Hugging Face's Trainer decays gates with all other matrices, unless told not to"
        )
    findings: list[Finding] = []
    for when, groups in (("decayed", training.groups), ("would be decayed", training.built)):
        decay = _decay(groups or ())
        for number, layer in layers.items():
            decayed = {name: rate for name in layer.router_parameters() if (rate := decay.get(name, 0.0))}
            if not decayed or any(finding.layer == number for finding in findings):
                continue
            names = ", ".join(f"{name} ({rate:g})" for name, rate in decayed.items())
            todo = "Put the router's parameters into a group with weight_decay = 0."
            findings.append(Finding("MOE047", "problem", number, f"weight decay {when}: {names}", todo))
    groups = training.groups if training.groups is not None else training.built
    what = "router parameters are decayed" if findings else "no router parameter is decayed"
    return f"{what} in the optimizer's {len(groups or ())} groups", findings


def _decay(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(group.get("weight_decay") or 0.0) for group in groups for name in group["params"]}


def trainable(subject: Audited) -> Checked:
    """Every part that should learn is in the optimizer, and has moved (MOE059)."""
    training = subject.training
    fixed = {n for layer in subject.layers.values() if not layer.learns for n in layer.router_parameters()}
    kept = {name: p for name, p in subject.model.named_parameters() if name in training.frozen}
    parameters = {n: p for n, p in subject.model.named_parameters() if n not in fixed and n not in kept}
    problems = {name: "requires_grad is False" for name, p in parameters.items() if not p.requires_grad}
    if training.groups is not None:
        known = {name for group in training.groups for name in group["params"]}
        problems |= {name: "not in the optimizer" for name in parameters if name not in known and name not in problems}
    still = [name for name in parameters if _still(subject, name, parameters[name])]
    problems |= {
        name: f"{problems[name]}, and equal to step 0" if name in problems else _unmoved(subject) for name in still
    }
    findings = [
        Finding("MOE059", "problem", number, f"{what}: {listed(names)}", _TODO)
        for (what, number), names in _grouped(problems).items()
    ]
    moved = [name for name, p in kept.items() if name in (training.start or {}) and not _still(subject, name, p)]
    if moved:
        findings.append(Finding("MOE059", "problem", None, f"frozen by the config, but moved: {listed(moved)}", _TODO))
    findings += _still_experts(subject, {*still, *kept})
    made = [f"{len(parameters)} parameter tensors"]
    made += [f"{len(kept)} frozen by the config"] if kept else []
    made += [] if training.groups is None else ["all in the optimizer" if not problems else "see the findings"]
    made += ["compared with step 0"] if training.start is not None else [f"not compared with step 0: {training.why}"]
    return ", ".join(made), findings


_TODO = "Give it a gradient (requires_grad) and a place in the optimizer; if it is frozen on purpose, leave it so."


def _unmoved(subject: Audited) -> str:
    return f"equal to step 0, bit for bit, after {subject.training.step or 0:,} steps"


def _still(subject: Audited, name: str, parameter: Tensor) -> bool:
    start = subject.training.start
    return start is not None and name in start and torch.equal(at_least_float32(start[name]), parameter.detach())


def _still_experts(subject: Audited, whole: set[str]) -> list[Finding]:
    """Single experts that are as they were at step 0, in stacks that have moved."""
    start = subject.training.start
    if start is None:
        return []
    findings = []
    for number, layer in subject.layers.items():
        names = [name for name in layer.experts if name in start and name not in whole]
        same = [(at_least_float32(start[n]) == layer.experts[n].detach()).flatten(1).all(1) for n in names]
        if not same:
            continue
        equal = [int(expert) for expert in torch.stack(same).all(0).nonzero().flatten()]
        frozen = [expert for expert in equal if expert not in subject.training.frozen_experts.get(number, ())]
        if frozen:
            seen = f"experts {listed(frozen)} are {_unmoved(subject)}"
            findings.append(Finding("MOE059", "problem", number, seen, _TODO))
    return findings


def _grouped(problems: Mapping[str, str]) -> dict[tuple[str, int | None], list[str]]:
    """Names by problem and layer."""
    grouped: dict[tuple[str, int | None], list[str]] = {}
    for name, what in problems.items():
        grouped.setdefault((what, layer_of(name)), []).append(name)
    return grouped


def _gradients(subject: Audited) -> Gradients:
    """Once per subject."""
    if "gradients" not in subject.kept:
        subject.kept["gradients"] = Gradients(subject)
    found: Gradients = subject.kept["gradients"]
    return found

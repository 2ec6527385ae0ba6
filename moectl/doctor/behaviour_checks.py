"""How the model behaves when something is changed that should not matter: padding, later tokens, chance.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moectl.doctor.model_subject import AuditedModel
from moectl.doctor.report import Checked, Finding, NotMade, by_layer
from moectl.doctor.subject import Audited, Seen, Tokens, seeded
from moectl.models.modes import eval_mode
from moectl.moe.causality import first_leak

#: Of the largest output. In float32 another shape of batch rounds to 1e-5 of it, and what is wrong is far above.
CHANGED = 1e-3
#: Share of tokens that may differ: a near-tie that rounding decides moves one token in thousands.
FLIPS = 0.01
#: Of a balance value: the same sums in another order.
BALANCE = 1e-3
PAD = 7
#: At most so many tokens before the cut: a mask that is off by one shows in the last of them only, 3 %.
LEAK_HALF = 32
PADDING_ROWS = 8
LEAK_TOKENS, LEAK_TRIALS, LEAK_PARAMETERS = 96, 12, 50_000_000


def outputs_finite(subject: Audited) -> Checked:
    """Neither the output nor any router's answer is NaN or infinite (MOE072)."""
    seen = subject.seen
    bad: list[tuple[int | None, str]] = []
    for number, route in seen.routes.items():
        for what, values in (("logits", route.logits), ("weights", route.weights)):
            if values is not None and not bool(torch.isfinite(values).all()):
                bad.append((number, f"the router's {what} are not finite"))
    if not bool(torch.isfinite(seen.output).all()):
        wrong = int((~torch.isfinite(seen.output)).flatten(0, 1).any(-1).sum())
        bad.append((None, f"the output of {wrong:,} of {subject.tokens.number:,} tokens is not finite"))
    todo = "Find the first layer that it begins in; look at logits beyond ±80, empty experts, and divisions by zero."
    return f"{subject.tokens.number:,} tokens", [Finding("MOE072", "problem", n, what, todo) for n, what in bad]


def eval_deterministic(subject: Audited) -> Checked:
    """In eval mode chance changes nothing: no noise, no dropout (MOE063)."""
    again = _again(subject)
    findings = []
    for number, layer in subject.layers.items():
        moved = _moved_routes(subject.seen, again, number, layer.num_experts)
        if moved:
            seen = f"in eval mode, {moved:.1%} of the tokens are routed otherwise when only the seed differs"
            todo = "Draw noise in training only: `if self.training`."
            findings.append(Finding("MOE063", "problem", number, seen, todo))
    changed = _changed_tokens(subject.seen.output, again.output)
    if changed and not findings:
        seen = f"in eval mode, the output of {changed:.1%} of the tokens differs when only the seed does"
        todo = "Some dropout or noise is on in eval: look for functional dropout without training=self.training."
        findings.append(Finding("MOE063", "problem", None, seen, todo))
    detail = "two passes with different seeds are equal" if not findings else f"{changed:.1%} of tokens differ"
    return f"{detail}; {_training_differs(subject)}", findings


def _again(subject: Audited) -> Seen:
    """The batch in eval mode once more, with another seed."""
    if "again" not in subject.kept:
        with eval_mode(subject.model), seeded(1):
            subject.kept["again"] = subject.look(subject.tokens)
    found: Seen = subject.kept["again"]
    return found


def _training_differs(subject: Audited) -> str:
    """What training mode changes, for the reader: noise is meant to."""
    layers = subject.layers.items()
    moved = [_moved_experts(subject.seen, subject.trained, number, layer.num_experts) for number, layer in layers]
    return f"training mode sends up to {max(moved):.1%} of the tokens elsewhere" if moved else "no router"


def padding_balance(subject: Audited) -> Checked:
    """The balance value does not change when padding is added (MOE036)."""
    subject.routed_layers()
    plain, padded = _with_padding(subject)
    if not plain.balance:
        raise NotMade("it returns no balance value")
    findings, details = [], []
    for name, value in plain.balance.items():
        others = {side: seen.balance[name] for side, seen in padded.items()}
        padded_values = ", ".join(f"{other:.4f}" for other in others.values())
        details.append((-value, f"{name}: {value:.4f}, padded left and right {padded_values}"))
        worst = max(others.values(), key=lambda other: abs(other - value))
        if not abs(worst - value) <= BALANCE * max(abs(value), 1e-6):
            number = int(name.rpartition(" ")[2]) if name.startswith("layer ") else None
            seen = (
                f"the balance value is {value:.4f}, and {worst:.4f} for the same tokens with {PAD} of padding per row"
            )
            todo = "Take counts and mean probabilities over real tokens only, in the router's own statistics too."
            findings.append(Finding("MOE036", "problem", number, seen, todo))
    return f"of the first {PADDING_ROWS} rows: {by_layer(details)}", findings


def padding_outputs(subject: Audited) -> Checked:
    """Real tokens' outputs and routes do not change when padding is added, on either side (MOE061)."""
    plain, padded = _with_padding(subject)
    findings, details = [], []
    for side, seen in padded.items():
        changed = _changed_tokens(plain.output, seen.output)
        details.append(f"{side}: {changed:.1%} of tokens differ")
        if changed > FLIPS:
            what = f"with {PAD} tokens of padding on the {side}, the output of {changed:.1%} of the real tokens changes"
            todo = (
                "Mask padding in attention and routing, let no statistic count it, and number positions from the first"
            )
            todo += " real token."
            own = isinstance(subject, AuditedModel) and side == "left"  # transformers leaves positions to the caller
            if own:
                todo = "Give position_ids that start at the first real token, as generate() does; or pad on the right."
            findings.append(Finding("MOE061", "warning" if own else "problem", None, what, todo))
    return "; ".join(details), findings


def _with_padding(subject: Audited) -> tuple[Seen, dict[str, Seen]]:
    """The same rows without padding, and with it on each side, only the real tokens' outputs kept."""
    if _changed_tokens(subject.seen.output, _again(subject).output):
        raise NotMade("chance alone changes its output in eval mode, so that padding cannot be blamed")
    if "padded" not in subject.kept:
        tokens = subject.tokens.rows(PADDING_ROWS)
        most = getattr(subject.model, "max_length", None)
        if most is not None and most <= PAD:
            raise NotMade(f"the model has {most} positions: there is no room for {PAD} tokens of padding")
        tokens = tokens if most is None else tokens.columns(most - PAD)
        with eval_mode(subject.model), seeded():
            plain = subject.look(tokens, torch.ones_like(tokens.input_ids).bool())
            padded = {side: _padded(subject, tokens, side) for side in ("left", "right")}
        subject.kept["padded"] = (plain, padded)
    found: tuple[Seen, dict[str, Seen]] = subject.kept["padded"]
    return found


def _padded(subject: Audited, tokens: Tokens, side: str) -> Seen:
    wider, mask_BS = tokens.padded(*((PAD, 0) if side == "left" else (0, PAD)))
    with seeded():
        seen = subject.look(wider, mask_BS)
    rows, length = tokens.input_ids.shape
    return seen._replace(output=seen.output[mask_BS].reshape(rows, length, -1))


def causality(subject: Audited) -> Checked:
    """No MoE layer lets a later token change an earlier output (MOE042); nor does the whole model (MOE006)."""
    findings: list[Finding] = []
    details: list[tuple[float, str]] = []
    for number, layer in subject.layers.items():
        if sum(p.numel() for p in layer.block.parameters()) > LEAK_PARAMETERS:
            details.append((1, f"layer {number}: too large to be tried in float64"))
            continue
        x_BSD = _some_rows(subject.seen.inputs[number])
        leak = first_leak(_OnlyTensor(layer.block), x_BSD, trials=LEAK_TRIALS)
        leaks = "no leak" if leak is None else "leaks"
        details.append((float(leak is None), f"layer {number}: {leaks} in {LEAK_TRIALS} trials"))
        if leak is not None:
            todo = (
                "Choose a router whose tokens choose by themselves, and fill capacity by position; its loss is no loss."
            )
            findings.append(Finding("MOE042", "problem", number, str(leak), todo))
    whole = _leak_of_model(subject)
    trials = [by_layer(details)] if details else []
    if whole > FLIPS and not findings:
        seen = f"{whole:.1%} of the tokens before a changed one have another output, and no MoE layer is to blame"
        findings.append(Finding("MOE006", "problem", None, seen, "Look at attention: its causal mask is missing."))
    return "; ".join([*trials, f"whole model: {whole:.1%} of earlier tokens change with later ones"]), findings


def _leak_of_model(subject: Audited) -> float:
    """Share of the tokens before a cut whose output changes when all tokens after it do."""
    tokens = subject.tokens.rows(PADDING_ROWS)
    half = min(tokens.input_ids.shape[1] // 2, LEAK_HALF)
    if half == 0:
        return 0.0
    ids = tokens.input_ids.clone()
    ids[:, half:] = ids[:, half:].flip(1)
    ids[:, half:] = torch.where(ids[:, half:] == tokens.input_ids[:, half:], ids[:, :1], ids[:, half:])
    with eval_mode(subject.model):
        with seeded():
            before = subject.look(tokens).output[:, :half]
        with seeded():
            after = subject.look(tokens._replace(input_ids=ids)).output[:, :half]
    return _changed_tokens(before, after)


class _OnlyTensor(nn.Module):
    """A block whose first output is what the layer hands on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.block(x)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


def _some_rows(x_BSD: Tensor) -> Tensor:
    """About :data:`LEAK_TOKENS` tokens of whole rows, or of the first row."""
    length = x_BSD.shape[1]
    return x_BSD[: max(LEAK_TOKENS // length, 1), :LEAK_TOKENS]


def _changed_tokens(before: Tensor, after: Tensor) -> float:
    """Share of tokens whose output differs by more than rounding; NaN on one side is a difference."""
    scale = before.nan_to_num().abs().max().clamp(min=1e-30)
    both = before.isnan() & after.isnan()
    difference = (before - after).abs().masked_fill(both, 0.0).nan_to_num(nan=torch.inf)
    return float((difference.amax(-1) > CHANGED * scale).float().mean())


def _moved_routes(one: Seen, other: Seen, number: int, num_experts: int) -> float:
    """Share of tokens with other combine weights."""
    if number not in one.routes or number not in other.routes:
        return 0.0
    plans = [seen.routes[number].plan(num_experts) for seen in (one, other)]
    return float(((plans[0] - plans[1]).abs().nan_to_num(nan=torch.inf).amax(1) > CHANGED).float().mean())


def _moved_experts(one: Seen, other: Seen, number: int, num_experts: int) -> float:
    """Share of tokens with other experts, whatever their weights."""
    if number not in one.routes or number not in other.routes:
        return 0.0
    chosen = [seen.routes[number].plan(num_experts) != 0 for seen in (one, other)]
    return float((chosen[0] != chosen[1]).any(1).float().mean())

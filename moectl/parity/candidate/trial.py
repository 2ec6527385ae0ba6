"""Finding out by running how somebody's forward wants to be called, on a small input whose sizes all differ.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moectl.parity.candidate.calls import CAUSAL_MASKS, PADDING_MASKS, Plan, arguments, parameters_of, plan_of, variants
from moectl.parity.candidate.outputs import describe, main_output, read_router, tensors_in
from moectl.parity.candidate.user_code import CandidateError, Failure, a_level, attempt
from moectl.parity.case import Inputs, Level, Unsupported
from moectl.parity.formula import Formula

BATCH, LENGTH = 3, 5
#: Outputs that should not have moved at all: room for another order of summation in float64, and for float32.
_STILL = 1e-6
ADAPTER = "An adapter's call() says how: `moectl compare-hf new-adapter` writes a template."
Call = Callable[[Plan, Inputs], Any]


def trial_inputs(level: Level, formula: Formula, dtype: torch.dtype) -> Inputs:
    """Three rows of five tokens."""
    generator = torch.Generator().manual_seed(11)
    if level == "model":
        return Inputs(input_ids=torch.randint(formula.vocab_size, (BATCH, LENGTH), generator=generator))
    hidden = torch.empty(BATCH, LENGTH, formula.experts.hidden_size, dtype=dtype)
    return Inputs(hidden=hidden.normal_(generator=generator))


def width_of(level: Level, formula: Formula) -> int:
    """The last dimension of a component's output."""
    return formula.vocab_size if level == "model" else formula.experts.hidden_size


def call_plainly(module: nn.Module, dtype: torch.dtype) -> Call:
    """A call of ``module`` as a plan says, without gradients; its failure is returned, not raised."""

    def call(plan: Plan, inputs: Inputs) -> Any:
        def action() -> Any:
            with torch.no_grad():
                return module(**arguments(plan, _copied(inputs), dtype))

        return attempt(action)

    return call


def _copied(inputs: Inputs) -> Inputs:
    copies: dict[str, Any] = {k: v.clone() for k, v in inputs._asdict().items() if isinstance(v, Tensor)}
    return inputs._replace(**copies)


def find_plan(module: nn.Module, level: Level, formula: Formula, dtype: torch.dtype) -> Plan:
    """The first way to call ``module`` that works, and the mask that does what masks are for.

    Raises:
        CandidateError: no way works; what the likeliest one raised or returned is said.
    """
    call, inputs = call_plainly(module, dtype), trial_inputs(level, formula, dtype)
    plan, tried = plan_of(module, level, formula.attention), []
    options = variants(plan, module)
    if "targets" in plan.given and level == "model":
        options += [replace(each, targets=True) for each in options]
    for option in options:
        outcome = call(option, inputs)
        if not isinstance(outcome, Failure) and _is_output(outcome, level, formula):
            break
        tried.append(outcome)
    else:
        raise _explained(module, tried[0], level, formula)
    if "mask" in option.given and level in ("model", "layer", "attention"):
        option = _with_masks(option, call, inputs, module)
    by_trying = (f"called with {option.shown}: found by trying",) if tried else ()
    return replace(option, remarks=(*by_trying, *option.remarks))


def _is_output(output: Any, level: Level, formula: Formula) -> bool:
    if level == "router":
        router = formula.router
        tokens = BATCH * LENGTH
        reading = read_router(output, tokens=tokens, num_experts=router.num_experts, top_k=router.top_k)
        return reading.chooses or reading.logits is not None
    return main_output(output, (BATCH, LENGTH), width_of(level, formula)) is not None


def _explained(module: nn.Module, outcome: Any, level: Level, formula: Formula) -> CandidateError:
    name = type(module).__name__
    if isinstance(outcome, Failure):
        takes = ", ".join(each.name for each in parameters_of(module))
        if isinstance(outcome.error, RecursionError):
            return CandidateError(f"{name}.forward never ends: {outcome}", "It calls itself: see that line.")
        if outcome.of_devices:
            return CandidateError(
                f"{name}.forward mixes devices: {outcome}",
                "MOE013: what is neither parameter nor buffer stays where it was made; register_buffer moves it.",
            )
        return CandidateError(
            f"{name}.forward({takes}) fails on [{BATCH}, {LENGTH}] tokens: {outcome}", f"Mend it. {ADAPTER}"
        )
    router = formula.router
    wanted = {
        "model": f"logits [B, S, V] = [{BATCH}, {LENGTH}, {formula.vocab_size}]",
        "router": f"weights and indices [T, K] = [{BATCH * LENGTH}, {router.top_k}], or [T, E = {router.num_experts}]",
    }.get(level, f"[B, S, D] = [{BATCH}, {LENGTH}, {formula.experts.hidden_size}]")
    return CandidateError(f"{name}.forward returns {describe(outcome)}; {a_level(level)} gives {wanted}", ADAPTER)


def _with_masks(plan: Plan, call: Call, inputs: Inputs, module: nn.Module) -> Plan:
    """Choose the form that makes it causal where it is not by itself, or else the one that hides padding."""
    if plan.causal_mask is None and (plan.level == "model" or _is_causal(plan, call, inputs)):
        return _with_padding(plan, call, inputs)
    for form in CAUSAL_MASKS:
        option = replace(plan, causal_mask=form)
        if _is_causal(option, call, inputs):
            remark = f"{plan.given['mask']}: {form}: the form that makes it causal"
            return replace(option, remarks=(*plan.remarks, remark))
    remark = f"no form of {plan.given['mask']} makes it causal"
    return _with_padding(replace(plan, remarks=(*plan.remarks, remark)), call, inputs)


def _with_padding(plan: Plan, call: Call, inputs: Inputs) -> Plan:
    runs: list[str] = []
    for form in PADDING_MASKS:
        option = replace(plan, padding_mask=form)
        hides = _hides_padding(option, call, inputs)
        if hides:
            return replace(
                option, remarks=(*plan.remarks, f"{plan.given['mask']}: {form}: the form that hides padding")
            )
        runs += [form] if hides is not None else []
    if not runs:
        return plan
    remark = f"no form of {plan.given['mask']} hides padding; it is given {runs[0]}"
    return replace(plan, padding_mask=runs[0], remarks=(*plan.remarks, remark))


def _is_causal(plan: Plan, call: Call, inputs: Inputs) -> bool:
    """Whether another last token leaves all earlier outputs as they are."""
    before, after = (_out(plan, call, each) for each in (inputs, _changed(inputs, slice(-1, None))))
    return before is not None and after is not None and _same(before[:, :-1], after[:, :-1])


def _hides_padding(plan: Plan, call: Call, inputs: Inputs) -> bool | None:
    """Whether other padding on the left leaves real tokens as they are; None where it does not run."""
    real_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real_BS[:, :2] = False
    given = inputs._replace(attention_mask=real_BS)
    before, after = (_out(plan, call, each) for each in (given, _changed(given, slice(0, 2))))
    if before is None or after is None:
        return None
    return _same(before[:, 2:], after[:, 2:])


def _changed(inputs: Inputs, where: slice) -> Inputs:
    if inputs.input_ids is not None:
        ids = inputs.input_ids.clone()
        ids[:, where] = ids[:, where] ^ 1  # another id, and within any vocabulary of even size
        return inputs._replace(input_ids=ids)
    assert inputs.hidden is not None
    hidden = inputs.hidden.clone()
    hidden[:, where] = hidden[:, where].flip(-1) * 0.5
    return inputs._replace(hidden=hidden)


def _out(plan: Plan, call: Call, inputs: Inputs) -> Tensor | None:
    try:
        outcome = call(plan, inputs)
    except Unsupported:  # this form of the call has no place for such inputs
        return None
    given: Sequence[int] = (inputs.input_ids if inputs.input_ids is not None else inputs.hidden).shape  # type: ignore[union-attr]
    width = plan_width(outcome) if plan.level == "model" else given[2]
    return None if isinstance(outcome, Failure) else main_output(outcome, (given[0], given[1]), width)


def plan_width(output: Any) -> int:
    """The last dimension of the largest tensor returned: a model's vocabulary."""
    found = [tensor for _, tensor in tensors_in(output) if tensor.dim() >= 2]
    return int(max(found, key=Tensor.numel).shape[-1]) if found else 0


def _same(first: Tensor, second: Tensor) -> bool:
    finite = bool(torch.isfinite(first).all() and torch.isfinite(second).all())
    return finite and float((first - second).abs().max()) <= _STILL * max(1.0, float(first.abs().max()))

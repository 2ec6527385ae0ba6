"""Run a formula on a component, with gradients; and a formula as one side of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, Level, Reroute, Unsupported, Weights
from moectl.parity.families import family_name, formula_of, require_level
from moectl.parity.formula import Formula
from moectl.parity.reference.attention import attention, rope_tables, who_sees_whom
from moectl.parity.reference.experts import moe
from moectl.parity.reference.model import decoder_layer, model
from moectl.parity.reference.router import router
from moectl.parity.reference.scope import Scope
from moectl.parity.tape import Tape

ChangeWeights = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
#: Persistent state that is not learned: no gradient.
_BUFFERS = ("e_score_correction_bias",)


def run(
    formula: Formula,
    weights: Weights,
    inputs: Inputs,
    *,
    level: Level,
    dtype: torch.dtype | None = None,
    training: bool = False,
    gradients: bool = False,
    reroute: Reroute | None = None,
    change_weights: ChangeWeights | None = None,
) -> Tape:
    """Compute a component by its formula.

    Args:
        weights: by canonical name; those that the formula does not use are ignored.
        inputs: a run in ``chunks`` is computed as the full forward, which it must equal.
        level: which component. A lone one counts as layer 0; its weights say whether a layer has experts.
        dtype: of the computation; None: the weights' (at least float32 where casts are exact).
        training: changes nothing: nothing random is on, and nothing here depends on it.
        gradients: record ``grad.input`` and ``grad.NAME`` of every weight (zero where it has no part), if the
            inputs hold what an objective needs.
        reroute: another side's choice of experts.
        change_weights: what the formula computes with, made of the weights; gradients are those of ``weights``.

    Raises:
        Unsupported: the family's component is not modelled, or a weight that the formula needs is not there.
    """
    require_level(formula, level)
    dtype = dtype or _dtype(formula, weights)
    with torch.set_grad_enabled(gradients):
        leaves = {name: _leaf(weight, dtype, name, gradients) for name, weight in weights.items()}
        inputs = _floats_to(inputs, dtype)
        if gradients and inputs.hidden is not None:
            inputs = inputs._replace(hidden=inputs.hidden.detach().clone().requires_grad_())
        used = leaves if change_weights is None else change_weights(dict(leaves))
        tape = Tape()
        source, objective = _RUN[level](Scope(formula, used, tape, reroute=reroute), inputs)
        if gradients and objective is not None:
            _record_gradients(tape, objective, source, leaves)
    return tape


def _dtype(formula: Formula, weights: Weights) -> torch.dtype:
    found = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    return found if formula.casts == "reference" else torch.promote_types(found, torch.float32)


def _leaf(weight: Tensor, dtype: torch.dtype, name: str, gradients: bool) -> Tensor:
    leaf = weight.detach().to(dtype)  # shares its memory with what was given, where the dtype is the same
    return leaf.requires_grad_() if gradients and not name.endswith(_BUFFERS) else leaf


def _floats_to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    changed: dict[str, Any] = {
        name: value.to(dtype)
        for name, value in inputs._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return inputs._replace(**changed)


def _run_model(scope: Scope, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    output = model(scope, inputs)
    objective = output.loss
    if objective is not None and scope.formula.balance_in_objective and output.balance_loss is not None:
        objective = objective + scope.formula.balance_coef * output.balance_loss
    return output.embeddings, objective


def _run_layer(scope: Scope, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    x_BSD = _hidden(inputs)
    has_experts = any(name.startswith("mlp.experts.") for name in scope.weights)
    scope = replace(scope, formula=replace(scope.formula, moe_layers=(0,) if has_experts else ()))
    tables = rope_tables(scope, inputs, x_BSD.dtype)
    allowed = who_sees_whom(scope.formula.attention, inputs, x_BSD)
    return x_BSD, _objective(decoder_layer(scope, x_BSD, tables, allowed)[0], inputs)


def _run_attention(scope: Scope, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    x_BSD = _hidden(inputs)
    tables = rope_tables(scope, inputs, x_BSD.dtype)
    allowed = who_sees_whom(scope.formula.attention, inputs, x_BSD)
    return x_BSD, _objective(attention(scope.inside(tape="attn."), x_BSD, tables, allowed), inputs)


def _run_moe(scope: Scope, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    x = _hidden(inputs)
    return x, _objective(moe(scope.inside(tape="mlp."), x)[0], inputs)


def _run_router(scope: Scope, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    x = _hidden(inputs)
    weights_TK, indices_TK, logits_TE = router(scope.inside(tape="mlp."), x.reshape(-1, x.shape[-1]))
    unused_TE = torch.zeros(logits_TE.shape, dtype=weights_TK.dtype, device=x.device)
    return x, _objective(unused_TE.scatter(1, indices_TK, weights_TK), inputs)


_RUN: dict[Level, Callable[[Scope, Inputs], tuple[Tensor, Tensor | None]]] = {
    "model": _run_model,
    "layer": _run_layer,
    "attention": _run_attention,
    "moe": _run_moe,
    "router": _run_router,
}


def _hidden(inputs: Inputs) -> Tensor:
    if inputs.hidden is None:
        raise Unsupported("a component alone needs hidden states, and the case has none")
    return inputs.hidden


def _objective(output: Tensor, inputs: Inputs) -> Tensor | None:
    return None if inputs.cotangent is None else (output * inputs.cotangent).sum()


def _record_gradients(tape: Tape, objective: Tensor, source: Tensor, leaves: Mapping[str, Tensor]) -> None:
    wanted = {"input": source} | {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not objective.requires_grad:  # the output depends on nothing that is learned: weights that are constant
        objective = objective + 0.0 * source.sum()
    found = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(wanted, found, strict=True):
        tape.record(f"grad.{name}", gradient)


class FormulaSubject:
    """A family's formula, or a changed one, as a side of a comparison.

    Args:
        family: name or model type.
        change: from the family's formula to the one that is computed: a hypothesis.
        change_weights: from the case's weights to those computed with; gradients stay those of the case's.
        name: how tables call it.
    """

    def __init__(
        self,
        family: str,
        change: Callable[[Formula], Formula] | None = None,
        change_weights: ChangeWeights | None = None,
        *,
        name: str = "formula",
    ) -> None:
        self.family = family_name(family)
        self.name = name
        self.change = change
        self.change_weights = change_weights

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        """See :meth:`moectl.parity.case.Subject.run`."""
        formula = formula_of(self.family, case.config)
        if self.change is not None:
            formula = self.change(formula)
        return run(
            formula,
            case.weights,
            case.inputs,
            level=case.level,
            dtype=None if case.dtype == torch.bfloat16 else case.dtype,
            training=case.training,
            gradients=case.gradients,
            reroute=reroute,
            change_weights=self.change_weights,
        )

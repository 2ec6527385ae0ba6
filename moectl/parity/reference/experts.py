"""The experts, the way of the tokens to them and back, and shared experts.

Shape suffixes: T tokens, A = T·K assignments, N rows, D hidden, E experts, K slots per token,
F expert intermediate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moectl.parity.case import Unsupported
from moectl.parity.formula import ExpertsFormula
from moectl.parity.reference.astray import ASTRAY, one_left, routed_astray
from moectl.parity.reference.numerics import gated
from moectl.parity.reference.router import router
from moectl.parity.reference.scope import Scope


def moe(scope: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
    """A Mixture-of-Experts block: ``[B, S, D]`` or ``[T, D]`` to the same shape, and the raw logits ``[T, E]``.

    Args:
        scope: of the block's weights, and of ``mlp.*`` on the tape.
    """
    rule, x_TD = scope.formula.experts, x.reshape(-1, x.shape[-1])
    weights_TK, indices_TK, logits_TE = router(scope.inside(f"{scope.formula.router_name}."), x_TD)
    output = routed(scope.inside("experts."), x_TD, weights_TK, indices_TK).reshape(x.shape)
    scope.record("routed", output)
    if rule.shared != "none":
        shared = shared_experts(scope, x)
        scope.record("shared", shared)
        output = output + shared
    scope.record("output", output)
    return output, logits_TE


def routed(scope: Scope, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
    """``Σ_e weight[t, e] · expert_e(x[t])`` over each token's own experts: ``[T, D]``."""
    rule, num_experts = scope.formula.experts, scope.formula.router.num_experts
    matrices = expert_matrices(scope)
    x_TD = scope.passed(x_TD, "expert_input")
    outputs_ETD = scope.passed(gated_experts(x_TD, matrices, rule), "expert_outputs")
    scope.record("expert_outputs", outputs_ETD.transpose(0, 1))
    if rule.offsets != "cumulative":
        return routed_by_offsets(matrices, rule, x_TD, weights_TK, indices_TK)
    if rule.combined in ASTRAY:
        return routed_astray(rule, outputs_ETD, weights_TK, indices_TK)
    if rule.combined != "added":
        weights_TK = one_left(rule, weights_TK, indices_TK)
    unused_TE = x_TD.new_zeros(len(x_TD), num_experts)
    visits_TE = unused_TE.scatter(
        1, indices_TK, within_capacity(rule, weights_TK, indices_TK, num_experts).to(x_TD.dtype)
    )
    weights_TE = unused_TE.scatter(1, indices_TK, weights_TK) * visits_TE
    if rule.applied == "output":
        return torch.einsum("te,etd->td", weights_TE, outputs_ETD)
    if rule.applied == "input":
        outputs_ETD = gated_experts(weights_TE.T[..., None] * x_TD, matrices, rule)
    return torch.einsum("te,etd->td", visits_TE, outputs_ETD)


#: ``[E, D, 2F]``, ``[E, 2F]`` or None, ``[E, F, D]``, ``[E, D]`` or None: what rows are multiplied by, and biases.
Matrices = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def expert_matrices(scope: Scope) -> Matrices:
    """The stacked weights, turned so that rows multiply from the left, in the order of ``permutation``."""
    rule, reshaped = scope.formula.experts, scope.formula.reshaped
    gate_up, down = scope.weight("gate_up_proj"), scope.weight("down_proj")
    gate_up_bias = scope.weight("gate_up_proj_bias") if rule.bias else None
    down_bias = scope.weight("down_proj_bias") if rule.bias else None
    if "gate" in reshaped or "up" in reshaped:  # one half alone, each a matrix of its own
        if rule.layout != "out_in" or rule.gate_up == "interleaved":
            raise Unsupported("gate and up are no matrices of their own in this layout")
        halves = zip(("gate", "up"), gate_up.chunk(2, dim=1), strict=True)
        gate_up_EDH = torch.cat([_turned(half, rule, role in reshaped) for role, half in halves], dim=-1)
    else:
        gate_up_EDH = _turned(gate_up, rule, "gate_up" in reshaped)
    down_EFD = _turned(down, rule, "down" in reshaped)
    if rule.permutation is not None:
        order = torch.tensor(rule.permutation, device=down.device)
        gate_up_EDH, down_EFD = gate_up_EDH[order], down_EFD[order]
        gate_up_bias = None if gate_up_bias is None else gate_up_bias[order]
        down_bias = None if down_bias is None else down_bias[order]
    return gate_up_EDH, gate_up_bias, down_EFD, down_bias


def _turned(weight: Tensor, rule: ExpertsFormula, reshaped: bool) -> Tensor:
    """``[E, in, out]`` of stacked weights: transposed where they are stored ``[E, out, in]``."""
    if reshaped:
        weight = weight.reshape(weight.shape[0], weight.shape[2], weight.shape[1])
        return weight if rule.layout == "out_in" else weight.transpose(1, 2)
    return weight.transpose(1, 2) if rule.layout == "out_in" else weight


def gated_experts(x: Tensor, matrices: Matrices, rule: ExpertsFormula) -> Tensor:
    """Every expert's ``down(act(gate(x)) · up(x))`` on rows ``[N, D]``, or on ``[E, N, D]``: ``[E, N, D]``."""
    gate_up_EDH, gate_up_bias, down_EFD, down_bias = matrices
    both_ENH = x @ gate_up_EDH
    if gate_up_bias is not None:
        both_ENH = both_ENH + gate_up_bias[:, None]
    if rule.gate_up == "interleaved":
        gate_ENF, up_ENF = both_ENH[..., 0::2], both_ENH[..., 1::2]
    else:
        gate_ENF, up_ENF = both_ENH.chunk(2, dim=-1)
    if rule.gate_up == "up_first":
        gate_ENF, up_ENF = up_ENF, gate_ENF
    output_END = gated(gate_ENF, up_ENF, rule) @ down_EFD
    return output_END if down_bias is None else output_END + down_bias[:, None]


def within_capacity(rule: ExpertsFormula, weights_TK: Tensor, indices_TK: Tensor, num_experts: int) -> Tensor:
    """Which assignments are served ``[T, K]`` bool: all, or as many per expert as it has room for."""
    served_TK = torch.ones_like(indices_TK, dtype=torch.bool)
    if rule.capacity is None:
        return served_TK
    slots = indices_TK.shape[1]
    if rule.capacity_order == "slots":
        order = torch.arange(indices_TK.numel(), device=indices_TK.device).view(-1, slots).T.flatten().tolist()
    elif rule.capacity_order == "weights":
        order = weights_TK.flatten().argsort(descending=True, stable=True).tolist()
    else:
        order = list(range(indices_TK.numel()))
    taken = [0] * num_experts
    for assignment in order:
        token, slot = divmod(assignment, slots)
        expert = int(indices_TK[token, slot])
        served_TK[token, slot] = taken[expert] < rule.capacity
        taken[expert] += 1
    return served_TK


def routed_by_offsets(
    matrices: Matrices, rule: ExpertsFormula, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor
) -> Tensor:
    """Assignments sorted by expert and cut at ``rule.offsets``, which are wrong: ``[T, D]``."""
    num_experts, num_slots = len(matrices[0]), indices_TK.shape[1]
    order_A = indices_TK.flatten().argsort(stable=True)
    token_A, weight_A = order_A // num_slots, weights_TK.flatten()[order_A]
    counts = indices_TK.flatten().bincount(minlength=num_experts).tolist()
    output_AD = x_TD.new_zeros(len(order_A), x_TD.shape[1])
    for expert in range(num_experts):
        start = counts[expert - 1] if expert else 0
        stop = counts[expert] if rule.offsets == "counts_as_ends" else start + counts[expert]
        rows = torch.arange(start, max(start, min(stop, len(order_A))), device=x_TD.device)
        if not len(rows):
            continue
        own: Matrices = tuple(None if m is None else m[expert : expert + 1] for m in matrices)  # type: ignore[assignment]
        x_ND, weight_N1 = x_TD[token_A[rows]], weight_A[rows, None]
        if rule.applied == "input":
            y_ND = gated_experts(weight_N1 * x_ND, own, rule)[0]
        else:
            y_ND = gated_experts(x_ND, own, rule)[0] * (weight_N1 if rule.applied == "output" else 1.0)
        if rule.offset_rows == "overwritten":
            output_AD = output_AD.index_copy(0, rows, y_ND)
        else:
            output_AD = output_AD.index_add(0, rows, y_ND)
    return torch.zeros_like(x_TD).index_add(0, token_A, output_AD)


def shared_experts(scope: Scope, x: Tensor) -> Tensor:
    """What every token gets besides: a dense expert, in Qwen2-MoE behind a sigmoid gate of its own."""
    if scope.formula.experts.shared == "added":
        return gated_mlp(scope.inside("shared_experts."), x)
    return torch.sigmoid(scope.linear(x, "shared_expert_gate")) * gated_mlp(scope.inside("shared_expert."), x)


def gated_mlp(scope: Scope, x: Tensor) -> Tensor:
    """The dense MLP: ``down(act(gate(x)) · up(x))``."""
    return scope.linear(
        gated(scope.linear(x, "gate_proj"), scope.linear(x, "up_proj"), scope.formula.experts), "down_proj"
    )

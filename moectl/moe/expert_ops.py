"""The expert computation as one operator: gather, two products, weighted scatter-add; and its backward.

Expert by expert, on rows gathered when their turn comes, so that what one expert needs stays in the
cache (small experts share all but the products, batch by batch); only pre-activations are kept for the
backward. The combine weight multiplies the activation and
not the output (``w · down(a) = down(w · a)``), so that its gradient needs no output to be kept. A
token's experts are summed in float32 or above.

torch sees two opaque operators, ``moectl::experts`` and ``moectl::experts_backward``, with fake
implementations: a compiled graph holds them whole, whatever the counts are. Each reads the counts on the
host before it starts, and waits for nothing after that. Shape suffixes: T tokens, D hidden, E experts,
F expert intermediate, H pre-activation columns (F, or 2F when gated), A assignments sorted by expert, N
rows of one batch, M of one expert in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moectl.moe.activations import ACTIVATIONS
from moectl.moe.batches import Batch as Batch
from moectl.moe.batches import Plan as Plan
from moectl.moe.batches import Slot as Slot
from moectl.moe.batches import Slots as Slots
from moectl.moe.batches import Weights as Weights
from moectl.moe.parallel import shares, side_by_side
from moectl.moe.products import (
    MANY_TOKENS,
    MANY_WEIGHTS,
    product_dtype,
    times,
    times_transposed,
    without_autocast,
)
from moectl.moe.router import at_least_float32

CACHED = 2**19  # elements of the widest tensor of a batch: two megabytes in float32


def compute(x_TD: Tensor, weights: Weights, plan: Plan, activation: str, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """``y [T, D]``, and with ``keep`` the pre-activations ``[N, H]`` of each batch, for :func:`differentiate`."""
    batches, dtype = plan.batches(_rows_together(x_TD, weights)), product_dtype(x_TD, training=keep)

    def run(group: list[Batch]) -> tuple[Tensor, dict[int, Tensor]]:
        y_TD, kept = torch.zeros_like(x_TD, dtype=_exact(x_TD)), {}
        for batch in group:
            pre_NH = _forward(x_TD, weights, batch, activation, dtype=dtype, y_TD=y_TD)
            if keep:
                kept[batch.experts[0]] = pre_NH.to(x_TD.dtype)
        return y_TD, kept

    with without_autocast(x_TD.device.type):
        parts = side_by_side([partial(run, group) for group in _shares(batches, weights, x_TD)])
    y_TD, kept = _sum([part[0] for part in parts]), _merged([part[1] for part in parts])
    return y_TD.to(x_TD.dtype), [kept[batch.experts[0]] for batch in batches] if keep else []


def _forward(
    x_TD: Tensor, weights: Weights, batch: Batch, activation: str, *, dtype: torch.dtype, y_TD: Tensor
) -> Tensor:
    """One batch's tokens, added to ``y``; returns the pre-activation ``[N, H]``."""
    x_ND = x_TD.index_select(0, batch.ids).to(dtype)
    pre_NH = _each(times_transposed, x_ND, weights.up, batch, weights.up_bias)
    hidden_NF = batch.weighted(ACTIVATIONS[activation].forward(at_least_float32(pre_NH)))
    out_ND = _each(times_transposed, hidden_NF.to(dtype), weights.down, batch).to(y_TD.dtype)
    if weights.down_bias is not None:
        out_ND = out_ND.addcmul_(batch.weights.to(out_ND.dtype), _rows_of(weights.down_bias, batch).to(out_ND.dtype))
    y_TD.index_add_(0, batch.ids, out_ND)
    return pre_NH


def differentiate(
    grad_TD: Tensor,
    x_TD: Tensor,
    kept: Sequence[Tensor],
    weights: Weights,
    plan: Plan,
    *,
    activation: str,
    slots: Slots,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [T, D]`` and of the combine weights ``[A]``; those of the experts go into their slots."""
    batches = plan.batches(_rows_together(x_TD, weights))
    saved = {batch.experts[0]: pre_NH for batch, pre_NH in zip(batches, kept, strict=True)}

    def run(group: list[Batch]) -> tuple[Tensor, dict[int, Tensor]]:
        grad_x_TD, found = torch.zeros_like(x_TD, dtype=_exact(x_TD)), {}
        for batch in group:
            pre_NH = saved[batch.experts[0]]
            found[batch.experts[0]] = _backward(
                grad_TD, x_TD, pre_NH, weights, batch, activation=activation, slots=slots, grad_x_TD=grad_x_TD
            )
        return grad_x_TD, found

    parts = side_by_side([partial(run, group) for group in _shares(batches, weights, x_TD)])
    _zero_idle(batches, slots)
    found = _merged([part[1] for part in parts])
    grad_weights = [found[batch.experts[0]].to(plan.weights.dtype) for batch in batches]
    return _sum([part[0] for part in parts]).to(x_TD.dtype), _padded(grad_weights, plan.weights)


def _backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    pre_NH: Tensor,
    weights: Weights,
    batch: Batch,
    *,
    activation: str,
    slots: Slots,
    grad_x_TD: Tensor,
) -> Tensor:
    """One batch's part, added to ``grad_x`` and put into the slots; returns the combine weights' gradient ``[N]``."""
    dtype = product_dtype(x_TD, training=True)
    grad_ND = grad_TD.index_select(0, batch.ids).to(dtype)
    grad_hidden_NF = at_least_float32(_each(times, grad_ND, weights.down, batch))  # of weight · activation
    weighted_NF = grad_hidden_NF if batch.whole else grad_hidden_NF * batch.weights
    hidden_NF, grad_pre_NH = ACTIVATIONS[activation].backward(at_least_float32(pre_NH), weighted_NF)
    # In place, and summed by a matrix-vector product: half the time of vecdot.
    grad_weight_N = grad_hidden_NF.mul_(hidden_NF) @ hidden_NF.new_ones(hidden_NF.shape[1])
    grad_pre_NH = grad_pre_NH.to(dtype)
    grad_x_TD.index_add_(0, batch.ids, _each(times, grad_pre_NH, weights.up, batch).to(grad_x_TD.dtype))
    if "up" in slots:
        slots["up"].put_outer(batch, grad_pre_NH, x_TD.index_select(0, batch.ids).to(dtype))
    if "down" in slots:
        slots["down"].put_outer(batch, grad_ND, batch.weighted(hidden_NF).to(dtype))
    if "up_bias" in slots:
        slots["up_bias"].put_sum(batch, at_least_float32(grad_pre_NH))
    if weights.down_bias is not None:
        exact_ND = at_least_float32(grad_ND)
        grad_weight_N += torch.linalg.vecdot(exact_ND, _rows_of(weights.down_bias, batch).to(exact_ND.dtype))
        if "down_bias" in slots:
            slots["down_bias"].put_sum(batch, exact_ND * batch.weights.to(exact_ND.dtype))
    return grad_weight_N


def _each(
    product: Callable[..., Tensor], rows: Tensor, stacked: Tensor, batch: Batch, bias: Tensor | None = None
) -> Tensor:
    """``product(rows of an expert, its matrix, its bias)``, expert by expert: ``[N, columns]`` in the rows' dtype."""
    dtype, extra = rows.dtype, [] if bias is None else [bias]
    if len(batch.experts) == 1:
        return product(rows, *(tensor[batch.experts[0]].to(dtype) for tensor in (stacked, *extra)))
    oriented = stacked.mT if product is times_transposed else stacked
    out = rows.new_empty(rows.shape[0], oriented.shape[2])
    for matrix, part, to in zip(batch.of(oriented), batch.split(rows), batch.split(out), strict=True):
        torch.mm(part, matrix.to(dtype), out=to)
    if bias is not None:
        out += _rows_of(bias, batch).to(dtype)
    return out


def _rows_of(bias: Tensor, batch: Batch) -> Tensor:
    """Each row's own expert's bias: ``[1 or N, columns]``."""
    if len(batch.experts) == 1:
        return bias[batch.experts]
    return torch.cat([bias[e].expand(size, -1) for e, size in zip(batch.experts, batch.sizes, strict=True)])


def _rows_together(x_TD: Tensor, weights: Weights) -> int:
    """How many rows small experts share a batch up to; 1, that is each for itself, where a product is a large one.

    With small experts the many calls on few numbers cost more than the products.
    """
    per_row = max(weights.up[0].numel(), weights.down[0].numel())
    if x_TD.device.type != "cpu" or per_row >= MANY_WEIGHTS:
        return 1
    return CACHED // max(weights.up.shape[1], weights.up.shape[2])


def _shares(batches: list[Batch], weights: Weights, x_TD: Tensor) -> list[list[Batch]]:
    """The batches of each core; all in one group off the CPU, and in decoding, where a row or two of every
    product leave the cores together to the memory."""
    if x_TD.device.type != "cpu" or x_TD.shape[0] < MANY_TOKENS:
        return [batches]
    per_row = weights.up[0].numel() + weights.down[0].numel()
    # Reading and writing an expert's weights costs about as much as multiplying some tens of rows with them.
    return shares(batches, [per_row * (batch.ids.numel() + 32.0 * len(batch.experts)) for batch in batches])


def _sum(parts: list[Tensor]) -> Tensor:
    """In order, so that it rounds alike in every run."""
    first, *others = parts
    for other in others:
        first.add_(other)
    return first


def _merged(parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {expert: tensor for part in parts for expert, tensor in part.items()}


def _padded(parts: list[Tensor], like: Tensor) -> Tensor:
    """The batches' rows in one tensor of the shape of ``like``; 0 in what no batch covers."""
    covered = sum(part.shape[0] for part in parts)
    return torch.cat([*parts, torch.zeros_like(like[covered:])])


def _zero_idle(batches: list[Batch], slots: Slots) -> None:
    """Zero gradients for the experts without a token, where nothing is there to be kept."""
    busy = {expert for batch in batches for expert in batch.experts}
    for slot in slots.values():
        if not slot.add:
            for expert in set(range(slot.grad.shape[0])) - busy:
                slot.grad[expert].zero_()


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    "moectl::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor token_ids, Tensor weights,"
    " Tensor tokens_per_expert, str activation, bool keep) -> (Tensor, Tensor)",
)
def experts_op(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_ids: Tensor,
    weights: Tensor,
    tokens_per_expert: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`compute` as torch sees it."""
    plan = Plan(token_ids, weights, tokens_per_expert)
    y, kept = compute(x, Weights(up, down, up_bias, down_bias), plan, activation, keep)
    return y, _padded(kept, x.new_empty(token_ids.numel() if keep else 0, up.shape[1]))


@experts_op.register_fake
def _experts_fake(x: Tensor, up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    token_ids, keep = rest[3], rest[-1]
    return torch.empty_like(x), x.new_empty(token_ids.shape[0] if keep else 0, up.shape[1])


@torch.library.custom_op(
    "moectl::experts_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor kept, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias,"
    " Tensor token_ids, Tensor weights, Tensor tokens_per_expert, str activation, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts_backward_op(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    token_ids: Tensor,
    weights: Tensor,
    tokens_per_expert: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """:func:`differentiate` as torch sees it: gradients of x, the combine weights, and the fields of
    :class:`Weights`, each empty unless ``wanted``."""
    stacked = Weights(up, down, up_bias, down_bias)
    grads = _empty_grads(stacked, wanted)
    slots = {name: Slot(grads[name], add=False) for name, want in zip(Weights._fields, wanted, strict=True) if want}
    plan = Plan(token_ids, weights, tokens_per_expert)
    sizes = [batch.ids.numel() for batch in plan.batches(_rows_together(x, stacked))]
    parts = kept[: sum(sizes)].split(sizes) if sizes else ()
    grad_x, grad_weights = differentiate(grad, x, parts, stacked, plan, activation=activation, slots=slots)
    return grad_x, grad_weights, *grads.values()


@experts_backward_op.register_fake
def _experts_backward_fake(grad: Tensor, x: Tensor, kept: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stacked, weights, wanted = Weights(*rest[:4]), rest[5], rest[-1]
    return torch.empty_like(x), torch.empty_like(weights), *_empty_grads(stacked, wanted).values()


def _empty_grads(stacked: Weights, wanted: list[bool]) -> dict[str, Tensor]:
    """Uninitialised gradients, without elements where none is wanted."""
    return {
        name: torch.empty_like(tensor, memory_format=torch.contiguous_format) if want else stacked.up.new_empty(0)
        for (name, tensor), want in zip(stacked._asdict().items(), wanted, strict=True)
    }


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, keep = inputs
    assert keep, "a gradient was asked for, but nothing was kept for it"
    ctx.save_for_backward(*tensors, output[1])


def _op_backward(ctx: Any, grad: Tensor, _grad_kept: Tensor) -> tuple[Any, ...]:
    x, up, down, up_bias, down_bias, token_ids, weights, tokens_per_expert, kept = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[1:5])
    grad_x, grad_weights, *grads = experts_backward_op(
        grad, x, kept, up, down, up_bias, down_bias, token_ids, weights, tokens_per_expert, ctx.activation, wanted
    )
    grads = [found if want else None for found, want in zip(grads, wanted, strict=True)]
    return grad_x, *grads, None, grad_weights, None, None, None


experts_op.register_autograd(_op_backward, setup_context=_save_for_backward)

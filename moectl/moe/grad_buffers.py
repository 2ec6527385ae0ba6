"""Weight gradients of experts straight into buffers that live on from step to step.

An ordinary backward allocates the gradient of every expert anew. On a CPU the fresh pages cost more
than twice what writing into known ones does, and autograd may add them to ``.grad`` in one more pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moectl.moe.expert_ops import Plan, Slot, Weights, compute, differentiate


class GradBuffers:
    """One gradient buffer per stacked parameter.

    A backward writes into the buffer and makes it the parameter's ``.grad`` where that is None, and
    adds to ``.grad`` where it is not: ``zero_grad``, clipping, accumulation over micro-batches and
    optimizers see what they always see. A gradient that someone still holds after ``zero_grad`` stays
    theirs: the next backward takes another buffer. ``torch.autograd.grad`` sees no gradient for these
    parameters, ``backward(inputs=...)`` does not leave them out, and hooks on them do not run:
    parameters with hooks take the ordinary way.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}  # nobody else has these tensors; ``.grad`` gets another view of each

    def __deepcopy__(self, memo: dict[int, Any]) -> GradBuffers:
        """A copy has its own gradients."""
        return GradBuffers()

    def __getstate__(self) -> dict[str, Any]:
        return {"_buffers": {}}

    def slots(self, parameters: Weights, needed: Sequence[bool]) -> dict[str, Slot]:
        """Where gradients go now, of those parameters that ``needed`` one in the forward and still require it."""
        found = {}
        for (name, parameter), need in zip(parameters._asdict().items(), needed, strict=True):
            if not need or not parameter.requires_grad:
                continue
            if parameter.grad is not None:
                found[name] = Slot(parameter.grad, add=True)
            else:
                parameter.grad = self._buffer(name, parameter).detach()
                found[name] = Slot(parameter.grad, add=False)
        return found

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The buffer of this name, or a fresh one if it does not fit or someone holds on to its memory."""
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or (buffer.shape, buffer.dtype, buffer.device) != (like.shape, _grad_dtype(like), like.device)
            or _holders(buffer) > 1
        ):
            exact = _grad_dtype(like)
            buffer = torch.empty_like(like, dtype=exact, requires_grad=False, memory_format=torch.contiguous_format)
            self._buffers[name] = buffer
        return buffer


def _grad_dtype(parameter: Tensor) -> torch.dtype:
    """Of the parameter's gradient: float32 where a low-precision one is to be summed over micro-batches."""
    return parameter.grad_dtype or parameter.dtype


def _holders(tensor: Tensor) -> int:
    """How many tensors share this one's memory, itself included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1  # without ``storage``


def takes_buffers(parameters: Weights) -> bool:
    """Whether gradients may go past autograd: plain leaves, without hooks, not while compiling."""
    return not torch.compiler.is_compiling() and all(
        type(parameter) is nn.Parameter
        and not parameter._backward_hooks
        and not getattr(parameter, "_post_accumulate_grad_hooks", None)
        for parameter in parameters
        if parameter is not None
    )


class ComputeIntoBuffers(torch.autograd.Function):
    """The operator of :mod:`moectl.moe.expert_ops`, its weight gradients written into :class:`GradBuffers`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, activation: str, buffers: GradBuffers, *tensors: Tensor) -> Tensor:
        """``tensors``: the combine weights and the fields of :class:`Weights`, given one by one for autograd to see."""
        weights_A, *parameters = tensors
        y, kept = compute(x, Weights(*parameters), plan._replace(weights=weights_A), activation, keep=True)
        ctx.save_for_backward(x, plan.token_ids, plan.tokens_per_expert, *tensors, *kept)
        ctx.activation, ctx.buffers = activation, buffers
        # Under activation checkpointing the saved ones come back as copies, and what has a .grad is the parameter.
        ctx.parameters = Weights(*parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, token_ids, tokens_per_expert, weights_A, *saved = ctx.saved_tensors
        fields = len(Weights._fields)
        parameters, kept = Weights(*saved[:fields]), saved[fields:]
        needed = ctx.needs_input_grad[-fields:]
        grad_x, grad_weights = differentiate(
            grad,
            x,
            kept,
            parameters,
            Plan(token_ids, weights_A, tokens_per_expert),
            activation=ctx.activation,
            slots=ctx.buffers.slots(ctx.parameters, needed),
        )
        return grad_x, None, None, None, grad_weights, *[None] * fields

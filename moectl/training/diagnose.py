"""Where a number stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moectl.corpus.loader import Batch
from moectl.errors import ConfigError, MoectlError
from moectl.models.decoder import Decoder
from moectl.training.runtime import precision_context


def not_finite(
    model: Decoder, batches: Sequence[Batch], loss: float, grad_norm: Tensor, precision: str = "float32"
) -> str | None:
    """None when loss and gradient norm are finite; else a sentence that names the layer that went first.

    To be asked before gradients are clipped: clipping by a norm that is NaN makes all of them NaN.
    """
    if not math.isfinite(loss):
        with precision_context(precision, grad_norm.device):
            where = _first_bad_output(model, batches)
        return f"the loss is {loss}: {where or 'no layer output is, so the loss itself overflowed'}"
    if not bool(torch.isfinite(grad_norm)):
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        # Gradients flow backwards: the last in model order is where it began.
        return f"the gradient norm is {float(grad_norm)}: it began at {bad[-1] if bad else 'the sum of all parameters'}"
    return None


def refuse_untrainable(model: Decoder) -> None:
    """Raise for a router that must not be trained, with the reason.

    Raises:
        ConfigError: the gate would get no language-model gradient, ties every token, or sees later tokens.
    """
    for number, layer in model.moe_layers().items():
        problem = layer.router.training_problem()
        if problem is None and not layer.router.causal:
            problem = "it lets later tokens change earlier outputs, which a causal language model cannot have"
        if problem is not None:
            raise ConfigError(f"the router of layer {number} cannot be trained: {problem}")


def refuse_not_finite(model: nn.Module, step: int) -> None:
    """Raise before weights that are not finite reach a checkpoint.

    Raises:
        MoectlError: naming the first such parameter or buffer.
    """
    for name, tensor in model.state_dict().items():
        if not _finite(tensor):
            raise MoectlError(
                f"{name} is not finite at step {step}: no checkpoint written, the last good one stays",
                "Lower optim.lr, or lengthen optim.warmup_steps.",
            )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _first_bad_output(model: Decoder, batches: Sequence[Batch]) -> str | None:
    """Run the step's batches again and watch every module that has no children, and every layer."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not _finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch.input_ids[:, :-1], doc_ids=batch.doc_ids[:, :-1])
                if found:
                    return f"{found[0]} is the first output that is not finite"
    finally:
        for handle in handles:
            handle.remove()
    return None

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
from moectl.moe.types import RouterOutput
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


def refuse_untrainable(model: Decoder, allow_noncausal: bool = False) -> None:
    """Raise for a layer that must not be trained, with the reason.

    Args:
        model: its MoE layers are asked.
        allow_noncausal: let pass what lets later tokens change earlier outputs.

    Raises:
        ConfigError: the gate would get no language-model gradient, ties every token, or sees later tokens.
    """
    for number, layer in model.moe_layers().items():
        problem = layer.router.training_problem()
        if problem is not None:
            raise ConfigError(f"the router of layer {number} cannot be trained: {problem}")
        if not (layer.causal or allow_noncausal):
            who = "its capacity, filled in order of probability," if layer.router.causal else layer.router.label
            instead = "moe.capacity.fill: position" if layer.router.causal else "a causal router"
            raise ConfigError(
                f"layer {number} cannot be trained: {who} lets later tokens change earlier outputs, which a causal"
                " language model cannot have",
                f"Use {instead}, or --allow-noncausal: every metric of the run is then marked as non-causal.",
            )


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


def _bad_field(routing: RouterOutput) -> str | None:
    """The first field that is not finite; of the others than the weights NaN alone is bad (a logit may be -inf)."""
    for name, field in zip(routing._fields, routing, strict=True):
        if field is None or not field.is_floating_point():
            continue
        if bool(field.isnan().any()) or (name == "topk_weights" and not _finite(field)):
            return name
    return None


def _first_bad_output(model: Decoder, batches: Sequence[Batch]) -> str | None:
    """Run the step's batches again and watch every module that has no children, and every layer."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found:
                return
            if isinstance(output, Tensor) and not _finite(output):
                found.append(name)
            elif isinstance(output, RouterOutput) and (bad := _bad_field(output)):
                found.append(f"{name}, {bad}")

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

"""What must not be trained, and where a number stopped being finite.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moectl.corpus.loader import Batch
from moectl.errors import ConfigError, MoectlError
from moectl.models.language_model import LanguageModel
from moectl.moe.causality import first_leak
from moectl.moe.router import Router
from moectl.moe.types import RouterOutput


def not_finite(
    model: LanguageModel,
    batches: Sequence[Batch],
    loss: float,
    grad_norm: float,
    *,
    context: AbstractContextManager[object] | None = None,
) -> str | None:
    """None when loss and gradient norm are finite; else a sentence that names the layer that went first.

    To be asked before gradients are clipped: clipping by a norm that is NaN makes all of them NaN.

    Args:
        batches: of the step, which are run again when the loss is not finite.
        context: that the step was computed in, such as autocast.
    """
    if not math.isfinite(loss):
        with context or nullcontext():
            where = _first_bad_output(model, batches)
        return f"the loss is {loss}: {where or 'no layer output is, so the loss itself overflowed'}"
    if not math.isfinite(grad_norm):
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        # Gradients flow backwards: the last in model order is where it began.
        return f"the gradient norm is {grad_norm}: it began at {bad[-1] if bad else 'the sum of all parameters'}"
    return None


def refuse_untrainable(model: LanguageModel, allow_noncausal: bool = False) -> None:
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


@torch.no_grad()
def refuse_false_claims(number: int, router: Router) -> None:
    """Raise where ``router`` is not what it declares to be: causal, and taught by the language-model loss.

    Tries copies of it on random tokens, as the contract's checks do, for who never ran those. The
    generators are drawn from.

    Args:
        number: of its layer.
        router: at the start of training; it is not changed.

    Raises:
        ConfigError: it declares ``causal = True`` and a later token changed an earlier route, or its
            combine weights have no graph that leads to the gate.
    """
    tokens_BSD = torch.randn(4, 16, router.hidden_size, device=router.weight.device)
    try:
        copy_of = copy.deepcopy(router).train()
    except (TypeError, RuntimeError):  # it holds what cannot be copied: there is nothing to try
        return
    leak = first_leak(_CombineWeights(copy_of), tokens_BSD, trials=12) if router.causal else None
    if leak is not None:
        raise ConfigError(
            f"{router.label} declares causal = True, but {leak}",
            "Let no token's route depend on later ones, or declare causal = False and train with --allow-noncausal.",
        )
    with torch.enable_grad():
        weights = copy_of(tokens_BSD).topk_weights
    if router.learns and router.weight.requires_grad and not weights.requires_grad:
        raise ConfigError(
            f"the router of layer {number} cannot be trained: its combine weights are constants, so that the gate gets"
            " no language-model gradient",
            "Keep the graph of topk_weights, or declare learns = False.",
        )


class _CombineWeights(nn.Module):
    """A router as a layer whose output is its combine weights, for the probe of whole layers."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        out = self.router(x)
        return torch.zeros_like(out.router_logits).scatter_add(1, out.topk_indices, out.topk_weights)


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


def _first_bad_output(model: LanguageModel, batches: Sequence[Batch]) -> str | None:
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

"""Activation checkpointing of layers with experts: what a second forward pass must leave as it was.

A checkpointed layer keeps its input alone, and computes the rest again in the backward pass (Chen et al. 2016,
arXiv:1604.06174). torch replays the generators, so that noise and routes are the same; what routers count on the
side in a forward pass must not be counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moectl.moe.layer import MoELayer


def checkpointed(layer: nn.Module, *inputs: object) -> Tensor:
    """``layer(*inputs)``, its activations made again in the backward pass."""
    if torch.compiler.is_compiling():  # the compiler takes no context of ours, and sees no side effect twice
        output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    else:
        output = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts([layer]))
    return output


def contexts(
    modules: Sequence[nn.Module],
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """torch's ``context_fn``: nothing around the first pass, and around the second all MoE layers in ``modules`` keep
    their records, and their routers' tensors, as the first has left them."""
    layers = [part for module in modules for part in module.modules() if isinstance(part, MoELayer)]
    return lambda: (nullcontext(), _undisturbed(layers))


@contextmanager
def _undisturbed(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Within, routers work on copies of their buffers and of other tensors that they hold; parameters stay."""
    kept = [(layer, layer.routing, layer.token_mask, layer.dropped) for layer in layers]
    held = [(holder, dict(holder)) for layer in layers for part in layer.router.modules() for holder in _holders(part)]
    try:
        with torch.no_grad():
            for holder, before in held:
                holder.update({name: t.clone() for name, t in before.items() if isinstance(t, Tensor)})
        yield
    finally:
        for holder, before in held:
            holder.update(before)
        for layer, routing, token_mask, dropped in kept:
            layer.routing, layer.token_mask, layer.dropped = routing, token_mask, dropped


def _holders(module: nn.Module) -> list[dict[str, object]]:
    """Where a module keeps tensors that are no parameters."""
    return [module._buffers, module.__dict__]

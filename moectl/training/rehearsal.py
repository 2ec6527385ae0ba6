"""A forward pass that leaves no trace: the first of two passes, and the first look at a router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moectl.training.rng import restore_rng, rng_state


@contextmanager
def rehearsal(model: nn.Module) -> Iterator[None]:
    """Within, in the model's own mode, without gradients. Afterwards generators and buffers are as before.

    What runs next therefore draws the same noise, and takes the same routes, as what ran within.
    """
    drawn = rng_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        restore_rng(drawn)

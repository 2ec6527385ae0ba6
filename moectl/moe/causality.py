"""Does a token's output depend on later tokens? The probe changes them, and compares what comes before.

A language model with such a layer sees what it is to predict, and its training loss means nothing.
Routers and capacities declare whether they are causal; this finds out.
Shape suffixes: B batch, S sequence, N = B·S tokens in the order in which a layer flattens them, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELATIVE = 1e-9  # of the largest output; in float64, rounding is at 1e-15 and whatever depends on a token is far above


@dataclass(frozen=True)
class Leak:
    """An output that changed although no token up to it did.

    Attributes:
        position: the first such output, as an index into the flattened tokens.
        changed_from: the first token that was changed; all from there on were.
        size: the largest change among the outputs before ``changed_from``.
        mode: ``training`` or ``eval`` (for a callable that is no module too).
    """

    position: int
    changed_from: int
    size: float
    mode: str

    def __str__(self) -> str:
        return (
            f"in {self.mode} mode the output at token {self.position} changed by up to {self.size:.2g}"
            f" when only tokens from {self.changed_from} on were changed"
        )


def first_leak(
    layer: Callable[..., Tensor],
    x: Tensor,
    *,
    token_mask: Tensor | None = None,
    trials: int = 24,
    seed: int = 0,
) -> Leak | None:
    """Look for an output that depends on a later token; None when no trial found one.

    "Later" is meant in the order in which ``[B, S]`` is flattened: a whole sequence comes after the
    one before it. Capacity filled by position depends on other sequences in this way, on no token's
    own future. Everything runs in float64, on copies of ``layer``, with the same random numbers on
    both sides of a comparison, in training mode and in eval mode, half of the trials each.

    Args:
        layer: a module or any callable, ``[*, D] -> [*, D]``, such as :class:`moectl.moe.MoELayer`
            with its capacity set. Called as ``layer(x)``, or ``layer(x, token_mask)`` with a mask.
        x: ``[B, S, D]`` or ``[N, D]``, at least two tokens; it is not changed. More tokens than
            the experts have room for make a probe of capacity sharper.
        token_mask: ``[B, S]`` or ``[N]`` bool, real tokens. The mask is part of both sides.
        trials: how many changes to try.
        seed: of positions, changes and the layer's own noise.

    Raises:
        ValueError: fewer than two tokens.
    """
    tokens = x.shape[:-1].numel()
    if tokens < 2:
        raise ValueError(f"the probe needs two tokens or more, got {tokens}")
    start_ND = x.detach().to(torch.float64).reshape(tokens, -1)
    generator = torch.Generator().manual_seed(seed)
    modes = ("training", "eval") if isinstance(layer, nn.Module) else ("eval",)
    for trial in range(trials):
        cut = int(torch.randint(1, tokens, (), generator=generator))
        changed_ND = start_ND.clone()
        changed_ND[cut:] = _CHANGES[trial // len(modes) % len(_CHANGES)](start_ND, cut, generator)
        mode = modes[trial % len(modes)]
        outputs = [_run(layer, rows, x.shape, token_mask, mode, seed + trial) for rows in (start_ND, changed_ND)]
        before, after = (output.detach().reshape(tokens, -1)[:cut] for output in outputs)
        leaked = _difference(before, after) > RELATIVE * before.nan_to_num().abs().max().clamp(min=1e-30)
        if leaked.any():
            size = float(_difference(before, after).max())
            return Leak(int(leaked.any(1).nonzero()[0]), cut, size, mode)
    return None


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """Absolute difference; NaN on both sides is none, on one side an infinite one."""
    both = before.isnan() & after.isnan()
    return (before - after).abs().nan_to_num(nan=float("inf")).masked_fill(both, 0.0)


def _run(
    layer: Callable[..., Tensor], rows: Tensor, shape: torch.Size, token_mask: Tensor | None, mode: str, seed: int
) -> Tensor:
    """One call of a fresh float64 copy: a layer that keeps statistics of its calls must not bring them along."""
    if isinstance(layer, nn.Module):
        layer = copy.deepcopy(layer).to(torch.float64).train(mode == "training")
    with torch.no_grad(), _seeded(rows, seed):
        x = rows.reshape(shape)
        return layer(x) if token_mask is None else layer(x, token_mask)


@contextmanager
def _seeded(like: Tensor, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        torch.manual_seed(seed)
        yield


# --- what becomes of the later tokens


def _redrawn(x_ND: Tensor, cut: int, generator: torch.Generator) -> Tensor:
    """Other tokens of the same size."""
    drawn = torch.randn(x_ND[cut:].shape, generator=generator, dtype=torch.float64).to(x_ND.device)
    return drawn * x_ND.std().nan_to_num(1.0).clamp(min=1e-3)


def _crowding(x_ND: Tensor, cut: int, generator: torch.Generator) -> Tensor:
    """All want what one earlier token wants, and want it more: what pushes that token out, if anything does."""
    rival = int(torch.randint(0, cut, (), generator=generator))
    return 3.0 * x_ND[rival].expand_as(x_ND[cut:])


def _louder(x_ND: Tensor, cut: int, generator: torch.Generator) -> Tensor:
    """The same tokens, ten times larger: the same experts with more conviction."""
    return 10.0 * x_ND[cut:]


_CHANGES = (_crowding, _redrawn, _louder)

"""A candidate's tensors in the tape's shapes.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, H heads, P head dimension, E experts.
"""

from __future__ import annotations

from torch import Tensor

#: What was learned of a tensor's orientation where all sizes differ, for cases in which they do not.
Orientations = dict[str, str]


def as_sequence(tensor: Tensor, leading: tuple[int, int]) -> Tensor | None:
    """``[B, S, *]`` from that or from ``[T, *]``; more dimensions are flattened into the last."""
    batch, length = leading
    if tensor.dim() >= 3 and tensor.shape[:2] == (batch, length):
        return tensor.reshape(batch, length, -1)
    if tensor.dim() >= 2 and tensor.shape[0] == batch * length:
        return tensor.reshape(batch, length, -1)
    return None


def as_heads(
    tensor: Tensor, leading: tuple[int, int], heads: int, head_dim: int, *, key: str, known: Orientations
) -> Tensor | None:
    """``[B, H, S, P]`` from ``[B, S, H·P]``, ``[T, H·P]``, ``[B, S, H, P]`` or itself; None where it is no such."""
    batch, length = leading
    if tensor.numel() != batch * length * heads * head_dim:
        return None
    if tensor.dim() in (2, 3) and tensor.shape[-1] == heads * head_dim:
        return tensor.reshape(batch, length, heads, head_dim).transpose(1, 2)
    if tensor.dim() != 4 or tensor.shape[-1] != head_dim:
        return None
    first, second = (
        tuple(tensor.shape) == (batch, length, heads, head_dim),
        tuple(tensor.shape) == (batch, heads, length, head_dim),
    )
    if first != second:
        known.setdefault(key, "sequence first" if first else "heads first")
    elif not first or key not in known:
        return None
    return tensor.transpose(1, 2) if known[key] == "sequence first" else tensor


def unrepeated(tensor: Tensor, heads: int, groups: int) -> Tensor | None:
    """``[B, G, S, P]`` from keys that were repeated to ``[B, H, S, P]``, in either order; None where they were not."""
    if tensor.shape[1] == groups:
        return tensor
    if tensor.shape[1] != heads or heads % groups:
        return None
    batch, _, length, head_dim = tensor.shape
    grouped = tensor.reshape(batch, groups, heads // groups, length, head_dim)
    if bool((grouped == grouped[:, :, :1]).all()):
        return grouped[:, :, 0]
    tiled = tensor.reshape(batch, heads // groups, groups, length, head_dim)
    return tiled[:, 0] if bool((tiled == tiled[:, :1]).all()) else None


def as_rope_table(tensor: Tensor, leading: tuple[int, int], head_dim: int) -> Tensor | None:
    """``[B, S, P]`` from that, ``[S, P]``, ``[1, S, P]`` or with a dimension of one for the heads."""
    batch, length = leading
    if tensor.shape[-1] != head_dim or tensor.is_complex():
        return None
    squeezed = tensor.reshape(
        [size for place, size in enumerate(tensor.shape) if size != 1 or place >= tensor.dim() - 1]
    )
    if length == 1:
        squeezed = squeezed.reshape(-1, 1, head_dim)
        return squeezed.expand(batch, 1, head_dim) if len(squeezed) in (1, batch) else None
    if tuple(squeezed.shape) == (length, head_dim):
        return squeezed.expand(batch, length, head_dim)
    return squeezed if tuple(squeezed.shape) == (batch, length, head_dim) else None

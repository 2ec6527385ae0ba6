"""Dense MLP weights into stacked expert weights: pure tensor code, any family.

Sparse Upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stack_copies(
    dense: dict[str, Tensor],
    num_experts: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """``num_experts`` copies of each tensor, stacked on a new first dimension.

    Args:
        dense: one expert's tensors in the stacked layout's names (``gate_up_proj [2F, D]``, ...).
        num_experts: ``E``.
        noise: Gaussian noise in units of each tensor's own standard deviation; 0 keeps exact copies.
        generator: where the noise comes from (a CPU generator).

    Raises:
        ValueError: ``noise`` is negative.
    """
    if noise < 0:
        raise ValueError(f"init_noise must be >= 0, not {noise}")
    stacked = {}
    for name, tensor in dense.items():
        copies = tensor.detach().unsqueeze(0).repeat(num_experts, *[1] * tensor.dim())
        if noise > 0 and tensor.numel() > 1:
            scale = noise * tensor.detach().float().std()
            drawn = torch.randn(copies.shape, generator=generator, dtype=torch.float32)
            copies = copies + (scale * drawn.to(copies.device)).to(copies.dtype)
        stacked[name] = copies
    return stacked

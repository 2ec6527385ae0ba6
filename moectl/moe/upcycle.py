"""Dense MLP weights into stacked expert weights: pure tensor code, any family.

Copies: Sparse Upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055. Parts of the dense MLP in virtual
groups: He et al. 2024, arXiv:2410.07524. Redrawn neurons: Drop-Upcycling, Nakamura et al. 2025,
arXiv:2502.19261.

A layout is one MLP's tensors under the names of the stacked parameters, without their first dimension:
``gate_up_proj [2F, D]`` and ``down_proj [D, F]``, or ``up_proj [F, D]``, ``up_proj_bias [F]``,
``down_proj [D, F]`` and ``down_proj_bias [D]``. Shape suffixes: D hidden, E experts, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Layout = dict[str, Tensor]


class SplitLayer(NamedTuple):
    """What :func:`split_neurons` makes.

    Attributes:
        experts: stacked, ``E`` of them.
        shared: one layout of the shared experts together; None where there are none.
    """

    experts: Layout
    shared: Layout | None


def stack_copies(
    dense: Layout,
    num_experts: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Layout:
    """``num_experts`` copies of each tensor, stacked on a new first dimension.

    Args:
        dense: one expert's layout.
        num_experts: ``E``.
        noise: Gaussian noise in units of each tensor's own standard deviation; 0 keeps exact copies.
        generator: where the noise comes from (a CPU generator).

    Raises:
        ValueError: ``noise`` is negative.
    """
    return _with_noise(stack_experts([dense] * num_experts), dense, noise, generator)


def stack_experts(experts: Sequence[Layout]) -> Layout:
    """Several MLPs of one shape, stacked in their order.

    Raises:
        ValueError: they differ in names or shapes.
    """
    first, *others = experts
    for number, other in enumerate(others, start=1):
        if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in other.items()}:
            raise ValueError(f"expert {number} has other tensors or shapes than expert 0")
    stacked = {}
    for name, tensor in first.items():
        same = all(each[name] is tensor for each in others)
        if same:  # written once, E times as fast
            stacked[name] = tensor.detach().unsqueeze(0).repeat(len(experts), *[1] * tensor.dim())
        else:
            stacked[name] = torch.stack([each[name].detach().to(tensor) for each in experts])
    return stacked


def split_neurons(
    dense: Layout,
    num_experts: int,
    *,
    granularity: int,
    top_k: int,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> SplitLayer:
    """Experts that are parts of the dense MLP, in groups of ``top_k``: each, with the shared experts, all of it.

    The neurons are dealt at random into ``G = granularity`` parts. The last ``G - top_k`` parts belong to
    the shared experts, which always compute, as the dense MLP did. The others are dealt anew for every
    group of ``top_k`` experts. With gate rows that tie within a group (:func:`group_rows`) a token starts in
    one whole group, in whichever order: how ties are broken, and by how many units in the last place rows that
    tie differ after all, is of no matter. Combined with equal weights ``1 / top_k``, and ``down_proj`` larger
    by ``top_k``, they and the shared experts are the dense MLP. Every routed expert keeps the whole
    ``down_proj_bias``, for the weights sum to one; the shared ones have none.

    Args:
        dense: one expert's layout, ``F`` neurons.
        num_experts: ``E``, a multiple of ``top_k``.
        granularity: ``G``; divides ``F``.
        top_k: routed experts per token, at most ``G``.
        noise: as for :func:`stack_copies`, on the routed experts, in units of their own matrices.
        generator: a CPU generator: how neurons are dealt, then the noise.

    Raises:
        ValueError: numbers that do not divide, or ``top_k`` outside of 1 to ``G``.
    """
    neurons = count_neurons(dense)
    if neurons % granularity or not 1 <= top_k <= granularity or num_experts % top_k:
        raise ValueError(
            f"granularity {granularity} must divide {neurons} neurons, and top_k {top_k} must be 1 to {granularity} and"
            f" divide {num_experts} experts"
        )
    size = neurons // granularity
    dealt_F = torch.randperm(neurons, generator=generator)
    routed_F, shared_F = dealt_F[: top_k * size], dealt_F[top_k * size :]
    parts: list[Tensor] = []
    for _ in range(num_experts // top_k):
        parts += routed_F[torch.randperm(len(routed_F), generator=generator)].split(size)
    layouts = [take_neurons(dense, part) for part in parts]
    for layout in layouts:
        layout["down_proj"] = layout["down_proj"] * top_k
    scaled = {**dense, "down_proj": dense["down_proj"].detach().float() * top_k}
    stacked = _with_noise(stack_experts(layouts), scaled, noise, generator)
    if not len(shared_F):
        return SplitLayer(stacked, None)
    shared = take_neurons(dense, shared_F)
    if "down_proj_bias" in shared:
        shared["down_proj_bias"] = torch.zeros_like(shared["down_proj_bias"])
    return SplitLayer(stacked, shared)


def group_rows(rows_ED: Tensor, size: int) -> Tensor:
    """Gate rows ``[E, D]`` that tie within groups of ``size`` experts: each group's first row for all of them."""
    return rows_ED.detach()[::size].repeat_interleave(size, dim=0)


def redraw_neurons(
    dense: Layout, num_experts: int, *, ratio: float, generator: torch.Generator | None = None
) -> Layout:
    """Copies in which other neurons are drawn anew for each expert.

    A neuron is one row of gate and up (and of ``up_proj_bias``) and one column of down. Its new weights come
    from a normal distribution with the mean and the standard deviation of the matrix that they belong to;
    gate and up count as two. ``down_proj_bias`` belongs to no neuron and stays.

    Args:
        ratio: share of the neurons, rounded to whole ones; 0 copies, 1 draws every expert anew.
        generator: a CPU generator.

    Raises:
        ValueError: ``ratio`` is not within 0 and 1.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"drop_ratio must be within 0 and 1, not {ratio}")
    neurons = count_neurons(dense)
    stacked = stack_copies(dense, num_experts)
    for expert in range(num_experts):
        dropped_F = torch.randperm(neurons, generator=generator)[: round(ratio * neurons)]
        for name, tensor in stacked.items():
            if name == "gate_up_proj":
                for matrix, part in zip(dense[name].chunk(2), tensor[expert].chunk(2), strict=True):
                    part[dropped_F] = _drawn_like(matrix, (len(dropped_F), matrix.shape[1]), generator)
            elif name == "down_proj":
                tensor[expert][:, dropped_F] = _drawn_like(dense[name], (tensor.shape[1], len(dropped_F)), generator)
            elif name != "down_proj_bias":
                tensor[expert][dropped_F] = _drawn_like(dense[name], (len(dropped_F), *tensor.shape[2:]), generator)
    return stacked


def take_neurons(dense: Layout, neurons_F: Tensor) -> Layout:
    """The MLP of some of the neurons; ``down_proj_bias`` whole."""
    taken = {}
    for name, tensor in dense.items():
        chosen = neurons_F.to(tensor.device)
        if name == "gate_up_proj":
            taken[name] = torch.cat([part[chosen] for part in tensor.detach().chunk(2)])
        elif name == "down_proj":
            taken[name] = tensor.detach()[:, chosen]
        else:
            taken[name] = tensor.detach().clone() if name == "down_proj_bias" else tensor.detach()[chosen]
    return taken


def count_neurons(dense: Layout) -> int:
    """``F``."""
    return dense["down_proj"].shape[1]


def hidden_rows(means_ED: Tensor) -> Tensor:
    """Gate rows from the mean hidden state of each expert's own texts: what tells it from the others, of length one.

    The mean over experts is taken away, for it says nothing about which; a normed hidden state then gives logits
    of order one.
    Source of the idea: mergekit's ``gate_mode: hidden`` (Goddard et al. 2024, arXiv:2403.13257).

    Raises:
        ValueError: two experts' hidden states are the same, so that nothing tells them apart.
    """
    centred_ED = means_ED - means_ED.mean(0)
    lengths_E = torch.linalg.vector_norm(centred_ED, dim=1)
    if not bool((torch.pdist(means_ED) > 1e-6 * means_ED.abs().max()).all()):
        raise ValueError("two experts' texts have the same hidden states: nothing tells the experts apart")
    return centred_ED / lengths_E.clamp(min=torch.finfo(lengths_E.dtype).tiny)[:, None]


def _with_noise(stacked: Layout, dense: Layout, noise: float, generator: torch.Generator | None) -> Layout:
    if noise < 0:
        raise ValueError(f"init_noise must be >= 0, not {noise}")
    if noise == 0:
        return stacked
    noisy = {}
    for name, tensor in stacked.items():
        noisy[name] = tensor
        if dense[name].numel() > 1:
            scale = noise * dense[name].detach().float().std()
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            noisy[name] = tensor + (scale * drawn.to(tensor.device)).to(tensor.dtype)
    return noisy


def _drawn_like(matrix: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    exact = matrix.detach().to(torch.float64)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix.device)
    deviation = exact.std() if exact.numel() > 1 else exact.new_zeros(())
    return (exact.mean() + deviation * drawn).to(matrix.dtype)

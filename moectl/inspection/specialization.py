"""Does the expert depend on the domain? Information between the two, and the permutation null.

``NMI = I(domain; expert) / sqrt(H(domain) · H(expert))``, 0 when either entropy is 0, over counts
of kept assignments, in nats. OLMoE (arXiv 2409.02060) published counts that give 0.045, 0.109 and
0.136 in layers 0, 7 and 15. The number alone proves nothing: an untrained gate reaches 0.1-0.3 on
a trained model, because domains differ in vocabulary (`random_router` measures that).

Everything rests on counts per group, ``[G, E]``: a domain label belongs to a whole group (a play,
a file, a template), so shuffling and resampling need never touch single tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ROUNDING = 1e-12  # sums over the same counts in another order differ by less
_CHUNK = 8_000_000  # elements of one temporary array


class GroupCounts(NamedTuple):
    """Assignments per group and expert, with each group's domain.

    Attributes:
        counts: ``[G, E]`` kept assignments.
        domains: ``[G]`` domain index of each group, in ``[0, num_domains)``.
        num_domains: how many domains there are.
    """

    counts: Ints
    domains: Ints
    num_domains: int

    def by_domain(self) -> Ints:
        """``[domains, E]`` counts."""
        return np.asarray(one_hot(self.domains, self.num_domains).T @ self.counts.astype(np.float64), np.int64)


class PermutationTest(NamedTuple):
    """An observed NMI beside the NMIs under shuffled domain labels.

    Attributes:
        statistic: the observed NMI.
        null: ``[draws]`` NMI of each shuffle.
        p_value: ``(1 + number of shuffles that reach the statistic) / (1 + draws)``.
    """

    statistic: float
    null: Floats
    p_value: float


def one_hot(labels: Ints, size: int) -> Floats:
    """``[..., size]`` indicator of each label."""
    return np.asarray(labels[..., None] == np.arange(size), dtype=np.float64)


def entropy(counts: ArrayLike, axis: int = -1) -> Any:
    """Entropy in nats of counts (or shares) along ``axis``; 0 for no counts at all."""
    table = _table(counts)
    total = table.sum(axis=axis, keepdims=True)
    shares = np.divide(table, total, out=np.zeros_like(table), where=total > 0)
    return np.maximum(-_xlogx(shares).sum(axis=axis), 0.0)


def mutual_information(counts: ArrayLike) -> Any:
    """I(domain; expert) in nats of counts ``[..., domains, experts]``, never below 0."""
    table = _table(counts)
    joint = entropy(table.reshape(*table.shape[:-2], -1))
    return np.maximum(entropy(table.sum(-1)) + entropy(table.sum(-2)) - joint, 0.0)


def nmi(counts: ArrayLike) -> Any:
    """NMI of each table in ``counts [..., domains, experts]``: an array of shape ``[...]``."""
    table = _table(counts)
    scale = np.asarray(np.sqrt(entropy(table.sum(-1)) * entropy(table.sum(-2))))
    information = np.asarray(mutual_information(table))
    # Rounding leaves an "entropy" of about 1e-16 where all counts are in one row or column.
    informative = scale > _ROUNDING
    return np.minimum(np.divide(information, scale, out=np.zeros_like(scale), where=informative), 1.0)


def normalized_mutual_information(counts: ArrayLike) -> float:
    """NMI between domain and expert of one table of counts.

    Args:
        counts: ``[domains, experts]``, non-negative: assignments of each domain to each expert.

    Returns:
        A number in [0, 1]; 0 when all counts are in one domain or in one expert, or there are none.

    Raises:
        ValueError: for another rank, and for negative or non-finite counts.
    """
    table = _table(counts)
    if table.ndim != 2:
        raise ValueError(f"counts must have the shape [domains, experts], not {list(table.shape)}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("counts must be finite and not negative")
    return float(nmi(table))


def count_by_group(experts: ArrayLike, domains: ArrayLike, groups: ArrayLike, num_experts: int) -> GroupCounts:
    """Counts per group and expert from tokens.

    Args:
        experts: ``[T]`` or ``[T, K]`` chosen experts; a negative number is an unused slot.
        domains: ``[T]`` domain of each token, any integers or strings.
        groups: ``[T]`` group of each token; a group belongs to one domain.
        num_experts: ``E``.

    Raises:
        ValueError: shapes that do not fit, an expert that is not below ``E``, a group in two domains.
    """
    chosen, domain_T, group_T = _array(experts), _array(domains), _array(groups)
    chosen = chosen[:, None] if chosen.ndim == 1 else chosen
    if chosen.ndim != 2 or domain_T.shape != chosen.shape[:1] or group_T.shape != domain_T.shape:
        raise ValueError(
            f"experts [T] or [T, K], domains [T] and groups [T] do not fit: {list(np.shape(experts))}, "
            f"{list(domain_T.shape)}, {list(group_T.shape)}"
        )
    if chosen.size and chosen.max() >= num_experts:
        raise ValueError(f"expert {chosen.max()} is not below num_experts = {num_experts}")
    domain_names, domain_ids = np.unique(domain_T, return_inverse=True)
    group_names, first, group_ids = np.unique(group_T, return_index=True, return_inverse=True)
    domain_of_group = domain_ids[first]
    mixed = np.flatnonzero(domain_of_group[group_ids] != domain_ids)
    if mixed.size:
        raise ValueError(
            f"group {group_T[mixed[0]]} lies in two domains; labels are shuffled by group, so give each "
            "domain groups of its own"
        )
    slots = group_ids[:, None] * num_experts + chosen
    flat = np.bincount(slots[chosen >= 0], minlength=len(group_names) * num_experts)
    return GroupCounts(flat.reshape(-1, num_experts).astype(np.int64), domain_of_group, len(domain_names))


def permutation_null(grouped: GroupCounts, draws: int = 1000, seed: int = 0) -> Floats:
    """``[draws]`` NMI after shuffling the domain labels over the groups."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    generator = np.random.default_rng(seed)
    counts = grouped.counts.astype(np.float64)
    null = np.empty(draws)
    step = max(1, _CHUNK // max(1, counts.shape[0] * grouped.num_domains))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        labels = generator.permuted(np.broadcast_to(grouped.domains, (size, len(grouped.domains))), axis=1)
        tables = np.stack([(labels == domain) @ counts for domain in range(grouped.num_domains)], axis=1)
        null[start : start + size] = nmi(tables)
    return null


def permutation_test_of_groups(grouped: GroupCounts, draws: int = 1000, seed: int = 0) -> PermutationTest:
    """`permutation_test` for counts that are already made."""
    statistic = float(nmi(grouped.by_domain()))
    null = permutation_null(grouped, draws, seed)
    reached = int((null >= statistic - _ROUNDING).sum())
    return PermutationTest(statistic, null, (1 + reached) / (1 + draws))


def permutation_test(
    experts: ArrayLike, domains: ArrayLike, groups: ArrayLike, num_experts: int, draws: int = 1000, seed: int = 0
) -> PermutationTest:
    """Is the NMI more than chance? Domain labels are shuffled over whole groups.

    Shuffling single tokens would call any difference between two plays a difference of domains.
    The smallest p-value that ``draws`` shuffles can give is ``1 / (draws + 1)``; few groups give
    few different shuffles, and then no small p-value at all.

    Args:
        experts: ``[T]`` or ``[T, K]`` chosen experts; a negative number is an unused slot.
        domains: ``[T]`` domain of each token.
        groups: ``[T]`` group of each token; a group belongs to one domain.
        num_experts: ``E``.
        draws: number of shuffles.
        seed: of the shuffles.

    Raises:
        ValueError: shapes that do not fit, an expert that is not below ``E``, a group in two domains.
    """
    return permutation_test_of_groups(count_by_group(experts, domains, groups, num_experts), draws, seed)


def _xlogx(shares: Floats) -> Floats:
    return np.asarray(shares * np.log(np.where(shares > 0, shares, 1.0)))


def _array(values: Any) -> NDArray[Any]:
    """An array of anything array-like; a torch tensor is detached and brought to the CPU."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _table(counts: Any) -> Floats:
    return np.asarray(_array(counts), dtype=np.float64)

"""One layer's NMI beside its three references, each with what it takes to be above it.

(a) permutation: domain labels shuffled by group; (b) random router: freshly drawn gates on the
same hidden states; (c) step 0: the same model before training. Intervals are bootstraps by group.

"Above" is asked strictly: for (a) above the null's 95th percentile; for (b) and (c) the whole 95 %
interval of the difference lies above zero, where value and reference are computed on the same
resampled groups: for (b) the difference to the 95th percentile of the gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moectl.inspection.specialization import (
    GroupCounts,
    entropy,
    mutual_information,
    nmi,
    permutation_test_of_groups,
)
from moectl.resampling import Interval, centred_interval, group_weights, smallest_stratum

Floats = NDArray[np.float64]
_CHUNK = 6_000_000  # elements of one temporary array
_PERCENTILE = 0.95


@dataclass(frozen=True)
class Reference:
    """One thing the NMI is held against.

    Attributes:
        value: what has to be exceeded: a null's 95th percentile, or the value at step 0.
        margin: NMI minus ``value``.
        interval: 95 % of the margin by bootstrap over groups; None for the permutation null, and
            where a domain has a single group.
        exceeded: whether the NMI counts as above it.
        draws, mean, maximum, p_value: of a null's draws; None at step 0.
    """

    value: float
    margin: float
    interval: Interval | None
    exceeded: bool
    draws: int | None = None
    mean: float | None = None
    maximum: float | None = None
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON; a null's ``value`` appears as ``p95``."""
        common = {"margin": self.margin, "margin_interval": _pair(self.interval), "exceeded": self.exceeded}
        if self.draws is None:
            return {"value": self.value, **common}
        null = {"draws": self.draws, "mean": self.mean, "p95": self.value, "max": self.maximum, "p_value": self.p_value}
        return {**null, **common}


@dataclass(frozen=True)
class Specialization:
    """NMI of one layer, its parts and its references. ``step0`` is None when there is no such checkpoint."""

    value: float
    interval: Interval | None
    mutual_information: float
    domain_entropy: float
    expert_entropy: float
    null_permutation: Reference
    null_random_router: Reference
    step0: Reference | None

    @property
    def references(self) -> dict[str, Reference]:
        """Those that there are, by their name in JSON."""
        named = {"null_permutation": self.null_permutation, "null_random_router": self.null_random_router}
        return named if self.step0 is None else {**named, "step0": self.step0}

    @property
    def strongest(self) -> str:
        """The name of the highest reference."""
        return max(self.references, key=lambda name: self.references[name].value)

    @property
    def exceeds_all(self) -> bool:
        """Above all three references; never without a value at step 0."""
        return self.step0 is not None and all(reference.exceeded for reference in self.references.values())

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "value": self.value,
            "interval": _pair(self.interval),
            "mutual_information": self.mutual_information,
            "domain_entropy": self.domain_entropy,
            "expert_entropy": self.expert_entropy,
            "null_permutation": self.null_permutation.to_dict(),
            "null_random_router": self.null_random_router.to_dict(),
            "step0": None if self.step0 is None else self.step0.to_dict(),
            "strongest_reference": self.strongest,
            "exceeds_all": self.exceeds_all,
        }


def specialization(
    observed: GroupCounts,
    gates: NDArray[np.int64],
    step0: GroupCounts | None,
    *,
    permutations: int = 1000,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Specialization:
    """NMI of one layer beside its references.

    Args:
        observed: kept assignments ``[G, E]`` of the trained router.
        gates: ``[R, G, E]`` of the random gates on the same hidden states.
        step0: of the model before training, on the same groups, or None.
        permutations: shuffles of the domain labels.
        bootstrap: resamples of the groups.
        seed: of shuffles and resamples.
    """
    table = observed.by_domain()
    test = permutation_test_of_groups(observed, permutations, seed)
    value = test.statistic
    gate_values = nmi(_tables(gates, observed))
    groups = smallest_stratum(observed.domains)
    weights = group_weights(observed.domains, bootstrap, seed) if groups > 1 else None

    resampled = None if weights is None else _resampled(observed.counts[None], observed, weights)[:, 0]
    gates_p95 = float(np.quantile(gate_values, _PERCENTILE))
    resampled_p95 = None if weights is None else np.quantile(_resampled(gates, observed, weights), _PERCENTILE, axis=1)
    permutation_p95 = float(np.quantile(test.null, _PERCENTILE))
    return Specialization(
        value=value,
        interval=None if resampled is None else _clipped(centred_interval(value, resampled, groups)),
        mutual_information=float(mutual_information(table)),
        domain_entropy=float(entropy(table.sum(1))),
        expert_entropy=float(entropy(table.sum(0))),
        null_permutation=Reference(
            value=permutation_p95,
            margin=value - permutation_p95,
            interval=None,
            exceeded=value > permutation_p95,
            draws=permutations,
            mean=float(test.null.mean()),
            maximum=float(test.null.max()),
            p_value=test.p_value,
        ),
        null_random_router=_reference(
            value,
            gates_p95,
            resampled,
            resampled_p95,
            groups,
            draws=len(gate_values),
            mean=float(gate_values.mean()),
            maximum=float(gate_values.max()),
            p_value=float((1 + (gate_values >= value).sum()) / (1 + len(gate_values))),
        ),
        step0=None if step0 is None else _against_step0(value, step0, resampled, weights),
    )


def _against_step0(value: float, step0: GroupCounts, resampled: Floats | None, weights: Floats | None) -> Reference:
    start = float(nmi(step0.by_domain()))
    again = None if weights is None else _resampled(step0.counts[None], step0, weights)[:, 0]
    return _reference(value, start, resampled, again, smallest_stratum(step0.domains))


def _reference(
    value: float, reference: float, resampled: Floats | None, again: Floats | None, groups: int, **null: Any
) -> Reference:
    margin = value - reference
    if resampled is None or again is None:
        return Reference(reference, margin, None, False, **null)
    interval = centred_interval(margin, resampled - again, groups)
    return Reference(reference, margin, interval, interval.low > 0, **null)


def _tables(counts_RGE: NDArray[np.int64], like: GroupCounts) -> Floats:
    """``[R, domains, E]`` from ``[R, G, E]``."""
    members = [counts_RGE[:, like.domains == domain].sum(axis=1) for domain in range(like.num_domains)]
    return np.stack(members, axis=1).astype(np.float64)


def _resampled(counts_RGE: NDArray[np.int64], like: GroupCounts, weights_BG: Floats) -> Floats:
    """``[B, R]`` NMI of each of R tables in each of B bootstrap samples of the groups."""
    draws, groups, experts = counts_RGE.shape
    flat = counts_RGE.transpose(1, 0, 2).reshape(groups, draws * experts).astype(np.float64)
    result = np.empty((len(weights_BG), draws))
    step = max(1, _CHUNK // (draws * experts * like.num_domains))
    for start in range(0, len(weights_BG), step):
        piece = weights_BG[start : start + step]
        tables = [
            (piece[:, like.domains == domain] @ flat[like.domains == domain]).reshape(-1, draws, experts)
            for domain in range(like.num_domains)
        ]
        result[start : start + step] = nmi(np.stack(tables, axis=2))
    return result


def _clipped(interval: Interval) -> Interval:
    return Interval(max(interval.low, 0.0), min(interval.high, 1.0))


def _pair(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]

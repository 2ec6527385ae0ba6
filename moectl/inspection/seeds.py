"""Did specialisation emerge? The one question that needs several seeds.

"Emerged" means, over at least three seeds: the whole 95 % t interval of the margin over the
strongest reference lies above zero, and every seed's own run is above all three references (its
interval by group included). From fewer seeds only what was measured is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moectl.errors import ConfigError
from moectl.inspection.nulls import Specialization
from moectl.inspection.routing import RoutingReport
from moectl.resampling import Interval
from moectl.runs.intervals import mean_interval

MINIMUM_SEEDS = 3


@dataclass(frozen=True)
class LayerVerdict:
    """One layer over several seeds.

    Attributes:
        layer: its number.
        values: NMI of each seed.
        margins: NMI minus the strongest of the three references, for each seed.
        mean, interval: of the margins; 95 % t interval over seeds, None from one seed.
        above_all: how many seeds' own runs are above all three references.
        emerged: whether at least three seeds say so; None when that cannot be said.
        unknown: why it cannot: one domain, too few seeds, or no value at step 0; else None.
    """

    layer: int
    values: tuple[float, ...]
    margins: tuple[float, ...]
    mean: float
    interval: Interval | None
    above_all: int
    emerged: bool | None
    unknown: str | None

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "layer": self.layer,
            "nmi": list(self.values),
            "margin_over_strongest_reference": list(self.margins),
            "margin_mean": self.mean,
            "margin_interval": None if self.interval is None else list(self.interval),
            "seeds": len(self.values),
            "seeds_above_all": self.above_all,
            "emerged": self.emerged,
            "unknown": self.unknown,
        }


def over_seeds(reports: Sequence[RoutingReport]) -> list[LayerVerdict]:
    """A verdict for each layer from runs that differ in nothing but their seed, in order of depth.

    Raises:
        ConfigError: no report, or runs whose MoE layers are not the same.
    """
    by_run = [{layer.layer: layer.nmi for layer in report.layers} for report in reports]
    if not by_run:
        raise ConfigError("there is no run to judge", "Name at least one run.")
    if any(run.keys() != by_run[0].keys() for run in by_run):
        raise ConfigError(
            "the runs have their MoE layers in different places", "Compare runs of one configuration and several seeds."
        )
    domains = len(reports[0].domain_names)
    return [_verdict(layer, [run[layer] for run in by_run], domains) for layer in sorted(by_run[0])]


def _verdict(layer: int, seeds: Sequence[Specialization], domains: int) -> LayerVerdict:
    margins = tuple(nmi.value - nmi.references[nmi.strongest].value for nmi in seeds)
    spread = mean_interval(margins)
    known = spread.low is not None and spread.high is not None
    interval = Interval(spread.low, spread.high) if known else None  # type: ignore[arg-type]
    above_all = sum(nmi.exceeds_all for nmi in seeds)
    unknown = _unknown(seeds, domains)
    emerged = interval is not None and interval.low > 0 and above_all == len(seeds)
    return LayerVerdict(
        layer=layer,
        values=tuple(nmi.value for nmi in seeds),
        margins=margins,
        mean=spread.mean,
        interval=interval,
        above_all=above_all,
        emerged=emerged if unknown is None else None,
        unknown=unknown,
    )


def _unknown(seeds: Sequence[Specialization], domains: int) -> str | None:
    if domains < 2:
        return "one domain"
    if len(seeds) < MINIMUM_SEEDS:
        return f"not from {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return "no step 0" if any(nmi.step0 is None for nmi in seeds) else None

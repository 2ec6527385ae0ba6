"""Did specialisation emerge? The one question that needs several seeds.

"Emerged" means above all three references, with an interval, over at least three seeds.
From fewer, only what was measured is said.
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
        emerged: whether at least three seeds say so; None when there are fewer, or no value at step 0.
    """

    layer: int
    values: tuple[float, ...]
    margins: tuple[float, ...]
    mean: float
    interval: Interval | None
    emerged: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "layer": self.layer,
            "nmi": list(self.values),
            "margin_over_strongest_reference": list(self.margins),
            "margin_mean": self.mean,
            "margin_interval": None if self.interval is None else list(self.interval),
            "seeds": len(self.values),
            "emerged": self.emerged,
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
    return [_verdict(layer, [run[layer] for run in by_run]) for layer in sorted(by_run[0])]


def _verdict(layer: int, seeds: Sequence[Specialization]) -> LayerVerdict:
    margins = tuple(nmi.value - nmi.references[nmi.strongest].value for nmi in seeds)
    spread = mean_interval(margins)
    known = spread.low is not None and spread.high is not None
    interval = Interval(spread.low, spread.high) if known else None  # type: ignore[arg-type]
    enough = len(seeds) >= MINIMUM_SEEDS and all(nmi.step0 is not None for nmi in seeds)
    emerged = enough and interval is not None and interval.low > 0
    return LayerVerdict(
        layer, tuple(nmi.value for nmi in seeds), margins, spread.mean, interval, emerged if enough else None
    )

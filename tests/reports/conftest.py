"""Routing reports over drawn counts; every statistic in them is computed, none is made up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moectl.inspection.nulls import specialization
from moectl.inspection.routing import InspectSettings, LayerReport, LoadReport, RoutingReport
from moectl.inspection.specialization import GroupCounts

NAMES = ("code", "math", "prose", "law", "news")


def draw_layer(number: int, experts: int, domains: int, *, with_step0: bool) -> LayerReport:
    rng = np.random.default_rng(number)
    labels = np.arange(6 * domains) % domains
    favourite = rng.dirichlet(np.full(experts, 1.0), size=domains)

    def counts(strength: float) -> np.ndarray:
        rows = [(1 - strength) / experts + strength * favourite[domain] for domain in labels]
        return np.stack([rng.multinomial(300, row) for row in rows])

    observed = GroupCounts(counts(0.2 * (number + 1) / 2), labels, domains)
    gates = np.stack([counts(0.1) for _ in range(20)])
    start = GroupCounts(counts(0.0), labels, domains) if with_step0 else None
    nmi = specialization(observed, gates, start, permutations=50, bootstrap=50)
    table = observed.by_domain()
    loads = {name: LoadReport(table[index], int(table[index].sum()), 1.5) for index, name in enumerate(NAMES[:domains])}
    load = LoadReport(table.sum(0), int(table.sum()), 1.5)
    return LayerReport(number, "Top1Router", experts, 1, load, loads, 1.0 + number / 10, nmi)


@pytest.fixture
def make_report() -> Callable[..., RoutingReport]:
    def make(layers: int = 3, experts: int = 8, domains: int = 3, with_step0: bool = True) -> RoutingReport:
        drawn = [draw_layer(number, experts, domains, with_step0=with_step0) for number in range(layers)]
        return RoutingReport(
            layers=tuple(sorted(drawn, key=lambda layer: -layer.load.load_cv)),
            domain_names=NAMES[:domains],
            tokens=drawn[0].load.tokens,
            groups=dict.fromkeys(NAMES[:domains], 6),
            settings=InspectSettings(permutations=50, gates=20, bootstrap=50),
            notes=("Few groups.",),
        )

    return make

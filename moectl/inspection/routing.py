"""What ``moectl inspect routing`` says about one run: statistics per layer and domain, and the NMI.

Layers are never pooled, and the worst balanced layer comes first: an average over layers hides a
collapsed one. Worst is by load CV: the Switch value is 1.0 whenever the probabilities are uniform,
however the choices pile up. Shape suffixes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moectl.corpus.loader import PackedDataset
from moectl.inspection.collect import LayerTrace, RoutingTrace, collect, moe_layers, token_groups
from moectl.inspection.nulls import Specialization, specialization
from moectl.inspection.random_router import RandomGates
from moectl.marks import marks_of
from moectl.moe import stats

MINIMUM_GATES = 100


@dataclass(frozen=True)
class InspectSettings:
    """How much to draw. ``gates`` below 100 is less than a verdict asks for."""

    permutations: int = 1000
    gates: int = MINIMUM_GATES
    bootstrap: int = 1000
    seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True)
class LoadReport:
    """The load of some tokens (a layer's, or one domain's in it).

    Attributes:
        counts: ``[E]`` kept assignments.
        tokens: how many tokens.
        entropy: mean entropy of the clean router distribution, nats; uniform is ln E.
    """

    counts: NDArray[np.int64]
    tokens: int
    entropy: float

    @property
    def shares(self) -> list[float]:
        """Share of each expert among the kept assignments; uniform is 1/E."""
        return [float(share) for share in stats.shares(self._counts)]

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load; 0 when balanced."""
        return stats.load_cv(self._counts)

    @property
    def max_share(self) -> float:
        """Share of the busiest expert."""
        return stats.max_share(self._counts)

    @property
    def dead_experts(self) -> list[int]:
        """Experts that none of these tokens chose."""
        return stats.dead_experts(self._counts)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "tokens": self.tokens,
            "counts": [int(count) for count in self.counts],
            "shares": self.shares,
            "load_cv": self.load_cv,
            "max_share": self.max_share,
            "dead_experts": self.dead_experts,
            "effective_experts": stats.effective_experts(self._counts),
            "entropy": self.entropy,
        }

    @property
    def _counts(self) -> Tensor:
        return torch.from_numpy(self.counts)


@dataclass(frozen=True)
class LayerReport:
    """One layer: the load over all tokens and by domain, the balance value, the NMI.

    Loads count what the router chose; ``dropped`` is how many of each expert's assignments a capacity
    then dropped, None where evaluation is dropless.
    """

    layer: int
    router: str
    num_experts: int
    top_k: int
    load: LoadReport
    domains: dict[str, LoadReport]
    balance: float
    nmi: Specialization
    dropped: tuple[int, ...] | None = None

    @property
    def dropped_fraction(self) -> float | None:
        """Share of the assignments that a capacity in evaluation dropped; None where the layer is dropless."""
        if self.dropped is None:
            return None
        return sum(self.dropped) / max(int(self.load.counts.sum()), 1)

    @property
    def collapse_value(self) -> float:
        """The balance value when the same k experts take everything: E/k. Balanced is 1.0."""
        return stats.collapse_value(self.num_experts, self.top_k)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "layer": self.layer,
            "router": self.router,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            **self.load.to_dict(),
            "entropy_uniform": math.log(self.num_experts),
            "balance": {"value": self.balance, "balanced": 1.0, "collapse": self.collapse_value},
            "dropped": None if self.dropped is None else list(self.dropped),
            "dropped_fraction": self.dropped_fraction,
            "domains": {name: report.to_dict() for name, report in self.domains.items()},
            "nmi": self.nmi.to_dict(),
        }


@dataclass(frozen=True)
class RoutingReport:
    """All layers of one run, the worst balanced first.

    Attributes:
        layers: sorted by load CV, the worst first.
        groups: how many groups of each domain the intervals and the permutation null rest on.
        notes: what limits the numbers, in words.
        marks: the model's own, which every number here must be read with.
    """

    layers: tuple[LayerReport, ...]
    domain_names: tuple[str, ...]
    tokens: int
    groups: dict[str, int]
    settings: InspectSettings
    notes: tuple[str, ...]
    marks: tuple[str, ...] = ()

    def by_depth(self) -> list[LayerReport]:
        """The layers from the model's input to its output."""
        return sorted(self.layers, key=lambda layer: layer.layer)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "split": "eval",
            "marks": list(self.marks),
            "tokens": self.tokens,
            "domains": list(self.domain_names),
            "groups": self.groups,
            "permutations": self.settings.permutations,
            "random_gates": self.settings.gates,
            "bootstrap_samples": self.settings.bootstrap,
            "seed": self.settings.seed,
            "worst_layer": self.layers[0].layer,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }


def inspect_routing(
    model: Any, dataset: PackedDataset, *, step0: Any | None = None, settings: InspectSettings | None = None
) -> RoutingReport:
    """Statistics of the routing on the whole held-out split.

    Args:
        model: the trained model, with MoE layers.
        dataset: what it was trained on; its ``eval`` split is read.
        step0: the same model before training; without it no layer can count as above all references.
        settings: how much to draw.

    Raises:
        ConfigError: the model has no MoE layers.
        MoectlError: the held-out split is empty.
    """
    settings = settings or InspectSettings()
    groups = token_groups(dataset)
    gates = {
        number: RandomGates(
            layer.router, draws=settings.gates, num_groups=len(groups.domains), seed=settings.seed + number
        )
        for number, layer in moe_layers(model).items()
    }

    def draw(number: int, x_TD: Tensor, group_T: Tensor, mask_T: Tensor | None) -> None:
        gates[number].update(x_TD, group_T, mask_T)

    trace = collect(model, dataset, batch_size=settings.batch_size, groups=groups, observer=draw)
    start = None if step0 is None else collect(step0, dataset, batch_size=settings.batch_size, groups=groups)
    layers = [
        _layer_report(trace, number, gates[number].counts.cpu().numpy(), start, settings) for number in trace.layers
    ]
    sizes = np.bincount(groups.domains, minlength=len(dataset.domains))
    named = {name: int(size) for name, size in zip(dataset.domains, sizes, strict=True)}
    return RoutingReport(
        layers=tuple(sorted(layers, key=lambda layer: -layer.load.load_cv)),
        domain_names=tuple(dataset.domains),
        tokens=trace.num_tokens,
        groups=named,
        settings=settings,
        notes=tuple(_notes(named, settings, step0 is not None)),
        marks=marks_of(model),
    )


def _layer_report(
    trace: RoutingTrace,
    number: int,
    gates: NDArray[np.int64],
    start: RoutingTrace | None,
    settings: InspectSettings,
) -> LayerReport:
    layer = trace.layers[number]
    observed = trace.group_counts(number)
    by_domain = observed.by_domain()
    domains = {
        name: _load(layer, by_domain[index], trace.token_domains == index)
        for index, name in enumerate(trace.domain_names)
    }
    load = _load(layer, by_domain.sum(0), torch.ones(trace.num_tokens, dtype=torch.bool))
    return LayerReport(
        layer=number,
        router=layer.router,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        load=load,
        domains=domains,
        balance=stats.balance_value(torch.from_numpy(load.counts), layer.probs.double().mean(0)),
        nmi=specialization(
            observed,
            gates,
            None if start is None else start.group_counts(number),
            permutations=settings.permutations,
            bootstrap=settings.bootstrap,
            seed=settings.seed,
        ),
        dropped=None if layer.dropped is None else tuple(int(count) for count in layer.dropped),
    )


def _load(layer: LayerTrace, counts: NDArray[np.int64], tokens_T: Tensor) -> LoadReport:
    entropy_T = layer.entropy[tokens_T].double()
    return LoadReport(counts, int(tokens_T.sum()), float(entropy_T.mean()) if entropy_T.numel() else 0.0)


def _notes(groups: dict[str, int], settings: InspectSettings, has_step0: bool) -> list[str]:
    notes = []
    if len(groups) < 2:
        notes.append("One domain: there is nothing to specialise on; the NMI is 0 by definition.")
    few = [f"{name} ({size})" for name, size in groups.items() if size < 10]
    if few:
        notes.append(
            f"Fewer than 10 held-out groups in {', '.join(few)}: intervals and the permutation null are coarse."
        )
    if min(groups.values()) < 2:
        notes.append("A domain with one held-out group gives no interval: nothing counts as above its references.")
    if not has_step0:
        notes.append("There is no checkpoint of step 0, so the value before training is unknown.")
    if settings.gates < MINIMUM_GATES:
        notes.append(f"{settings.gates} random gates are fewer than the {MINIMUM_GATES} that the null asks for.")
    return notes

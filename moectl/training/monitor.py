"""What the experts get between two checks: counts by layer, domain and expert, and whether a layer collapses.

Shape suffixes: N domains, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moectl.config.schema import CollapseConfig
from moectl.moe.layer import MoELayer
from moectl.training.collapse import CollapseDetector, Finding
from moectl.training.routing import StepRouting


class RoutingMonitor:
    """Counts since the last check, on the CPU; part of a checkpoint, so that a resumed run checks alike.

    Args:
        layers: MoE layers by layer number; none for a dense model.
        domains: names of the dataset's domains.
        collapse: when a layer counts as collapsed.
    """

    def __init__(self, layers: Mapping[int, MoELayer], domains: Sequence[str], collapse: CollapseConfig) -> None:
        self.layers, self.domains = layers, list(domains)
        self.detector = CollapseDetector(collapse)
        self.tokens = 0
        self.counts_NE = {
            number: torch.zeros(len(self.domains), layer.router.num_experts, dtype=torch.int64)
            for number, layer in layers.items()
        }

    def add(self, routing: StepRouting, tokens: int) -> None:
        """Add one optimizer step that routed ``tokens`` tokens."""
        for number, step in routing.steps.items():
            self.counts_NE[number] += step.counts_NE.cpu()
        self.tokens += tokens

    def check(self) -> tuple[list[Finding], dict[str, Any]]:
        """Findings since the last check, worst first, and the counts for the record; then counting starts anew."""
        top_k = next(iter(self.layers.values())).router.top_k
        findings = self.detector.check({n: c.sum(0) for n, c in self.counts_NE.items()}, self.tokens, top_k)
        payload = {
            "tokens": self.tokens,
            "domains": self.domains,
            "layers": {str(number): {"counts": counts.tolist()} for number, counts in self.counts_NE.items()},
        }
        for counts in self.counts_NE.values():
            counts.zero_()
        self.tokens = 0
        return findings, payload

    def tensors(self) -> dict[str, Tensor]:
        """The counts, by name, for a checkpoint."""
        return {f"layer.{number}": counts for number, counts in self.counts_NE.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "collapse": self.detector.state_dict()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's state and tensors."""
        self.tokens = state["tokens"]
        self.detector.load_state_dict(state["collapse"])
        for number, counts in self.counts_NE.items():
            counts.copy_(tensors[f"layer.{number}"])

"""What the experts get between two checks: counts by layer, domain and expert, and whether a layer collapses.

Shape suffixes: N domains, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moectl.config.guards import CollapseConfig
from moectl.errors import CheckError
from moectl.moe.layer import MoELayer
from moectl.training.collapse import CollapseDetector, Finding
from moectl.training.pairs import PairWatch
from moectl.training.routing import StepRouting

LARGE_LOGIT = 10.0
"""A mean |logit| above this is warned of: the softmax is then all but a hard choice, and its gradient all but zero."""


@dataclass(frozen=True)
class LargeLogits:
    """A layer whose router logits have grown too large."""

    layer: int
    logit_abs: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer}: the router's mean |logit| is {self.logit_abs:.1f}, above {LARGE_LOGIT:g}: its softmax"
            " saturates, and the gate all but stops learning. Raise moe.z_coef, or set moe.router.logit_clamp."
        )


@dataclass(frozen=True)
class Check:
    """One check of the routing since the last one.

    Attributes:
        findings: layers in trouble, worst first.
        large_logits: layers whose logits are too large, each said once in a run.
        counts: per layer ``[E]`` assignments since the last check.
        payload: all numbers, for the record.
    """

    findings: list[Finding]
    large_logits: list[LargeLogits]
    counts: dict[int, Tensor]
    payload: dict[str, Any]

    def events(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Each as the run's record takes it: kind, sentence, details."""
        for finding in self.findings:
            details = {"layer": finding.layer, "expert": finding.expert, "taxon": finding.kind}
            yield "collapse" if finding.collapsed else "imbalance", str(finding), details
        for large in self.large_logits:
            yield "router_logits", str(large), {"layer": large.layer}


class RoutingMonitor:
    """Counts since the last check; part of a checkpoint, so that a resumed run checks alike.

    They are where the layers are: adding to them waits for nothing.

    Args:
        layers: MoE layers by layer number; none for a dense model.
        domains: names of the dataset's domains.
        collapse: when a layer counts as collapsed.
    """

    def __init__(self, layers: Mapping[int, MoELayer], domains: Sequence[str], collapse: CollapseConfig) -> None:
        self.layers, self.domains = layers, list(domains)
        self.detector = CollapseDetector(collapse, layers)
        self.pairs = PairWatch(collapse, layers)
        #: Which experts the last step's tokens chose together, by layer ``[E, E]``; None where it was not counted.
        self.together: dict[int, Tensor | None] = {}
        self.tokens = 0
        self.warned: set[int] = set()
        self.counts_NE = {
            number: torch.zeros(
                len(self.domains), layer.router.num_experts, dtype=torch.int64, device=layer.router.weight.device
            )
            for number, layer in layers.items()
        }
        #: Mean |logit| summed over tokens, and assignments dropped; per layer, since the last check.
        self.logit_abs = {
            n: torch.zeros_like(counts[0, 0], dtype=torch.float64) for n, counts in self.counts_NE.items()
        }
        self.dropped = {n: torch.zeros_like(counts[0, 0]) for n, counts in self.counts_NE.items()}

    def add(self, routing: StepRouting, tokens: int) -> None:
        """Add one optimizer step that routed ``tokens`` tokens."""
        for number, step in routing.steps.items():
            self.counts_NE[number] += step.counts_NE
            self.logit_abs[number] += step.logit_abs
            if step.dropped is not None:
                self.dropped[number] += step.dropped
            self.together[number] = step.together_EE
        self.tokens += tokens

    def check(self) -> Check:
        """What is to be said about the time since the last check; then counting starts anew."""
        counts = {number: counts_NE.sum(0).cpu() for number, counts_NE in self.counts_NE.items()}
        experts_choose = {number for number, layer in self.layers.items() if not layer.router.token_choice}
        pairs = {number: self.pairs.check(number, self.together.get(number)) for number in self.layers}
        found = {number: pair for number, pair in pairs.items() if pair is not None}
        findings = self.detector.check(counts, self.tokens, experts_choose, pairs=found)
        logits = {number: float(total) / max(self.tokens, 1) for number, total in self.logit_abs.items()}
        # Not "above": NaN is no small number either.
        large = [LargeLogits(n, v) for n, v in logits.items() if not v <= LARGE_LOGIT and n not in self.warned]
        self.warned |= {found.layer for found in large}
        payload = {
            "tokens": self.tokens,
            "domains": self.domains,
            "layers": {
                str(number): {
                    "counts": counts_NE.tolist(),
                    "logit_abs": logits[number],
                    "dropped": None if layer.capacity is None else int(self.dropped[number]),
                }
                for (number, counts_NE), layer in zip(self.counts_NE.items(), self.layers.values(), strict=True)
            },
        }
        for tensor in self._since_last_check().values():
            tensor.zero_()
        self.tokens = 0
        return Check(findings, large, counts, payload)

    def tensors(self) -> dict[str, Tensor]:
        """What is counted or known, by name, for a checkpoint."""
        return self._since_last_check() | self.pairs.tensors()

    def _since_last_check(self) -> dict[str, Tensor]:
        named = {f"layer.{number}": counts for number, counts in self.counts_NE.items()}
        named |= {f"logit_abs.{number}": total for number, total in self.logit_abs.items()}
        return named | {f"dropped.{number}": total for number, total in self.dropped.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "warned": sorted(self.warned), "collapse": self.detector.state_dict()}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's state and tensors.

        Raises:
            CheckError: counts of another shape. KeyError: of a layer that is missing.
        """
        self.tokens, self.warned = state["tokens"], set(state["warned"])
        self.detector.load_state_dict(state["collapse"])
        for name, tensor in self.tensors().items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise CheckError(
                    f"the checkpoint's routing counts '{name}' are not {tensor.dtype} {list(tensor.shape)}"
                )
            tensor.copy_(tensors[name])

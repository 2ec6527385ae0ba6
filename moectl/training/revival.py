"""Dead experts started anew, from the busiest expert of their layer.

An expert that gets no token gets no gradient either, and stays as it is. Revival gives it the
weights and the gate row of the layer's busiest expert, each plus a little noise, so that the two
share that expert's tokens and grow apart. Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moectl.config.schema import ExperimentConfig
from moectl.moe.layer import MoELayer
from moectl.moe.stats import dead_experts


@dataclass(frozen=True)
class Revived:
    """One expert, started anew.

    Attributes:
        layer: layer number.
        expert: the dead expert.
        source: the busiest expert, whose weights it got.
        source_share: of the assignments since the last check that went to ``source``.
        expected: assignments that an expert gets in that time when the load is even.
    """

    layer: int
    expert: int
    source: int
    source_share: float
    expected: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer}: expert {self.expert} got none of {self.expected:.0f} expected assignments and starts"
            f" anew from expert {self.source} ({self.source_share:.1%} of the load)"
        )

    def details(self) -> dict[str, Any]:
        """The fields, for an event's record."""
        return asdict(self)


class Revival:
    """Revives dead experts at every check; idle unless ``moe.revive_dead``.

    Args:
        config: the run's config. Below ``train.collapse.min_expected_count`` assignments per expert
            since the last check (default 100) nobody is called dead.
        layers: MoE layers by layer number.
        optimizer: holds the moments of their parameters; those of a revived expert are cleared.
            AdamW's ``step`` counts the whole stacked tensor and stays, so that a revived expert's moments
            are not bias-corrected: its first updates are (1-β₁ᵗ)/√(1-β₂ᵗ) times as long, from 0.45 up to
            1.1 at the default betas (but up to 6.6 at β₂ = 0.999).
    """

    def __init__(self, config: ExperimentConfig, layers: Mapping[int, MoELayer], optimizer: Optimizer) -> None:
        self.active = config.moe is not None and config.moe.revive_dead
        self.noise = 0.0 if config.moe is None else config.moe.revive_noise
        self.min_expected, self.seed = config.train.collapse.min_expected_count, config.train.seed
        self.layers, self.optimizer = layers, optimizer

    @torch.no_grad()
    def check(self, counts: Mapping[int, Tensor], step: int) -> list[Revived]:
        """Revive who got none of each layer's assignments ``[E]`` since the last check.

        The noise comes from a generator of its own, seeded by run, step and layer: a resumed run
        revives alike, and the router's own noise is not disturbed.
        """
        revived = []
        for number, layer in self.layers.items() if self.active else ():
            counts_E = counts[number]
            total = int(counts_E.sum())
            expected, source = total / counts_E.numel(), int(counts_E.argmax())
            if expected < self.min_expected:
                continue
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step * 1009 + number) % 2**63)
            for expert in dead_experts(counts_E):
                self._revive(layer, expert, source, generator)
                share = float(counts_E[source]) / total
                revived.append(Revived(number, expert, source, share, expected))
        return revived

    def _revive(self, layer: MoELayer, expert: int, source: int, generator: torch.Generator) -> None:
        for parameter, dim in _per_expert(layer):
            parameter.select(dim, expert).copy_(_copy_of(parameter.select(dim, source), self.noise, generator))
            for key, state in self.optimizer.state.get(parameter, {}).items():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    part = state.select(dim, expert)
                    part.copy_(parameter.select(dim, expert)) if key == "master" else part.zero_()
        for name, buffer in layer.router.named_buffers():
            if buffer.shape == (layer.router.num_experts,) and buffer.is_floating_point():
                # A balancing bias has been pulled far up by then; another state per expert goes with its gate row.
                buffer[expert] = buffer.mean() if name.endswith("expert_bias") else buffer[source]


def _per_expert(layer: MoELayer) -> Iterator[tuple[nn.Parameter, int]]:
    """All that has a part per expert, with the dimension that counts them: the stacked experts, the gate, and what
    else the router learns for each (the noise of ``noisy-topk``, ``[D, E]``).
    """
    router, num_experts = layer.router, layer.router.num_experts
    for parameter in (*layer.experts.parameters(), router.weight):
        if parameter.shape[:1] == (num_experts,):
            yield parameter, 0
    for parameter in router.parameters():
        if parameter is not router.weight and num_experts in parameter.shape:
            yield parameter, parameter.shape.index(num_experts)


def _copy_of(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """``matrix`` plus noise, in units of its own standard deviation."""
    if noise == 0.0 or matrix.numel() < 2:
        return matrix.clone()
    exact = matrix.double()
    drawn = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).to(matrix.device)
    return (exact + noise * exact.std() * drawn).to(matrix.dtype)

"""Capacity that follows the load: more room where experts are unevenly used, less where they are even."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moectl.config.schema import CapacityConfig, MoEConfig
from moectl.errors import CheckError
from moectl.moe.layer import MoELayer
from moectl.moe.stats import load_cv
from moectl.training.schedules import set_capacity_factor

GROW_ABOVE, SHRINK_BELOW, RATE = 0.5, 0.1, 1.1


@dataclass(frozen=True)
class FactorChange:
    """One layer's capacity factor, moved at a check.

    Attributes:
        layer: layer number.
        before: the factor until now.
        after: the factor from the next step on.
        load_cv: coefficient of variation of the load since the last check, before any token is dropped.
    """

    layer: int
    before: float
    after: float
    load_cv: float

    def __str__(self) -> str:
        moved = "grows" if self.after > self.before else "shrinks"
        return (
            f"layer {self.layer}: the capacity factor {moved} from {self.before:.3g} to {self.after:.3g}"
            f" (load CV {self.load_cv:.2f})"
        )

    def details(self) -> dict[str, Any]:
        """The fields, for an event's record."""
        return asdict(self)


class DynamicCapacity:
    """Moves each layer's capacity factor at every check; idle unless ``moe.capacity.dynamic``.

    Args:
        moe: the run's MoE section, None for a dense model.
        layers: MoE layers by layer number; their ``capacity`` is replaced.
    """

    def __init__(self, moe: MoEConfig | None, layers: Mapping[int, MoELayer]) -> None:
        capacity = None if moe is None else moe.capacity
        self.config: CapacityConfig | None = capacity if capacity is not None and capacity.dynamic else None
        self.layers = layers

    def check(self, counts: Mapping[int, Tensor]) -> list[FactorChange]:
        """Move what has to move, given each layer's assignments ``[E]`` since the last check."""
        changes = []
        for number, layer in self.layers.items() if self.config is not None else ():
            assert layer.capacity is not None
            before, cv = layer.capacity.factor, load_cv(counts[number])
            after = self._next(before, cv) if int(counts[number].sum()) else before
            if after != before:
                set_capacity_factor(layer, after)
                changes.append(FactorChange(number, before, after, cv))
        return changes

    def _next(self, factor: float, cv: float) -> float:
        assert self.config is not None
        if cv > GROW_ABOVE:
            return min(factor * RATE, self.config.max_factor)
        if cv < SHRINK_BELOW:
            return max(factor / RATE, self.config.min_factor)
        return factor

    def state_dict(self) -> dict[str, Any]:
        """Each layer's factor, for a checkpoint; empty when idle."""
        if self.config is None:
            return {}
        return {str(number): layer.capacity.factor for number, layer in self.layers.items() if layer.capacity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's factors.

        Raises:
            CheckError: they are not of these layers, or no factors.
        """
        fitting = state.keys() == self.state_dict().keys()
        if not fitting or not all(isinstance(factor, float) and factor > 0 for factor in state.values()):
            raise CheckError(f"the checkpoint's capacity factors are {dict(state)}, and the layers {[*self.layers]}")
        for number, factor in state.items():
            set_capacity_factor(self.layers[int(number)], factor)

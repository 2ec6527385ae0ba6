"""What changes over training by schedule: experts per token, capacity factor, balance coefficient, noise.

All of it is a pure function of the optimizer step and the number of steps: a resumed run needs no
state to follow it. Evaluation sees none of it: it uses the values that the config names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from moectl.config.schedule import Schedule, ScheduleConfig
from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.errors import ConfigError, MoectlError
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router


class ScheduledValues(NamedTuple):
    """What holds during one optimizer step; None where nothing is scheduled, ``lb_coef`` always a number."""

    lb_coef: float
    top_k: int | None = None
    capacity_factor: float | None = None
    noise_std: float | None = None

    def metrics(self) -> dict[str, float]:
        """The scheduled values by metric name, for the log."""
        return {f"schedule/{name}": float(value) for name, value in self._asdict().items() if value is not None}


class Schedules:
    """Applies a run's schedules to its MoE layers.

    Args:
        config: the run's config; a dense one has nothing to schedule.
        layers: MoE layers by layer number.

    Raises:
        ConfigError: a schedule that the router cannot follow, or that ends elsewhere than its ``top_k``.
    """

    def __init__(self, config: ExperimentConfig, layers: Mapping[int, MoELayer]) -> None:
        self.layers, self.steps = layers, config.train.steps
        self.given = ScheduleConfig() if config.moe is None else config.moe.schedule
        self.lb_coef = 0.0 if config.moe is None else balance_coefficient(config.moe, layers)
        self.configured = {number: layer.capacity for number, layer in layers.items()}
        refuse_unfit(self.given, layers)

    def apply(self, step: int) -> ScheduledValues:
        """Set what the optimizer step after ``step`` done ones runs with. To be called before its first batch."""
        share = step / self.steps
        top_k = _whole(self.given.top_k, share)
        factor, noise_std, lb_coef = (
            None if schedule is None else schedule.at(share)
            for schedule in (self.given.capacity_factor, self.given.noise_std, self.given.lb_coef)
        )
        for layer in self.layers.values():
            if top_k is not None:
                layer.router.set_top_k(top_k)
            if noise_std is not None:
                layer.router.set_noise_std(noise_std)
            if factor is not None:
                set_capacity_factor(layer, factor)
        return ScheduledValues(self.lb_coef if lb_coef is None else lb_coef, top_k, factor, noise_std)

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """Within, every layer has the capacity that the config names: what a later ``moectl eval`` measures with."""
        now = {number: layer.capacity for number, layer in self.layers.items()}
        try:
            for number, layer in self.layers.items():
                layer.capacity = self.configured[number]
            yield
        finally:
            for number, layer in self.layers.items():
                layer.capacity = now[number]


def refuse_unfit(given: ScheduleConfig, layers: Mapping[int, MoELayer]) -> None:
    """Raise for a schedule that a layer's router cannot follow.

    Raises:
        ConfigError: the router's ``top_k`` cannot be chosen, or is not where its schedule ends, or has no noise.
    """
    for layer in layers.values():
        router = layer.router
        if given.top_k is not None:
            own = router.top_k
            router.set_top_k(own)
            if given.top_k.final != own:
                raise ConfigError(
                    f"moe.schedule.top_k ends at {given.top_k.final:g}, but {router.label} has top_k {own}",
                    f"Let the schedule end at {own}, or set moe.router.top_k: evaluation uses the router's own.",
                )
            for top_k in _visited(given.top_k):
                _check_top_k(router, top_k)
            router.set_top_k(own)
        if given.noise_std is not None:
            router.set_noise_std(given.noise_std.at(0.0))


def balance_coefficient(moe: MoEConfig, layers: Mapping[int, MoELayer]) -> float:
    """``lb_coef`` as a number: the config's, else its schedule's end, else what the router asks for."""
    default = next((layer.router.default_lb_coef for layer in layers.values()), None)
    coefficient = moe.with_lb_coef(default).lb_coef
    assert coefficient is not None
    return coefficient


def set_capacity_factor(layer: MoELayer, factor: float) -> None:
    """Give ``layer`` another capacity factor; the same one leaves it untouched, and what was compiled for it."""
    assert layer.capacity is not None
    if layer.capacity.factor != factor:
        layer.capacity = replace(layer.capacity, factor=factor)


def _check_top_k(router: Router, top_k: int) -> None:
    training = router.training
    try:
        router.train().set_top_k(top_k)
        problem = router.training_problem()
    except ValueError as error:
        if isinstance(error, MoectlError):
            raise
        problem = str(error)
    finally:
        router.train(training)
    if problem is not None:
        raise ConfigError(
            f"moe.schedule.top_k comes to {top_k}, but {router.label} cannot be trained with that: {problem}",
            "Schedule other numbers of experts; `moectl routers show` tells what the router takes.",
        )


def _visited(schedule: Schedule) -> list[int]:
    """Every number of experts per token that a schedule comes to."""
    points = [int(value) for value in schedule.values]
    if schedule.interpolate == "constant":
        return sorted(set(points))
    return list(range(min(points), max(points) + 1))


def _whole(schedule: Schedule | None, share: float) -> int | None:
    """Experts per token: between the points of a linear schedule, the nearest whole number."""
    return None if schedule is None else int(schedule.at(share) + 0.5)

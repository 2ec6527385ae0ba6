"""Values that change over training, as data: a piecewise list over the share of steps done.

A schedule is a pure function of that share, so that a resumed run needs no state to follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moectl.config.settings import Fraction, Settings
from moectl.errors import did_you_mean

PHASES = {"warm-up": 0.0, "main": 0.1, "final": 0.8}
"""Where the phases of the short form begin: the first 10 % of the steps, the rest, the last 20 %."""

Value = Annotated[float, Field(allow_inf_nan=False)]


class Schedule(Settings):
    """A value over training: ``points`` of (share of the steps done, value), the first at 0.

    ``constant`` holds each value until the next point; ``linear`` goes straight from point to point.
    Short forms: a list of ``[share, value]`` (constant), or ``{warm-up: v, main: v, final: v}``, of
    which ``warm-up`` and ``final`` may be left out.

    >>> Schedule.model_validate([[0, 8], [0.5, 2]]).at(0.25)
    8.0
    """

    points: tuple[tuple[Fraction, Value], ...] = Field(description="[share of the steps done, value], ...")
    interpolate: Literal["constant", "linear"] = "constant"

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return {"points": value}
        if isinstance(value, Mapping) and value and not value.keys() & {"points", "interpolate"}:
            return {"points": _phase_points(value)}
        if isinstance(value, (int, float, str)):
            raise ValueError("give points, for example [[0, 4], [0.5, 2]], or {warm-up: 4, main: 2}")
        return value

    @field_validator("points", mode="before")
    @classmethod
    def _pairs(cls, points: Any) -> Any:
        if isinstance(points, (list, tuple)):
            for point in points:
                if not isinstance(point, (list, tuple)) or len(point) != 2:
                    raise ValueError(f"{point!r} is no point: give [share of the steps done, value]")
        return points

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if not self.points:
            raise ValueError("a schedule needs at least one point")
        shares = [share for share, _ in self.points]
        if shares[0] != 0.0:
            raise ValueError(f"the first point is at {shares[0]:g}; it must be at 0, where training begins")
        for before, after in pairwise(shares):
            if after <= before:
                raise ValueError(f"the shares of the steps must increase, but {after:g} follows {before:g}")
        if self.interpolate == "constant" and shares[-1] == 1.0:
            raise ValueError("no step is left at 1, so that the last value has no effect: put it earlier")
        return self

    def at(self, fraction: float) -> float:
        """The value when ``fraction`` of the steps is done: 0 before the first step, below 1 before the last."""
        earlier = [point for point in self.points if point[0] <= fraction] or [self.points[0]]
        start, value = earlier[-1]
        if self.interpolate == "constant" or len(earlier) == len(self.points):
            return value
        end, target = self.points[len(earlier)]
        return value + (target - value) * (max(fraction, 0.0) - start) / (end - start)

    @property
    def final(self) -> float:
        """The value that training ends with."""
        return self.points[-1][1]

    @property
    def values(self) -> tuple[float, ...]:
        """The values of the points; all others lie between them."""
        return tuple(value for _, value in self.points)


class ScheduleConfig(Settings):
    """What changes over training. Where a key is given here, its schedule ends at the key's own value."""

    top_k: Schedule | None = Field(None, description="experts per token, dense to sparse; evaluation uses the router's")
    capacity_factor: Schedule | None = Field(None, description="ends at moe.capacity.factor")
    lb_coef: Schedule | None = Field(None, description="ends at moe.lb_coef")
    noise_std: Schedule | None = Field(None, description="in place of the router's own noise_std and its annealing")

    @field_validator("top_k")
    @classmethod
    def _whole(cls, schedule: Schedule | None) -> Schedule | None:
        return _each(
            schedule, lambda value: value >= 1 and value == int(value), "a whole number of experts, at least 1"
        )

    @field_validator("capacity_factor")
    @classmethod
    def _positive(cls, schedule: Schedule | None) -> Schedule | None:
        return _each(schedule, lambda value: value > 0, "a factor above 0")

    @field_validator("lb_coef", "noise_std")
    @classmethod
    def _not_negative(cls, schedule: Schedule | None) -> Schedule | None:
        return _each(schedule, lambda value: value >= 0, "0 or more")


def _each(schedule: Schedule | None, holds: Callable[[float], bool], wanted: str) -> Schedule | None:
    for value in () if schedule is None else schedule.values:
        if not holds(value):
            raise ValueError(f"the value {value:g} must be {wanted}")
    return schedule


def _phase_points(phases: Mapping[str, Any]) -> list[list[Any]]:
    for name in phases:
        if name not in PHASES:
            hint = did_you_mean(str(name), [*PHASES, "points", "interpolate"]) or ""
            raise ValueError(f"unknown phase {name!r}; the phases are {', '.join(PHASES)}. {hint}".rstrip())
    if "main" not in phases:
        raise ValueError("the phase 'main' is missing")
    points = [[PHASES[name], phases[name]] for name in PHASES if name in phases]
    points[0][0] = 0.0
    return points

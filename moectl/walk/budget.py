"""What a run costs while it runs: time, money and energy over all its sittings, and a budget that ends it.

Price and budget determine no number of a run: they are in its record, and not in its config, hash or key.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from moectl.errors import ConfigError
from moectl.runs.heartbeat import last_beat
from moectl.runs.rundir import RunDir, now, seconds_since_epoch
from moectl.walk.energy import EnergyMeter

PRICE, BUDGET = "--price-per-hour", "--max-cost"


@dataclass(frozen=True)
class Terms:
    """On what terms a run is trained; None is as its record says, or not at all.

    Attributes:
        price_per_hour: US dollars for one device (of a CPU: for the machine).
        max_cost: US dollars that the run may cost, all its sittings together.
        share: of the device that the run has, where several runs share one.
        since: when the sitting began, by the monotonic clock; None: when training is set up.
    """

    price_per_hour: float | None = None
    max_cost: float | None = None
    share: float = 1.0
    since: float | None = None

    def check(self, *, remembered: bool = False) -> None:
        """Raise ConfigError for a price or budget that cannot be.

        Args:
            remembered: a run's record may have the price that the budget needs.
        """
        check_dollars(PRICE, self.price_per_hour)
        check_dollars(BUDGET, self.max_cost)
        if self.max_cost is not None and self.price_per_hour is None and not remembered:
            raise _no_price()


def check_dollars(key: str, value: float | None) -> None:
    """Raise ConfigError (exit 2) that names ``key`` for what is no sum above zero."""
    if value is not None and not 0 < value < math.inf:
        raise ConfigError(f"{key} {value:g} cannot be", "Give US dollars, more than 0; leave it out for none.")


def _no_price() -> ConfigError:
    return ConfigError(f"{BUDGET} needs {PRICE}", f"What does an hour on this device cost? Example: {PRICE} 2.50")


def used_up(limit: float, cost: float, price: float | None, whose: str = "the") -> str:
    """The sentence that a budget ends a run with.

    >>> used_up(10, 10.004, 2.5)
    'the budget of 10.00 dollars is used up (10.00 at 2.50 an hour)'
    """
    at = "" if price is None else f" at {price:.2f} an hour"
    return f"{whose} budget of {limit:.2f} dollars is used up ({cost:.2f}{at})"


@dataclass(frozen=True)
class Spent:
    """What the sittings of a run before this one took: seconds, dollars (None: no price known), joules."""

    seconds: float
    cost: float | None
    energy: float | None


def spent_before(run: RunDir, price_per_hour: float | None = None) -> Spent:
    """What a run has taken so far, a sitting that was killed too: as long as it gave signs of life.

    Args:
        price_per_hour: for sittings that had no price.
    """
    record = run.record
    seconds = float(record.get("duration_s") or 0.0)
    lost = _lost_seconds(run)
    recorded, own = record.get("cost"), record.get("price_per_hour")
    share = float(record.get("device_share") or 1.0)
    price = price_per_hour if own is None else float(own)
    energy = record.get("energy_j")
    if price is None:
        cost = None if recorded is None else float(recorded)
    else:
        before = dollars(seconds, price, share) if recorded is None else float(recorded)
        cost = before + dollars(lost, price, share)
    return Spent(seconds + lost, cost, None if energy is None else float(energy))


def dollars(seconds: float, price_per_hour: float, share: float = 1.0) -> float:
    """For so long on one device, or a share of it."""
    return seconds / 3600 * price_per_hour * share


def _lost_seconds(run: RunDir) -> float:
    """How long the last sitting was, if it was killed: from its start to its last sign of life."""
    record = run.record
    if record.get("status") != "running" or not record.get("started"):
        return 0.0
    beat = last_beat(run.path)
    seen = [] if beat is None else [beat.time]
    seen += [row.time for row in run.metrics(problems=[])][-1:]
    began = seconds_since_epoch(str(record["started"]))
    return max(0.0, max(seen, default=began) - began)


class Meter:
    """The clock of one sitting, begun with the sittings before it.

    Attributes:
        price, max_cost: of this sitting's terms, else as the record has them.

    Raises:
        ConfigError: a budget without a price, or one that earlier sittings have used up.
    """

    def __init__(self, run: RunDir, terms: Terms) -> None:
        record = run.record
        self._run = run
        self.price = _first(terms.price_per_hour, record.get("price_per_hour"))
        self.max_cost = _first(terms.max_cost, record.get("max_cost"))
        self.share = terms.share
        if self.max_cost is not None and self.price is None:
            raise _no_price()
        self.before = spent_before(run, self.price)
        self._started = time.monotonic() if terms.since is None else terms.since
        self._energy: EnergyMeter | None = None
        cost = self.before.cost
        if self.max_cost is not None and cost is not None and cost >= self.max_cost:
            raise ConfigError(
                f"the run '{run.id}' has used up its budget: {cost:.2f} of {self.max_cost:.2f} dollars",
                f"Go on with a higher one: moectl train --resume {run.id} {BUDGET} {_round_up(cost)}",
            )

    def settle(self) -> None:
        """Enter a sitting that was killed as spent, before this one gives its first sign of life. Needs the lock."""
        if _lost_seconds(self._run) > 0:
            self._run.update(started=now(), **self.fields())

    def watch_energy(self, device: str) -> None:
        """Count this sitting's energy on ``device`` (as torch names it), where the machine tells it."""
        self._energy = EnergyMeter.on(device) if self.share == 1.0 else None

    def tick(self) -> str | None:
        """To be called often: why the run must stop now, if it must."""
        if self._energy is not None:
            self._energy.tick()
        cost = self.cost
        if self.max_cost is None or cost is None or cost < self.max_cost:
            return None
        return used_up(self.max_cost, cost, self.price)

    @property
    def seconds(self) -> float:
        """Of all sittings."""
        return self.before.seconds + time.monotonic() - self._started

    @property
    def cost(self) -> float | None:
        """US dollars of all sittings; None without a price."""
        if self.price is None:
            return self.before.cost
        return (self.before.cost or 0.0) + dollars(time.monotonic() - self._started, self.price, self.share)

    def fields(self) -> dict[str, Any]:
        """For run.json, at the start of a sitting and at its end."""
        energy = None if self._energy is None else self._energy.joules()
        joules = [value for value in (self.before.energy, energy) if value is not None]
        cost = self.cost
        return {
            "duration_s": round(self.seconds, 3),
            "cost": None if cost is None else round(cost, 6),
            "price_per_hour": self.price,
            "max_cost": self.max_cost,
            "device_share": self.share,
            "energy_j": round(sum(joules), 3) if joules else None,
        }


def _first(given: float | None, recorded: Any) -> float | None:
    return given if given is not None else None if recorded is None else float(recorded)


def _round_up(cost: float) -> str:
    """A budget that is higher, with two digits."""
    return f"{math.ceil(cost * 2 * 100) / 100:.2f}"

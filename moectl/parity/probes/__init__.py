"""The named cases on which two sides are compared, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moectl.errors import unknown
from moectl.parity.probes import modes, routing, shapes
from moectl.parity.probes.bench import Bench
from moectl.parity.probes.probe import Probe

__all__ = ["BASE", "PROBES", "Bench", "Probe", "probes_named"]

BASE = modes.BASE
PROBES: Mapping[str, Probe] = {
    probe.name: probe for probe in (*modes.PROBES[:4], *shapes.PROBES, *routing.PROBES, *modes.PROBES[4:])
}


def probes_named(names: Iterable[str]) -> tuple[Probe, ...]:
    """The probes of these names, in the order in which they run; all of them for none.

    Raises:
        ConfigError: an unknown probe; the nearest is named.
    """
    wanted = {name.lower().replace("_", "-").replace(" ", "-") for name in names}
    for name in sorted(wanted):
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    return tuple(probe for name, probe in PROBES.items() if not wanted or name in wanted)

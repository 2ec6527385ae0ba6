"""Where two configurations meet: the last evaluation that both have, and the runs that count there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from moectl.runs.subject import LM_LOSS, Point, Subject


class Meeting(NamedTuple):
    """Two configurations at equal tokens.

    Attributes:
        at: None where they share no evaluation but that of step 0.
        ours, theirs: the runs that count, of the first and of the other.
    """

    at: Point | None
    ours: list[Subject]
    theirs: list[Subject]


@dataclass(frozen=True)
class Early:
    """A run that stopped before its last token, beside the baseline's run of its seed, at equal tokens.

    ``at_tokens`` is the last evaluation that both have, at or before what the run ``reached``; None, and no losses,
    where there is none. ``baseline`` is None for a run of the baseline itself, and where it has no such seed.
    """

    run: str
    status: str
    reached: int
    planned: int | None
    at_tokens: int | None
    eval_set: str | None
    loss: float | None
    baseline: str | None
    baseline_loss: float | None


def shared_points(subjects: Sequence[Subject]) -> set[Point]:
    """The evaluations after step 0 that all of them have."""
    return {point for point in subjects[0].losses if point.tokens and all(point in s.losses for s in subjects)}


def meet(ours: Sequence[Subject], theirs: Sequence[Subject]) -> Meeting:
    """At the last evaluation that all runs of both have; those that can go on are left out where others are there."""
    one, other = _settled(ours), _settled(theirs)
    points = shared_points([*one, *other])
    return Meeting(max(points) if points else None, one, other)


def _settled(group: Sequence[Subject]) -> list[Subject]:
    return [subject for subject in group if not subject.unfinished] or list(group)


def by_seed(group: Iterable[Subject], point: Point | None) -> dict[int | str, float]:
    """Seed → loss at ``point`` (None: each at its own last evaluation).

    Two runs of one seed are not two samples: their mean is one.
    """
    losses: dict[int | str, list[float]] = {}
    for subject in group:
        key = subject.id if subject.seed is None else subject.seed
        losses.setdefault(key, []).append(loss_at(subject, point))
    return {seed: fmean(values) for seed, values in losses.items()}


def loss_at(subject: Subject, point: Point | None) -> float:
    """A run's LM loss at ``point``, or at its last evaluation."""
    return subject.losses[max(subject.losses) if point is None else point][LM_LOSS]


def early_stops(subjects: Sequence[Subject], baseline: Sequence[Subject]) -> list[Early]:
    """Every run that stopped before its last token, at the tokens it reached."""
    return [_early(subject, baseline) for subject in subjects if subject.stopped_early]


def _early(subject: Subject, baseline: Sequence[Subject]) -> Early:
    rival = next((run for run in baseline if run.seed == subject.seed and run is not subject), None)
    if subject in baseline:
        rival = None
    points = shared_points([subject] if rival is None else [subject, rival])
    at = max(points) if points else None
    return Early(
        run=subject.id,
        status=subject.run.status,
        reached=subject.reached,
        planned=subject.planned,
        at_tokens=None if at is None else at.tokens,
        eval_set=None if at is None else at.eval_set,
        loss=None if at is None else loss_at(subject, at),
        baseline=None if rival is None else rival.id,
        baseline_loss=None if at is None or rival is None else loss_at(rival, at),
    )

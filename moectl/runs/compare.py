"""Matched comparison: which run is better, on pure LM loss, and whether that may be said at all.

It may not where tokens, data, eval set or loss definition differ, nor from one seed. Runs that
stopped early are compared at the tokens that all of them reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from moectl.errors import ConfigError, MoectlError
from moectl.marks import marked
from moectl.runs.files import dumps
from moectl.runs.intervals import MeanInterval, mean_interval, welch_interval
from moectl.runs.rundir import RunDir
from moectl.runs.subject import LM_LOSS, Point, Subject


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone. ``loss`` is over seeds, in nats per token."""

    label: str
    runs: list[str]
    marks: list[str]
    seeds: list[int | None]
    loss: MeanInterval
    domains: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """``other`` against ``baseline``: ``difference`` is other − baseline, so negative is a lower loss.

    ``method`` is "paired by seed", "unpaired" or "one seed"; ``better`` names a configuration, or is None
    where nothing may be claimed; ``text`` says it in a sentence.
    """

    baseline: str
    other: str
    difference: MeanInterval
    method: str
    seeds: list[int]
    better: str | None
    text: str


@dataclass(frozen=True)
class Comparison:
    """Everything that ``runs compare`` says. ``mismatches``: condition → value by run."""

    matched: bool
    mismatches: dict[str, dict[str, str]]
    at_tokens: int | None
    eval_set: str | None
    runs: list[dict[str, Any]]
    configurations: list[Configuration]
    verdicts: list[Verdict]
    config_differences: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    metric: str = LM_LOSS

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, intervals as objects."""
        document = asdict(self)
        for group, source in zip(document["configurations"], self.configurations, strict=True):
            group["loss"] = source.loss._asdict()
        for verdict, given in zip(document["verdicts"], self.verdicts, strict=True):
            verdict["difference"] = given.difference._asdict()
        return document


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare two runs or more; the first one's configuration is the baseline.

    Raises:
        ConfigError: fewer than two different runs.
        MoectlError: a run has no ``eval/lm_loss`` yet.
    """
    subjects = [Subject.read(RunDir.open(folder)) for folder in dict.fromkeys(path.resolve() for path in folders)]
    if len(subjects) < 2:
        raise ConfigError("a comparison needs two different runs", "moectl runs compare RUN OTHER [...]")
    for subject in subjects:
        if not subject.losses:
            raise MoectlError(
                f"the run '{subject.id}' has no {LM_LOSS} yet ({subject.run.status})",
                f"Let it reach an evaluation, or measure it: moectl eval {subject.id}",
            )
    mismatches = _mismatches(subjects)
    shared = {point for point in subjects[0].losses if point.tokens and all(point in s.losses for s in subjects)}
    if not mismatches and not shared:
        mismatches = _nothing_shared(subjects)
    at = max(shared) if shared and not mismatches else None
    points = {subject.id: max(subject.losses) if at is None else at for subject in subjects}
    groups = _groups(subjects)
    configurations = [_configuration(label, group, points) for label, group in groups.items()]
    verdicts = [_verdict(configurations[0], other, groups, points, mismatches) for other in configurations[1:]]
    return Comparison(
        matched=not mismatches,
        mismatches=mismatches,
        at_tokens=None if at is None else at.tokens,
        eval_set=None if at is None else at.eval_set,
        runs=[_row(subject, points[subject.id], groups) for subject in subjects],
        configurations=configurations,
        verdicts=verdicts,
        config_differences=_config_differences(groups),
        notes=_notes(subjects, at, configurations),
    )


def _mismatches(subjects: Sequence[Subject]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for condition in subjects[0].conditions:
        values = {subject.id: subject.conditions[condition] for subject in subjects}
        if len(set(values.values())) > 1:
            found[condition] = values
    return found


def _nothing_shared(subjects: Sequence[Subject]) -> dict[str, dict[str, str]]:
    """Evaluated at other times, or at the same times on other parts of the split."""
    tokens = set.intersection(*({point.tokens for point in subject.losses} for subject in subjects)) - {0}
    if tokens:
        at = max(tokens)
        sets = {s.id: " and ".join(sorted(p.eval_set for p in s.losses if p.tokens == at)) for s in subjects}
        return {"eval set": sets}
    return {"tokens": {subject.id: f"evaluated at {_listing(subject.losses)}" for subject in subjects}}


def _groups(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Label → runs of one configuration, in the order given; a label used twice gets its run's name.

    A label carries the marks of its runs, and with it every number and verdict that names it.
    """
    by_content: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_content.setdefault(dumps(sorted(subject.configuration.items())), []).append(subject)
    kinds = [group[0].kind for group in by_content.values()]
    return {
        marked(
            group[0].kind if kinds.count(group[0].kind) == 1 else f"{group[0].kind} ({group[0].id})", _marks(group)
        ): group
        for group in by_content.values()
    }


def _marks(group: Iterable[Subject]) -> list[str]:
    return list(dict.fromkeys(mark for subject in group for mark in subject.marks))


def _configuration(label: str, group: Sequence[Subject], points: dict[str, Point]) -> Configuration:
    by_seed = _by_seed(group, points)
    rows = [subject.losses[points[subject.id]] for subject in group]
    names = sorted(set.intersection(*(set(row) for row in rows)) - {LM_LOSS})
    return Configuration(
        label=label,
        runs=[subject.id for subject in group],
        marks=_marks(group),
        seeds=[subject.seed for subject in group],
        loss=mean_interval(list(by_seed.values())),
        domains={name.split("/")[1]: fmean(row[name] for row in rows) for name in names},
    )


def _by_seed(group: Sequence[Subject], points: dict[str, Point]) -> dict[int | str, float]:
    """Seed → loss. Two runs of one seed are not two samples: their mean is one."""
    losses: dict[int | str, list[float]] = {}
    for subject in group:
        key = subject.id if subject.seed is None else subject.seed
        losses.setdefault(key, []).append(subject.losses[points[subject.id]][LM_LOSS])
    return {seed: fmean(values) for seed, values in losses.items()}


def _verdict(
    baseline: Configuration,
    other: Configuration,
    groups: dict[str, list[Subject]],
    points: dict[str, Point],
    mismatches: dict[str, dict[str, str]],
) -> Verdict:
    ours, theirs = _by_seed(groups[baseline.label], points), _by_seed(groups[other.label], points)
    common = [seed for seed in ours if seed in theirs and isinstance(seed, int)]
    if len(common) >= 2:
        difference, method = mean_interval([theirs[seed] - ours[seed] for seed in common]), "paired by seed"
    elif min(len(ours), len(theirs)) >= 2:
        difference, method = welch_interval(list(ours.values()), list(theirs.values())), "unpaired"
        common = []
    else:
        one, two = (ours[common[0]], theirs[common[0]]) if common else (fmean(ours.values()), fmean(theirs.values()))
        difference, method = MeanInterval(1, two - one, None, None), "one seed"
    better: str | None = None
    measured = f"{other.label} − {baseline.label} = {_signed(difference)}"
    if mismatches:
        text = f"{measured}, but the runs are not matched ({', '.join(mismatches)}): no verdict."
    elif not math.isfinite(difference.mean):
        text = f"{measured}: a loss that is not a number supports no verdict."
    elif method == "one seed":
        few = "one seed each" if len(ours) == len(theirs) == 1 else "too few seeds in common"
        apart = "" if common or len(ours) > 1 or len(theirs) > 1 else ", and not the same"
        text = f"{measured}, {few}{apart}: one seed is one seed, so neither is called better."
    elif difference.excludes_zero:
        better = other.label if difference.mean < 0 else baseline.label
        text = f"{measured}, {method}, n = {difference.n}: {better} has the lower loss."
    else:
        text = f"{measured}, {method}, n = {difference.n}: the interval holds zero, no difference is shown."
    return Verdict(
        baseline.label, other.label, difference, method, [s for s in common if isinstance(s, int)], better, text
    )


def _row(subject: Subject, point: Point, groups: dict[str, list[Subject]]) -> dict[str, Any]:
    record = subject.run.record
    label = next(label for label, group in groups.items() if subject in group)
    return {
        "id": subject.id,
        "configuration": label,
        "seed": subject.seed,
        "status": subject.run.status,
        "marks": subject.marks,
        "tokens": subject.reached,
        "planned_tokens": subject.planned,
        "at_tokens": point.tokens,
        "eval_set": point.eval_set,
        "eval_lm_loss": subject.losses[point][LM_LOSS],
        "parameters": record.get("parameters"),
        "commit": record.get("commit"),
        "dirty": record.get("dirty"),
    }


def _config_differences(groups: dict[str, list[Subject]]) -> dict[str, dict[str, Any]]:
    """Key → value by configuration. A section that one of them has not (``moe``) is one entry, not twenty."""
    settings = {label: group[0].configuration for label, group in groups.items()}
    for section in sorted({key for values in settings.values() for key, value in values.items() if value is None}):
        if any(key.startswith(f"{section}.") for values in settings.values() for key in values):
            settings = {label: _folded(values, section) for label, values in settings.items()}
    keys = sorted({key for values in settings.values() for key in values})
    table = {key: {label: values.get(key) for label, values in settings.items()} for key in keys}
    return {key: row for key, row in table.items() if len({dumps(value) for value in row.values()}) > 1}


def _folded(values: dict[str, Any], section: str) -> dict[str, Any]:
    inside = {key.removeprefix(f"{section}."): value for key, value in values.items() if key.startswith(f"{section}.")}
    rest = {key: value for key, value in values.items() if not key.startswith(f"{section}.")}
    return {**rest, section: inside} if inside else rest


def _notes(subjects: Sequence[Subject], at: Point | None, configurations: Sequence[Configuration]) -> list[str]:
    notes = []
    for subject in subjects:
        if subject.stopped_early:
            where = "" if at is None else f"; all are compared at {at.tokens:,} tokens, the last evaluation they share"
            notes.append(
                f"{subject.id} ({subject.run.status}) reached {subject.reached:,} of {subject.planned:,} tokens{where}."
            )
    if any(len(set(group.seeds)) < len(group.runs) for group in configurations):
        notes.append("Runs of the same configuration and seed are averaged: they are not separate samples.")
    for name, title in (("commit", "code"), ("source_commit", "moectl's own source")):
        commits = {str(subject.run.record.get(name) or "unknown") for subject in subjects}
        if len(commits) > 1:
            notes.append(
                f"The runs come from different commits of {title}: {', '.join(sorted(c[:10] for c in commits))}."
            )
    if any(subject.run.record.get("dirty") for subject in subjects):
        notes.append("Some were run with uncommitted changes: see diff.patch in their folders.")
    return notes


def _signed(interval: MeanInterval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.4f} nats"
    return f"{interval.mean:+.4f} nats (95 % interval {interval.low:+.4f} to {interval.high:+.4f})"


def _listing(points: Iterable[Point]) -> str:
    shown = ", ".join(f"{tokens:,}" for tokens in sorted({point.tokens for point in points})[-3:])
    return f"{shown} tokens"

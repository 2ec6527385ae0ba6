"""Matched comparison: which run is better, on pure LM loss, and whether that may be said at all.

It may not where tokens, data, eval set or loss definition differ, nor from one seed. Each configuration is held
against the first at equal tokens: the last evaluation that both have. One that stopped by itself (collapsed) is
so compared at what it reached; a run that was only interrupted does not hold the others back: where other seeds of
its configuration are there, it is left out of the mean, and said to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from moectl.errors import ConfigError, MoectlError
from moectl.marks import marked
from moectl.runs.files import dumps
from moectl.runs.intervals import MeanInterval, mean_interval
from moectl.runs.meeting import Early, Meeting, by_seed, early_stops, meet
from moectl.runs.rundir import RunDir
from moectl.runs.subject import LM_LOSS, Point, Subject
from moectl.runs.verdict import Verdict, judge


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed alone. ``loss`` is over seeds, in nats per token, at ``at_tokens``.

    ``left_out`` are runs that can go on and do not count yet, ``stopped_early`` those that ended before their last
    token. ``duration_s`` and ``cost`` (US dollars) are sums over all its runs, None where one of them has none;
    ``tokens_per_second`` is of training, the mean over its runs.
    """

    label: str
    runs: list[str]
    marks: list[str]
    seeds: list[int | None]
    loss: MeanInterval
    domains: dict[str, float]
    at_tokens: int | None
    eval_set: str | None
    left_out: list[str]
    stopped_early: list[str]
    duration_s: float | None
    cost: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that ``runs compare`` says. ``mismatches``: condition → value by run.

    ``at_tokens`` and ``eval_set`` are the baseline's; a configuration that stopped early has its own.
    """

    matched: bool
    mismatches: dict[str, dict[str, str]]
    at_tokens: int | None
    eval_set: str | None
    runs: list[dict[str, Any]]
    configurations: list[Configuration]
    verdicts: list[Verdict]
    config_differences: dict[str, dict[str, Any]]
    early: list[Early] = field(default_factory=list)
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
    groups = _groups(subjects)
    label, *others = groups
    baseline = groups[label]
    meetings = {other: meet(baseline, groups[other]) for other in others} or {label: meet(baseline, baseline)}
    points = {other: meeting.at for other, meeting in meetings.items()}
    mismatches = _mismatches(subjects)
    if not mismatches and not any(points.values()):
        mismatches = _nothing_shared(subjects)
    at = None if mismatches else max((point for point in points.values() if point is not None), default=None)
    points = {label: at, **(dict.fromkeys(others) if mismatches else {other: points[other] for other in others})}
    counted = {label: _counted(meetings, at), **{other: meetings[other].theirs for other in others}}
    return Comparison(
        matched=not mismatches,
        mismatches=mismatches,
        at_tokens=None if at is None else at.tokens,
        eval_set=None if at is None else at.eval_set,
        runs=[_row(subject, name, points[name], counted[name]) for name, group in groups.items() for subject in group],
        configurations=[_configuration(name, group, counted[name], points[name]) for name, group in groups.items()],
        verdicts=[judge(label, other, meetings[other], list(mismatches), usual=at) for other in others],
        config_differences=_config_differences(groups),
        early=[] if mismatches else early_stops(subjects, baseline),
        notes=_notes(subjects, baseline, points, groups),
    )


def _counted(meetings: Mapping[str, Meeting], at: Point | None) -> list[Subject]:
    """The baseline's runs that count where it is evaluated last."""
    return next((meeting.ours for meeting in meetings.values() if meeting.at == at), next(iter(meetings.values())).ours)


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


def _configuration(label: str, group: Sequence[Subject], counted: Sequence[Subject], at: Point | None) -> Configuration:
    rows = [subject.losses[max(subject.losses) if at is None else at] for subject in counted]
    names = sorted(set.intersection(*(set(row) for row in rows)) - {LM_LOSS})
    return Configuration(
        label=label,
        runs=[subject.id for subject in group],
        marks=_marks(group),
        seeds=[subject.seed for subject in group],
        loss=mean_interval(list(by_seed(counted, at).values())),
        domains={name.split("/")[1]: fmean(row[name] for row in rows) for name in names},
        at_tokens=None if at is None else at.tokens,
        eval_set=None if at is None else at.eval_set,
        left_out=[subject.id for subject in group if subject not in counted],
        stopped_early=[subject.id for subject in group if subject.stopped_early],
        duration_s=_sum(subject.run.record.get("duration_s") for subject in group),
        cost=_sum(subject.run.record.get("cost") for subject in group),
        tokens_per_second=_mean(subject.tokens_per_second for subject in group),
    )


def _sum(values: Iterable[Any]) -> float | None:
    found = list(values)
    return None if None in found else float(sum(found))


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None


def _row(subject: Subject, label: str, at: Point | None, counted: Sequence[Subject]) -> dict[str, Any]:
    record = subject.run.record
    point = max(subject.losses) if at is None or subject not in counted else at
    return {
        "id": subject.id,
        "configuration": label,
        "seed": subject.seed,
        "status": subject.run.status,
        "reason": record.get("exit_reason"),
        "marks": subject.marks,
        "tokens": subject.reached,
        "planned_tokens": subject.planned,
        "stopped_early": subject.stopped_early,
        "counted": subject in counted,
        "at_tokens": point.tokens,
        "eval_set": point.eval_set,
        "eval_lm_loss": subject.losses[point][LM_LOSS],
        "parameters": record.get("parameters"),
        "tokens_per_second": subject.tokens_per_second,
        "duration_s": record.get("duration_s"),
        "cost": record.get("cost"),
        "energy_j": record.get("energy_j"),
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


def _notes(
    subjects: Sequence[Subject],
    baseline: Sequence[Subject],
    points: Mapping[str, Point | None],
    groups: Mapping[str, Sequence[Subject]],
) -> list[str]:
    whole = points[next(iter(points))]
    notes = []
    for early in early_stops(subjects, baseline):
        own = next(points[label] for label, group in groups.items() if any(s.id == early.run for s in group))
        notes.append(_said_of(early, own, whole))
    if any(len({subject.seed for subject in group}) < len(group) for group in groups.values()):
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


def _said_of(early: Early, own: Point | None, whole: Point | None) -> str:
    """One sentence on a run that stopped early."""
    planned = "all its" if early.planned is None else f"{early.planned:,}"
    reached = f"{early.run} ({early.status}) reached {early.reached:,} of {planned} tokens"
    if whole is None:
        return f"{reached}."
    if own == whole and early.at_tokens is not None and own is not None and early.at_tokens >= own.tokens:
        return f"{reached}; all are compared at {own.tokens:,} tokens, the last evaluation they share."
    if early.at_tokens is None or early.loss is None:
        return f"{reached}, and no evaluation after step 0: it is compared with none."
    if early.baseline is None or early.baseline_loss is None:
        return f"{reached}: LM loss {early.loss:.4f} at {early.at_tokens:,}."
    return (
        f"{reached}. At {early.at_tokens:,}, the last evaluation that both have, its LM loss is {early.loss:.4f},"
        f" that of {early.baseline} {early.baseline_loss:.4f} ({early.loss - early.baseline_loss:+.4f})."
    )


def _listing(points: Iterable[Point]) -> str:
    shown = ", ".join(f"{tokens:,}" for tokens in sorted({point.tokens for point in points})[-3:])
    return f"{shown} tokens"

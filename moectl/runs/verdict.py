"""Which of two configurations has the lower LM loss, in a sentence, or why that cannot be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from moectl.runs.intervals import MeanInterval, mean_interval, welch_interval
from moectl.runs.meeting import Meeting, by_seed
from moectl.runs.subject import Point


@dataclass(frozen=True)
class Verdict:
    """``other`` against ``baseline``: ``difference`` is other − baseline, so negative is a lower loss.

    ``method`` is "paired by seed", "unpaired" or "one seed"; ``better`` names a configuration, or is None
    where nothing may be claimed; ``text`` says it in a sentence. ``at_tokens`` and ``eval_set`` say where both
    were evaluated (None: each at its own last evaluation, and no verdict), and the two means are those there.
    """

    baseline: str
    other: str
    difference: MeanInterval
    method: str
    seeds: list[int]
    better: str | None
    text: str
    at_tokens: int | None = None
    eval_set: str | None = None
    baseline_loss: float = math.nan
    other_loss: float = math.nan


def judge(
    baseline: str, other: str, meeting: Meeting, mismatches: Sequence[str], *, usual: Point | None = None
) -> Verdict:
    """What may be said of ``other`` against ``baseline``, where they meet.

    Args:
        mismatches: conditions in which the runs differ: then nothing is claimed.
        usual: where the baseline meets the others; a meeting elsewhere is said.
    """
    at = None if mismatches else meeting.at
    ours, theirs = by_seed(meeting.ours, at), by_seed(meeting.theirs, at)
    difference, method, common = _difference(ours, theirs)
    unmatched = [*mismatches] or ([] if meeting.at is not None else ["tokens"])
    better: str | None = None
    where = "" if at is None or at == usual else f" at {at.tokens:,} tokens"
    measured = f"{other} − {baseline}{where} = {signed(difference)}"
    if unmatched:
        text = f"{measured}, but the runs are not matched ({', '.join(unmatched)}): no verdict."
    elif not math.isfinite(difference.mean):
        text = f"{measured}: a loss that is not a number supports no verdict."
    elif method == "one seed":
        few = "one seed each" if len(ours) == len(theirs) == 1 else "too few seeds in common"
        apart = "" if common or len(ours) > 1 or len(theirs) > 1 else ", and not the same"
        text = f"{measured}, {few}{apart}: one seed is one seed, so neither is called better."
    elif difference.excludes_zero:
        better = other if difference.mean < 0 else baseline
        text = f"{measured}, {method}, n = {difference.n}: {better} has the lower loss{' there' if where else ''}."
    else:
        text = f"{measured}, {method}, n = {difference.n}: the interval holds zero, no difference is shown."
    return Verdict(
        baseline,
        other,
        difference,
        method,
        common,
        better,
        text,
        at_tokens=None if at is None else at.tokens,
        eval_set=None if at is None else at.eval_set,
        baseline_loss=fmean(ours.values()),
        other_loss=fmean(theirs.values()),
    )


def _difference(
    ours: Mapping[int | str, float], theirs: Mapping[int | str, float]
) -> tuple[MeanInterval, str, list[int]]:
    """The difference, how it was taken, and the seeds in common that it was taken over."""
    common = [seed for seed in ours if seed in theirs and isinstance(seed, int)]
    if len(common) >= 2:
        return mean_interval([theirs[seed] - ours[seed] for seed in common]), "paired by seed", common
    if min(len(ours), len(theirs)) >= 2:
        return welch_interval(list(ours.values()), list(theirs.values())), "unpaired", []
    one, two = (ours[common[0]], theirs[common[0]]) if common else (fmean(ours.values()), fmean(theirs.values()))
    return MeanInterval(1, two - one, None, None), "one seed", common


def signed(interval: MeanInterval) -> str:
    """``-0.0123 nats (95 % interval -0.0200 to -0.0046)``."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.4f} nats"
    return f"{interval.mean:+.4f} nats (95 % interval {interval.low:+.4f} to {interval.high:+.4f})"

"""One run as a comparison sees it: what it is, what it was measured on, and its LM loss over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from moectl.runs.rundir import RunDir
from moectl.runs.settings import read_config

LM_LOSS = "eval/lm_loss"
PART = "eval_part/"  # read from some blocks of the split only: another number
_EVALUATED_AT_END = ("finished", "collapsed", "failed")  # an interrupted run is only saved
# What may differ between two runs of one configuration.
_NOT_CONFIGURATION = frozenset({
    "name", "preset", "train.seed", "train.threads", "train.device", "train.log_every", "train.eval_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_best", "eval.max_blocks", "eval.batch_size",
})  # fmt: skip
WHOLE = "the whole held-out split"


class Point(NamedTuple):
    """One evaluation: after how many training tokens, and on what. Whole splits sort last at equal tokens."""

    tokens: int
    whole: bool
    eval_set: str


@dataclass(frozen=True)
class Subject:
    """A run, read once.

    Attributes:
        run: the folder.
        losses: ``eval/lm_loss`` and ``eval/<domain>/lm_loss`` of every evaluation that has the first, those
            of a part of the split (``eval_part/...``) under the same names, at points that say so.
        tokens_per_step: None before the first logged step.
        logged_tokens: of the last line logged.
    """

    run: RunDir
    losses: dict[Point, dict[str, float]]
    tokens_per_step: float | None
    logged_tokens: int = 0

    @classmethod
    def read(cls, run: RunDir) -> Subject:
        subject = cls(run, {}, None)
        per_step: float | None = None
        logged = 0
        for row in run.metrics():
            logged = max(logged, row.tokens)
            if row.step > 0:
                per_step = row.tokens / row.step
            for point, prefix in ((Point(row.tokens, True, WHOLE), "eval/"), (subject._part(row.tokens), PART)):
                if f"{prefix}lm_loss" in row.values:
                    subject.losses[point] = _lm_losses(row.values, prefix)
        tokens = run.record.get("tokens")
        if isinstance(tokens, int) and LM_LOSS in run.final and run.status in _EVALUATED_AT_END:
            subject.losses.setdefault(Point(tokens, True, WHOLE), {}).update(_lm_losses(run.final, "eval/"))
        return cls(run, subject.losses, per_step, logged)

    def _part(self, tokens: int) -> Point:
        """The point of an evaluation that read ``eval.max_blocks`` blocks."""
        return Point(tokens, False, f"{self.config.get('eval.max_blocks')} blocks of the held-out split")

    @property
    def id(self) -> str:
        return self.run.id

    @property
    def seed(self) -> int | None:
        seed = self.run.record.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def kind(self) -> str:
        """What people call this configuration: in a group, by what it is there."""
        record = self.run.record
        if isinstance(group := record.get("group"), dict) and group.get("variant"):
            return str(group["variant"])
        named = (record.get(key) for key in ("kind", "preset", "router"))
        return next((str(name) for name in named if name), "moe" if record.get("moe") else "dense")

    @property
    def marks(self) -> list[str]:
        """What every number of this run must be read with."""
        return [str(mark) for mark in self.run.record.get("marks") or []]

    @property
    def reached(self) -> int:
        """Tokens trained on."""
        return max(int(self.run.record.get("tokens") or 0), self.logged_tokens)

    @property
    def tokens_per_second(self) -> float | None:
        """Of training, over all sittings that ended in order."""
        seconds, tokens = (self.run.record.get(key) for key in ("train_seconds", "train_tokens"))
        return float(tokens) / float(seconds) if seconds and tokens else None

    @property
    def planned(self) -> int | None:
        """Tokens of the whole run as configured: the learning rate's horizon."""
        steps = self.run.record.get("steps")
        if not isinstance(steps, int) or self.tokens_per_step is None:
            return None
        return round(steps * self.tokens_per_step)

    @property
    def stopped_early(self) -> bool:
        return self.planned is not None and self.reached < self.planned

    @property
    def unfinished(self) -> bool:
        """Stopped, but not by itself: it can go on."""
        return self.stopped_early and self.run.status in ("interrupted", "lost", "running")

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml as dotted keys. Raises ``MoectlError`` when it cannot be read."""
        return dict(_flatten(read_config(self.run.path)))

    @property
    def configuration(self) -> dict[str, Any]:
        """What makes two runs seeds of the same thing."""
        return {key: value for key, value in self.config.items() if key not in _NOT_CONFIGURATION}

    @property
    def conditions(self) -> dict[str, str]:
        """What must be equal before two losses may be set against each other, each as text."""
        record = self.run.record
        data = record.get("data") or {}
        causal = sorted(mark for mark in self.marks if "causal" in mark)
        loss = str(record.get("loss_definition") or "language-model cross-entropy per token")
        return {
            "tokens": f"{self.planned or self.reached:,} in the whole run",
            "data": str(data.get("id") or "unknown"),
            "eval set": f"held-out split of {str(data.get('sha256') or data.get('id') or 'unknown')[:12]}",
            "loss definition": ", ".join([loss, *causal]),
        }


def _lm_losses(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    found = {name: value for name, value in values.items() if name.startswith(prefix) and name.endswith("lm_loss")}
    return {f"eval/{name.removeprefix(prefix)}": value for name, value in found.items()}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            items.extend(_flatten(value, f"{name}."))
        else:
            items.append((name, value))
    return items

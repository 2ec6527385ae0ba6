"""One line of ``runs ls``: the same whether it comes from the registry or from the folder itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from moectl.runs.files import json_safe
from moectl.runs.rundir import RunDir


class Reached(NamedTuple):
    """How far the logged metrics go: largest step and token count, newest ``eval/lm_loss``."""

    step: int | None
    tokens: int | None
    eval_lm_loss: float | None


@dataclass(frozen=True)
class Entry:
    """A run in short. Times are UTC, ISO 8601; ``eval_lm_loss`` in nats per token, ``cost`` in US dollars."""

    id: str
    name: str
    status: str
    preset: str | None
    router: str | None
    moe: bool | None
    seed: int | None
    step: int | None
    steps: int | None
    tokens: int | None
    eval_lm_loss: float | None
    commit: str | None
    dirty: bool | None
    created: str | None
    started: str | None
    finished: str | None
    duration_s: float | None
    config_hash: str | None
    data_id: str | None
    group: str | None
    cost: float | None
    marks: list[Any]
    folder: str

    @classmethod
    def of(cls, run: RunDir, reached: Reached) -> Self:
        """From run.json; while that says less than the logged metrics (a live or lost run), from those."""
        record = run.record
        final = run.final.get("eval/lm_loss")
        keys = ("preset", "router", "moe", "seed", "steps", "commit", "dirty", "created", "started", "finished",
                "duration_s", "config_hash", "cost")  # fmt: skip
        return cls(
            id=run.id,
            name=str(record.get("name", run.id)),
            status=run.status,
            step=_larger(record.get("step"), reached.step),
            tokens=_larger(record.get("tokens"), reached.tokens),
            eval_lm_loss=reached.eval_lm_loss if final is None else final,
            data_id=(record.get("data") or {}).get("id"),
            group=(record.get("group") or {}).get("name"),
            marks=list(record.get("marks") or []),
            folder=str(run.path),
            **{key: record.get(key) for key in keys},
        )

    @classmethod
    def read(cls, run: RunDir) -> Self:
        """From the folder alone."""
        step: int | None = None
        tokens: int | None = None
        loss: float | None = None
        for row in run.metrics(problems=[]):
            if row.values:
                step, tokens = _larger(step, row.step), _larger(tokens, row.tokens)
            loss = row.values.get("eval/lm_loss", loss)
        return cls.of(run, Reached(step, tokens, loss))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN and infinities as strings."""
        data: dict[str, Any] = json_safe(asdict(self))
        return data


def fits(run: RunDir, *, status: str | None = None, router: str | None = None, group: str | None = None) -> bool:
    """Whether a run is of this status, router and group, as far as they are given."""
    wanted = {"router": router, "group": group}
    own = {"router": run.record.get("router"), "group": (run.record.get("group") or {}).get("name")}
    return all(not value or own[key] == value for key, value in wanted.items()) and (not status or run.status == status)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)

"""How ``moectl runs`` looks in a terminal. Off a terminal no line is wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moectl.marks import marked
from moectl.runs.compare import Comparison
from moectl.runs.entry import Entry
from moectl.runs.intervals import MeanInterval

_STATUS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "lost": "yellow"}
_NUMBERS = frozenset({"seed", "seeds", "steps", "tokens", "LM loss", "mean"})
_SHOWN_EVENTS = 12


def listing(entries: Sequence[Entry]) -> RenderableType:
    """``runs ls``: a line per run. Where the terminal is too narrow, its router is broken, and never its name."""
    table = _table(["run", "status", "router", "seed", "steps", "tokens", "LM loss", "commit", "age"], wrapped="router")
    for entry in entries:
        router = None if entry.router is None else Path(entry.router).name  # of path/to/file.py:Class, file.py:Class
        kind = " ".join(dict.fromkeys(part for part in (entry.preset, router) if part)) or "dense"
        _add(
            table,
            entry.id,
            Text(marked(entry.status, entry.marks), style=_STATUS.get(entry.status, "red")),
            kind,
            entry.seed,
            _steps(entry),
            _compact(entry.tokens),
            _loss(entry.eval_lm_loss, entry.marks),
            _commit(entry.commit, entry.dirty),
            _age(entry.created),
        )
    return table


def description(found: Mapping[str, Any]) -> RenderableType:
    """``runs show``: the record in groups. What no group names comes last, so that nothing is hidden."""
    record = dict(found["record"])

    def take(*keys: str) -> dict[str, Any]:
        return {key.replace("_", " "): record.pop(key, None) for key in keys}

    source = _commit(record.pop("source_commit", None), record.pop("source_dirty", None))
    source_sha256 = str(record.pop("source_sha256", "unknown"))[:12]
    memory = record.pop("peak_memory_bytes", None)
    sections: list[tuple[str, Mapping[str, Any]]] = [
        (
            f"Run {found['id']}",
            {
                "status": found["status"],
                "last sign of life": _seen(found["last_seen"]),
                "reason": record.pop("exit_reason", None),
                "marks": record.pop("marks", None),
                "folder": f"{found['folder']} ({_compact(found['size_bytes'])}B)",
            },
        ),
        ("What", take("group", "kind", "preset", "router", "moe", "seed", "data", "base", "parameters")),
        (
            "Where from",
            {
                "commit": _commit(record.pop("commit", None), record.pop("dirty", None)),
                "moectl's source": f"{source}, sha256 {source_sha256}",
                "changes": ", ".join(found["patches"]),
                **take("config_hash", "run_key", "command", "host", "devices", "threads", "versions"),
            },
        ),
        (
            "How far",
            {
                "step": f"{found['step']} of {found['steps']}",
                "tokens": found["tokens"],
                **take("created", "started", "finished", "duration_s", "train_seconds", "gpu_seconds"),
                "peak memory, MB": None if memory is None else round(memory / 1e6, 1),
                **take("energy_j", "cost", "price_per_hour", "max_cost", "device_share"),
                "checkpoints": ", ".join(found["checkpoints"]),
            },
        ),
        (marked("Newest metrics", found["marks"]), found["metrics"]),
    ]
    for key in ("id", "name", "status", "step", "steps", "tokens", "metrics", "generation"):
        record.pop(key, None)
    sections.append(("More", record))
    parts: list[RenderableType] = [part for title, fields in sections for part in _section(title, _rows(fields))]
    events = found["events"][-_SHOWN_EVENTS:]
    older = len(found["events"]) - len(events)
    title = f"Events (the last {len(events)} of {older + len(events)})" if older else "Events"
    parts.extend(_section(title, [(_clock(event), str(event.get("message"))) for event in events]))
    return Group(*parts)


def comparison(result: Comparison) -> RenderableType:
    """``runs compare`` and the end of ``ablate``: each run, each configuration, what differs, what may be said."""
    place = "each at its own last evaluation"
    if result.at_tokens is not None:
        place = f"at {result.at_tokens:,} tokens, on {result.eval_set}"
        if len({group.at_tokens for group in result.configurations}) > 1:
            place = "each configuration at the last evaluation that it shares with the first"
    parts: list[RenderableType] = [_title(f"LM loss in nats per token, {place}"), _compared_runs(result)]
    parts += [_title("By configuration"), _configurations(result)]
    if result.config_differences and len(result.configurations) > 1:
        labels = [group.label for group in result.configurations]
        differences = _table(["key", *labels])
        for key, values in result.config_differences.items():
            # Together no wider than what a line has beside the key, which the table would else squeeze away.
            _add(differences, key, *(_brief(values.get(label), max(10, 90 // len(labels))) for label in labels))
        parts += [_title("What differs in the configurations"), differences]
    if not result.matched:
        mismatches = _table(["condition", "run", "value"])
        for condition, by_run in result.mismatches.items():
            for run, value in by_run.items():
                _add(mismatches, condition, run, value)
        parts += [_title("Not comparable: these differ"), mismatches]
    parts += [Text(verdict.text, style="bold") for verdict in result.verdicts]
    parts += [Text(f"Note: {note}") for note in result.notes]
    return Group(*parts)


def _compared_runs(result: Comparison) -> Table:
    priced = any(row["cost"] is not None for row in result.runs)
    columns = ["run", "configuration", "seed", "status", "tokens", "LM loss", "time", *["$"] * priced, "commit"]
    runs = _table(columns, numbers=["time", "$"])
    for row in result.runs:
        status = row["status"] if row["counted"] else f"{row['status']}, not counted"
        cells = (row["id"], row["configuration"], row["seed"], status, f"{row['at_tokens']:,}")
        cost = [_dollars(row["cost"])] if priced else []
        loss, time = _loss(row["eval_lm_loss"], row["marks"]), _duration(row["duration_s"])
        _add(runs, *cells, loss, time, *cost, _commit(row["commit"], row["dirty"]))
    return runs


def _configurations(result: Comparison) -> Table:
    groups = result.configurations
    domains = sorted({domain for group in groups for domain in group.domains})
    against = {verdict.other: verdict for verdict in result.verdicts}
    priced = any(group.cost is not None for group in groups)
    columns = ["configuration", "seeds", "mean", "95 % interval", *(["− first", "95 %"] if against else []), *domains]
    columns += ["at tokens", "tokens/s", "time", *(["$"] if priced else []), "stopped early"]
    table = _table(columns, numbers=[*domains, "− first", "at tokens", "tokens/s", "time", "$"])
    for group in groups:
        difference: list[str | None] = []
        if against:
            verdict = against.get(group.label)
            interval = None if verdict is None else verdict.difference
            difference = [None if interval is None else f"{interval.mean:+.4f}", _between(interval, "+.4f")]
        per_domain = [_loss(group.domains.get(name), group.marks) for name in domains]
        at = None if group.at_tokens is None else f"{group.at_tokens:,}"
        speed = None if group.tokens_per_second is None else f"{group.tokens_per_second:,.0f}"
        cost = [_dollars(group.cost)] if priced else []
        early = f"{len(group.stopped_early)} of {len(group.runs)}" if group.stopped_early else None
        own = [group.loss.n, _loss(group.loss.mean, group.marks), _between(group.loss, ".4f")]
        _add(table, group.label, *own, *difference, *per_domain, at, speed, _duration(group.duration_s), *cost, early)
    return table


def _between(interval: MeanInterval | None, form: str) -> str | None:
    if interval is None:
        return None
    if interval.low is None or interval.high is None:
        return "one seed" if interval.n < 2 else None
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _dollars(cost: float | None) -> str | None:
    return None if cost is None else f"{cost:.2f}" if cost >= 0.995 else f"{cost:.2g}"


def _duration(seconds: float | None) -> str | None:
    from moectl.cli.plan import duration

    return None if seconds is None else duration(seconds)


def _table(columns: Sequence[str], numbers: Iterable[str] = (), wrapped: str | None = None) -> Table:
    """An empty table; one column may be wrapped where a line is too short, the first if no other is named."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    right = _NUMBERS | set(numbers)
    for column in columns:
        no_wrap = column != (wrapped or columns[0])
        table.add_column(Text(column), justify="right" if column in right else "left", overflow="fold", no_wrap=no_wrap)
    return table


def _add(table: Table, *cells: Any) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text("–" if cell is None else str(cell)) for cell in cells))


def _title(text: str) -> Padding:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0), expand=False)


def _section(title: str, rows: Sequence[tuple[str, str]]) -> list[RenderableType]:
    if not rows:
        return []
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in rows:
        grid.add_row(Text(key, style="dim"), Text(value))
    return [_title(title), Padding(grid, (0, 0, 0, 2), expand=False)]


def _rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _text(value)) for key, value in fields.items() if value not in (None, "", [], {})]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _brief(value: Any, length: int) -> str:
    if value is None:
        return "none"
    text = _text(value)
    return text if len(text) <= length else text[:length].rsplit(", ", 1)[0] + ", …"


def _steps(entry: Entry) -> str | None:
    if entry.step is None:
        return None
    return f"{entry.step}" if entry.step == entry.steps else f"{entry.step}/{entry.steps}"


def _loss(value: float | None, marks: Sequence[str] = ()) -> str | None:
    return None if value is None else marked(f"{value:.4f}", marks)


def _compact(count: int | None) -> str | None:
    """1,228,800 as 1.23M."""
    if count is None:
        return None
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _commit(commit: str | None, dirty: bool | None) -> str | None:
    if commit is None:
        return None
    return (commit if commit == "unknown" else commit[:7]) + ("*" if dirty else "")


def _age(created: str | None) -> str | None:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created or "")).total_seconds()
    except (ValueError, TypeError):
        return None
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def _seen(beat: Mapping[str, Any] | None) -> str | None:
    if beat is None:
        return None
    return f"{datetime.fromtimestamp(beat['time'], UTC):%Y-%m-%d %H:%M:%S} UTC, PID {beat['pid']} on {beat['host']}"


def _clock(event: Mapping[str, Any]) -> str:
    time = datetime.fromtimestamp(float(event.get("time", 0)), UTC)
    return f"{time:%Y-%m-%d %H:%M:%S}  {event.get('kind', '')}"

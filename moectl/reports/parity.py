"""What ``compare-hf`` says, for the terminal: tensors in model order, probes, verdict, diagnosis. rich only.

A difference is never folded away: what holds may share a line with its like, what does not has its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moectl.parity.compare import Row
from moectl.parity.layer_only import LayerOnly
from moectl.parity.results import ProbeResult, Report, Skipped, findings_of
from moectl.parity.tolerance import dtype_name

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16"}
_STYLES = {"ok": "green", "tie": "cyan", "differs": "bold red", "not compared": "yellow"}
_WORST = "layers.*: the worst layer is shown, and named in the last column."
_COLUMNS = (
    "err/tol: the worst error of any tensor over its tolerance. ties: tokens that rounding sent to other experts / "
    "tokens at a tie; in bfloat16, route flips."
)
#: Of a list of names in a sentence.
_NAMED = 6


def parity_report(report: Report, *, everything: bool = False) -> RenderableType:
    """The whole of ``compare-hf``.

    Args:
        everything: a line for every layer, and for every dtype and component of a probe.
    """
    parts: list[RenderableType] = [Text(line) for line in header_lines(report)]
    if report.guessed is not None:
        parts += [Text(), *map(Text, guessed_lines(report.guessed, everything=everything))]
    shown = report.base
    if shown is not None:
        parts += [Text(), tensor_table(shown, everything=everything), *map(Text, _asides(shown))]
    parts += [Text(), probe_table(report, everything=everything)] if report.results else []
    parts += [Text(line) for line in (*not_applicable(report), *not_compared(report), *route_flips(report))]
    parts += [Text(), verdict(report), *diagnosis(report)]
    return Group(*parts)


def header_lines(report: Report) -> list[str]:
    """What is compared with what."""
    header = report.header
    versions = dict(header["versions"])
    commit = "unknown" if header["commit"] == "unknown" else str(header["commit"])[:12]
    changed = " with changes" if header["dirty"] else ""
    shape = header["shape"]
    return [
        f"compare-hf {report.family}: Hugging Face transformers {versions.get('transformers', 'unknown')} "
        f"(eager attention and experts) against {' and '.join(header['candidates'])}",
        f"torch {versions.get('torch')} · python {versions.get('python')} · moectl {versions.get('moectl')}, "
        f"commit {commit}{changed} · {header['device']} · seed {header['seed']}",
        f"{header['config']}: {shape['layers']} layers, hidden size {shape['hidden']}, "
        f"{shape['experts']} experts of {shape['expert size']}, {shape['chosen']} chosen",
    ]


def guessed_lines(guessed: Mapping[str, Any], *, everything: bool = False) -> Iterator[str]:
    """How somebody's candidate was understood; a layer's weights once, those of the others in ``--json``."""
    guess = " (guessed)" if guessed.get("level_guessed") else ""
    yield f"{guessed['class']} as {guessed['level']}{guess}: {guessed['built']}, {guessed['called']}"
    yield from (f"  {remark}" for remark in guessed["found_by_trying"])
    seen = set()
    for line in guessed["weights"]:
        kind = re.sub(r"\b\d+\b", "*", line["name"])
        if everything or kind not in seen:
            seen.add(kind)
            remark = f"  ({line['remark']})" if line["remark"] else ""
            shown = f"{line['name']} = {line['from']}" if everything else f"{kind} = {_for_all(line)}"
            yield f"  {shown}{remark}"
    yield from (f"  not of Hugging Face: {name}, kept as it starts" for name in guessed["extra_parameters"])
    yield from (f"  taken by nothing: {name}" for name in guessed["missing"])
    yield from (f"  {sentence}" for sentence in guessed["unclear"])


def _for_all(line: Mapping[str, Any]) -> str:
    """The source of one weight with the numbers of its expert and layer left open."""
    own = set(re.findall(r"\b\d+\b", line["name"]))
    return re.sub(r"\b\d+\b", lambda number: "*" if number[0] in own else number[0], str(line["from"]))


def layer_report(family: str, text: str, outcome: LayerOnly, *, everything: bool = False) -> RenderableType:
    """What ``--layer-only`` found."""
    title = f"One layer of {family} ({text}), float32, every tensor; experts' gradients one expert at a time"
    memory = f"{outcome.peak_bytes / 2**30:.2f} of {outcome.limit_bytes / 2**30:.0f} GiB"
    differing = sum(row.ok is False for row in outcome.rows)
    said = (
        f"All {len(outcome.rows)} tensors hold" if outcome.ok else f"{differing} of {len(outcome.rows)} tensors differ"
    )
    notes = [Text(f"{row.name}: {row.note}") for row in outcome.rows if row.note]
    style = "bold green" if outcome.ok else "bold red"
    end = Text(f"{said}; {memory} of memory, {outcome.seconds:.0f} s.", style=style)
    return Group(rows_table(title, outcome.rows, everything=everything), *notes, end)


def tensor_table(result: ProbeResult, *, everything: bool = False) -> RenderableType:
    """Every tensor of a probe, the worst of its cases, in model order."""
    title = f"Probe {result.probe}: {result.level} in {dtype_name(result.dtype)}, {_brief(result.candidate)}"
    return rows_table(title, result.worst_rows(), everything=everything)


def rows_table(title: str, rows: Sequence[Row], *, everything: bool = False) -> RenderableType:
    """Rows in model order; tensors that hold in several layers share a line, which shows the worst."""
    folded = not everything and any(_LAYER.search(row.name) for row in rows)
    view = _table(("tensor", "shape", "max abs", "max rel", "tolerance", "verdict", *(["layer"] if folded else [])))
    for name, row, place in _lines(rows, everything):
        numbers = map(_number, (row.max_abs, row.max_rel, row.tolerance))
        verdict_text = Text(row.verdict, style=_STYLES[row.verdict])
        shape = "×".join(map(str, row.shape)) or "scalar"
        view.add_row(name, shape, *numbers, verdict_text, *([place] if folded else []))
    # As a part of the table, a longer title would be wrapped to the table's width.
    return Group(Text(title, style="bold"), view, *([Text(_WORST, style="dim")] if folded else []))


def _table(columns: Sequence[str]) -> Table:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        right = name in ("max abs", "max rel", "tolerance", "layer", "cases", "tensors", "err/tol", "ties")
        view.add_column(name, justify="right" if right else "left", overflow="fold")
    return view


def probe_table(report: Report, *, everything: bool = False) -> RenderableType:
    """One line per probe; one more for each way in which it does not hold."""
    several = len({result.candidate for result in report.results if result.probe != "anchor"}) > 1
    columns = ["dtype", "level", "cases", "tensors", "err/tol", "ties", "verdict"]
    view = _table(["probe", *(["candidate"] if several else []), *columns])
    levels = list(dict.fromkeys(result.level for result in report.results))
    for group in _groups(report.results, everything):
        first, ok = group[0], all(result.ok for result in group)
        worst = max(result.ratio for result in group)
        here = list(dict.fromkeys(result.level for result in group))
        view.add_row(
            first.probe,
            *([_brief(first.candidate)] if several else []),
            " ".join(dict.fromkeys(_SHORT[dtype_name(result.dtype)] for result in group)),
            f"all {len(here)}" if len(here) == len(levels) > 2 else " ".join(here),
            str(sum(len(result.contests) for result in group)),
            f"{sum(result.compared for result in group):,}",
            _number(worst),
            _ties(group),
            Text("ok", style=_STYLES["ok"]) if ok else Text(_what_failed(first), style=_STYLES["differs"]),
        )
    return Group(Text("Probes", style="bold"), view, Text(_COLUMNS, style="dim"))


def verdict(report: Report) -> Text:
    """One sentence, and the first divergent tensor."""
    cases = sum(len(result.contests) for result in report.results)
    tensors = sum(result.compared for result in report.results)
    probes = len({result.probe for result in report.results})
    if report.ok:
        worst = ", ".join(f"{ratio:.2g} in {name}" for name, ratio in report.worst_ratios().items())
        return Text(
            f"{_all(probes)}: {_many(cases, 'case')}, {_many(tensors, 'tensor')}; worst error over tolerance {worst}. "
            f"{report.seconds:.0f} s.",
            style="bold green",
        )
    if not report.results:
        return Text("Nothing was compared: no probe that was asked for applies.", style="bold red")
    broken = list(dict.fromkeys(result.probe for result in report.broken))
    lines = [f"{len(broken)} of {probes} probes do not hold: {', '.join(broken)}. {report.seconds:.0f} s."]
    if not broken:
        lines = [f"{_all(probes)}, and yet the candidate itself has a fault. {report.seconds:.0f} s."]
    if report.first is not None:
        result, row = report.first
        lines.append(
            f"First divergent tensor: {row.name} ({_where(result)}, {_brief(result.candidate)}): {describe(row)}"
        )
    for each in report.broken:
        if each.failure is not None:
            lines.append(f"{_where(each)}: {each.failure.message}")
            break
    missing = next((each for each in report.broken if each.missing), None)
    if missing is not None:
        lines.append(f"{missing.candidate} shows no {', '.join(missing.missing)}: its output was not compared.")
    lines += [f"{problem['title']}: {problem['evidence']}" for problem in report.problems if problem["fails"]]
    return Text("\n".join(lines), style="bold red")


def describe(row: Row) -> str:
    """``"max abs error 0.12, tolerance 1e-10; 0.3 where the reference has 0.2"``."""
    numbers = "" if row.max_abs is None else f"max abs error {_number(row.max_abs)}, tolerance {_number(row.tolerance)}"
    return "; ".join(filter(None, [numbers, row.note]))


def diagnosis(report: Report) -> Iterator[Text]:
    """What explains the difference, with the catalogue's entry; and what is odd about the candidate itself."""
    findings = findings_of(report.diagnosis)
    unexplained = getattr(report.diagnosis, "unexplained", None)
    if findings or unexplained:
        yield Text("\nDiagnosis", style="bold")
    for finding in findings:
        codes = " ".join(finding["codes"])
        yield Text(f"  {codes} {finding['title']}".rstrip(), style="bold")
        where = f"first in {finding['tensor']}; " if finding["tensor"] else ""
        yield Text(f"    {where}{finding['evidence']}")
        for code in finding["codes"]:
            yield Text(f"    moectl explain {code}", style="cyan")
    if unexplained:
        yield Text(f"  not explained: {unexplained}")
    if report.problems:
        yield Text("\nThe candidate itself", style="bold")
    for problem in report.problems:
        yield Text(f"  {problem['code'] or ''} {problem['title']}".replace("   ", "  "), style="bold")
        yield Text(f"    {problem['evidence']}")
        yield Text(f"    {problem['hint']}", style="cyan")


def not_applicable(report: Report) -> Iterator[str]:
    """Probes that do not apply, with the reason; one line per reason."""
    by_reason: dict[str, list[Skipped]] = {}
    for each in report.skipped:
        by_reason.setdefault(each.reason, []).append(each)
    for reason, same in by_reason.items():
        probes, levels, sides = (list(dict.fromkeys(values)) for values in zip(*map(_place, same), strict=True))
        listing = _listed(probes) if len(probes) <= _NAMED else f"{len(probes)} probes"
        yield f"not applicable: {listing} ({' '.join(levels)}; {' and '.join(sides)}): {reason}"


def _place(skipped: Skipped) -> tuple[str, str, str]:
    return skipped.probe, skipped.level, _brief(skipped.candidate)


def not_compared(report: Report) -> Iterator[str]:
    """Tensors that were not compared, with the reason; what follows from a tie is told by the ties."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    probes: dict[str, set[str]] = {}
    for result in report.results:
        probes.setdefault(result.candidate, set()).add(result.probe)
        for row in result.rows:
            if row.ok is None and "tie" not in row.note:
                by_probe = found.setdefault((result.candidate, row.note), {})
                by_probe.setdefault(result.probe, []).append(_LAYER.sub("layers.*.", row.name))
    for (candidate, reason), by_probe in found.items():
        where = "" if probes[candidate] <= set(by_probe) else f", {_listed(list(by_probe))}"
        names = list(dict.fromkeys(name for names in by_probe.values() for name in names))
        yield f"not compared ({_brief(candidate)}{where}): {_listed(names)}: {reason}"


def route_flips(report: Report) -> Iterator[str]:
    """Tokens that bfloat16 sent elsewhere when the candidate ran freely."""
    for result in report.results:
        found = [flip for contest in result.contests for flip in contest.flips]
        if found:
            worst = max(flip.margin for flip in found)
            layers = ", ".join(
                f"{len(list(group))} in layer {layer}" if layer is not None else f"{len(list(group))}"
                for layer, group in groupby(found, key=lambda flip: flip.layer)
            )
            yield (
                f"route flips in bfloat16 ({result.level}, {_brief(result.candidate)}): {layers}; "
                f"margin up to {worst:.1e}. What follows was compared with the reference's routes."
            )


def _lines(rows: Sequence[Row], everything: bool) -> Iterator[tuple[str, Row, str]]:
    """Name, row and layer of the worst."""
    if everything:
        yield from ((row.name, row, "") for row in rows)
        return
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alone = row.verdict == "differs" or not _LAYER.search(row.name)
        kind = row.name if alone else _LAYER.sub("layers.*.", row.name, count=1)
        together.setdefault((kind, row.verdict), []).append(row)
    for (kind, _), same in together.items():
        worst = max(same, key=lambda row: row.ratio)
        found = _LAYER.search(worst.name)
        place = found[1] if len(same) > 1 and found else ""
        yield (worst.name if len(same) == 1 else kind), worst, place


def _groups(results: Iterable[ProbeResult], everything: bool) -> Iterator[list[ProbeResult]]:
    """What shares a line: of one probe and candidate, all that holds, and all that fails in the same way."""
    together: dict[tuple[object, ...], list[ProbeResult]] = {}
    for result in results:
        key: tuple[object, ...] = (result.probe, result.candidate)
        if everything:
            key = (*key, result.dtype, result.level)
        elif not result.ok:
            key = (*key, _what_failed(result))
        together.setdefault(key, []).append(result)
    yield from together.values()


def _what_failed(result: ProbeResult) -> str:
    if result.first is not None:
        count = len({row.name for row in result.rows if row.ok is False})
        return f"differs: {result.first.name}" + (f" and {count - 1} more" if count > 1 else "")
    if result.failure is not None:
        return "failed, see below"
    if result.missing:
        return f"not compared: {', '.join(result.missing)}"
    return "nothing was compared"


def _ties(group: Sequence[ProbeResult]) -> str:
    ties, tied, flips = (sum(getattr(result, name) for result in group) for name in ("ties", "tied", "flips"))
    if flips:
        return f"{flips} flip{'s' * (flips != 1)}"
    return f"{ties}/{tied}" if tied else "–"


def _asides(result: ProbeResult) -> Iterator[str]:
    """Notes of the first rows that differ or tie, which the table has no room for; ``--json`` has all of them."""
    noted = [row for row in result.worst_rows() if row.verdict in ("differs", "tie") and row.note]
    yield from (f"{row.name}: {row.note}" for row in noted[:_NAMED])
    if len(noted) > _NAMED:
        yield f"and so on for {len(noted) - _NAMED} more"


def _where(result: ProbeResult) -> str:
    """``"probe one-token, float32, moe"``."""
    return f"probe {', '.join(dict.fromkeys((result.probe, dtype_name(result.dtype), result.level)))}"


def _brief(candidate: str) -> str:
    """``style.py:Block`` of ``a/long/path/style.py:Block``."""
    return candidate.rpartition("/")[2]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _all(probes: int) -> str:
    return f"All {probes} probes hold" if probes > 1 else "The probe holds"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.1e}"

"""``moectl doctor``: is this machine fit, and is anything wrong with this model?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moectl.cli.output import UNWRAPPED, out

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from moectl.doctor.report import Finding, Report

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red", "not made": "dim"}
_SHOWN = 8  # findings of one kind


def command(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|MODEL]",
            help="A run's id, name, prefix or folder, or 'newest'; or a folder with config.json and safetensors."
            " Default: this machine.",
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="A run's checkpoint; default: the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Look at this machine, or at a run or model: one batch, every check, and what to do about each finding.

    Nothing is changed. Ends in exit code 3 when there is a problem; warnings and notes leave it at 0.
    """
    from moectl.errors import ConfigError

    if subject is None and step is not None:
        raise ConfigError("--step needs a run", "Name it: moectl doctor RUN --step 100")
    with out().progress("doctor") as bar:
        if subject is None:
            from moectl.doctor.environment import environment

            report = environment(progress=bar)
        else:
            from moectl.doctor.audit import examine

            report = examine(subject, step=step, progress=bar)
    if as_json:
        out().data(report.to_dict())
    else:
        _show(report)
    return 0 if report.ok else 3


def _show(report: Report) -> None:
    from rich.console import Group

    for note in (report.subject, *report.notes):
        out().say(note)
    alike = _alike(report.findings)
    out().render(Group(_table(report), *map(_found, alike)), piped_width=UNWRAPPED)
    out().say(f"{report.summary()}.")
    codes = dict.fromkeys(group[0].code for group in alike if group[0].code)
    if codes:
        out().say(f"`moectl explain {' '.join(codes)}` says more.")


def _table(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table("check", "", "what was seen", box=box.SIMPLE_HEAD, show_edge=False)
    view.columns[2].overflow = "fold"
    for check in report.checks:
        if check.outcome != "not made":
            view.add_row(Text(check.name), Text(check.outcome, style=_COLOURS[check.outcome]), Text(check.detail))
    reasons: dict[str, list[str]] = {}
    for check in report.checks:
        if check.outcome == "not made":
            reasons.setdefault(check.detail, []).append(check.name)
    for reason, names in reasons.items():  # a dense model has one reason for most of them
        name, detail = (
            (names[0], reason) if len(names) == 1 else (f"{len(names)} checks", f"{reason}: {', '.join(names)}")
        )
        view.add_row(Text(name), Text("not made", style=_COLOURS["not made"]), Text(detail))
    return view


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings with one thing to do about them, such as those of every layer, together."""
    groups: dict[tuple[str, str | None, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.code, finding.todo), []).append(finding)
    return list(groups.values())


def _found(group: list[Finding]) -> RenderableType:
    from rich.text import Text

    first = group[0]
    head = (f"\n{first.severity} {first.code or ''}".rstrip(), _COLOURS[first.severity])
    seen = [f"{'' if each.layer is None else f' layer {each.layer}'}: {each.seen}" for each in group]
    if len(seen) == 1:
        return Text.assemble(head, seen[0], f"\n  → {first.todo}")
    more = [f"\n  and {len(seen) - _SHOWN} more like these (--json has all)"] if len(seen) > _SHOWN else []
    lines = [f"\n {each}" if each.startswith(" ") else f"\n  {each[2:]}" for each in seen[:_SHOWN]]
    return Text.assemble(head, *lines, *more, f"\n  → {first.todo}")

"""What the tables say: the numbers of the report, each beside its reference, at 80 columns and without colour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from moectl.evaluation.losses import EvalReport, LossReport
from moectl.inspection.nulls import Reference, Specialization
from moectl.inspection.routing import RoutingReport
from moectl.inspection.seeds import over_seeds
from moectl.reports import terminal
from moectl.reports.colours import colour, needs_light_text, position
from moectl.resampling import Interval

MakeReport = Callable[..., RoutingReport]


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def row(text: str, first: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_heat_map_cells_are_percentages_of_the_domain(make_report: MakeReport) -> None:
    report = make_report(layers=1)
    layer = report.layers[0]
    text = printed(terminal.heat_map(layer, report))
    for name, load in (*layer.domains.items(), ("all", layer.load)):
        assert row(text, name)[1:9] == [f"{100 * share:.1f}" for share in load.shares]
    assert "uniform 12.5" in text


def test_many_experts_go_over_several_tables_and_none_is_lost(make_report: MakeReport) -> None:
    report = make_report(layers=1, experts=20)
    text = printed(terminal.heat_map(report.layers[0], report))
    shown = [line.split()[1:] for line in text.splitlines() if line.startswith("expert")]
    assert [cell for line in shown for cell in line if cell.isdigit()] == [str(expert) for expert in range(20)]
    assert text.count("\nmath ") == 3


def test_everything_fits_eighty_columns(make_report: MakeReport) -> None:
    text = printed(terminal.routing_report(make_report(layers=4, experts=16)))
    assert "…" not in text.replace("1.0 … ", "").replace("(1.0 …", ""), "a cell was cut"
    assert max(len(line) for line in text.splitlines()) <= 80


def test_balance_stands_beside_balanced_and_collapse_values(make_report: MakeReport) -> None:
    report = make_report()
    text = printed(terminal.balance_table(report))
    for layer in report.layers:
        assert f"{layer.balance:.3f} (1.0 … 8.0)" in text
    numbers = [line.split()[0] for line in text.splitlines() if "(1.0 … 8.0)" in line]
    assert numbers == [str(layer.layer) for layer in report.layers], "the worst layer comes first"


def test_nmi_row_has_value_and_references(make_report: MakeReport) -> None:
    report = make_report()
    text = printed(terminal.nmi_table(report))
    for layer in report.layers:
        nmi = layer.nmi
        assert nmi.step0 is not None and nmi.interval is not None
        assert row(text, str(layer.layer))[1:6] == [
            f"{nmi.value:.3f}",
            f"{nmi.interval.low:.3f}–{nmi.interval.high:.3f}",
            f"{nmi.mutual_information:.3f}",
            f"{nmi.step0.value:.3f}",
            f"{nmi.null_permutation.value:.3f}",
        ]


def claims(permutation: bool, gates: bool, step0: bool | None) -> Specialization:
    def reference(exceeded: bool) -> Reference:
        return Reference(0.1, 0.1, Interval(0.0, 0.2), exceeded)

    start = None if step0 is None else reference(step0)
    return Specialization(0.2, None, 0.1, 1.0, 1.0, reference(permutation), reference(gates), start)


@pytest.mark.parametrize(
    ("nmi", "sentence"),
    [
        (claims(True, True, True), "above all three references (shuffled domains, random gates, step 0)"),
        (claims(True, False, True), "above shuffled domains, step 0, not above random gates"),
        (claims(False, False, False), "not above shuffled domains, random gates or step 0"),
        (claims(True, True, None), "above shuffled domains, random gates; its value at step 0 is not known"),
        (claims(False, False, None), "not above shuffled domains or random gates; its value at step 0 is not known"),
    ],
)
def test_one_run_says_what_it_exceeds_and_no_more(make_report: MakeReport, nmi: Specialization, sentence: str) -> None:
    report = make_report(layers=1)
    report = replace(report, layers=(replace(report.layers[0], nmi=nmi),))
    lines = terminal.what_one_run_says(report)
    assert lines[0] == f"Layer 0: NMI 0.200 is {sentence}."
    assert "One seed is not enough" in lines[-1]


def test_verdict_over_seeds(make_report: MakeReport) -> None:
    text = printed(terminal.verdict_table(over_seeds([make_report()] * 2), [4, 5]))
    assert "seed 4" in text and "seed 5" in text and "not from 2 seeds" in text


def test_verdict_counts_the_seeds_above_all_three(make_report: MakeReport) -> None:
    reports = [replace(make_report(layers=1)) for _ in range(3)]
    layer = reports[2].layers[0]
    beaten = replace(layer.nmi, null_permutation=replace(layer.nmi.null_permutation, exceeded=False))
    reports[2] = replace(reports[2], layers=(replace(layer, nmi=beaten),))
    above = sum(report.layers[0].nmi.exceeds_all for report in reports)
    text = printed(terminal.verdict_table(over_seeds(reports), [0, 1, 2]))
    assert f"{above} of 3" in text and above < 3
    assert "above all three references" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 80


def test_verdict_without_step_0_says_that(make_report: MakeReport) -> None:
    text = printed(terminal.verdict_table(over_seeds([make_report(with_step0=False)] * 3), [0, 1, 2]))
    assert "no step 0" in text and "not from" not in text


def test_one_domain_is_not_judged(make_report: MakeReport) -> None:
    assert terminal.what_one_run_says(make_report(domains=1)) == []
    text = printed(terminal.verdict_table(over_seeds([make_report(domains=1)] * 3), [0, 1, 2]))
    assert "one domain" in text


def test_notes_of_several_runs_stand_once(make_report: MakeReport) -> None:
    reports = [make_report(), replace(make_report(), notes=("Few groups.", "No start."))]
    assert printed(terminal.notes_of(reports)).split("\n")[:2] == ["- Few groups.", "- No start."]
    assert printed(terminal.notes_of([replace(make_report(), notes=())])).strip() == ""


def test_loss_table() -> None:
    losses = LossReport(nll=200.0, tokens=100, bytes=300, groups=5, interval=Interval(1.9, 2.1))
    text = printed(terminal.loss_table(EvalReport(losses, {"code": losses}, blocks=3, complete=True)))
    assert row(text, "code") == ["code", "2.0000", "1.900–2.100", "7.39", "0.9618", "100", "5"]


def test_scale_is_centred_on_uniform() -> None:
    assert position(0.0, 0.125, 0.5) == 0.0
    assert position(0.125, 0.125, 0.5) == 0.5
    assert position(0.5, 0.125, 0.5) == 1.0
    assert position(0.25, 0.25, 0.25) == 0.5
    assert colour(0.5) == (247, 247, 247)
    assert colour(0.0)[2] > colour(0.0)[0] and colour(1.0)[0] > colour(1.0)[2], "blue is low, red is high"


@pytest.mark.parametrize("place", [index / 40 for index in range(41)])
def test_numbers_on_the_scale_are_readable(place: float) -> None:
    """Contrast of at least 4.5 : 1 between text and background, everywhere (WCAG 2, AA)."""
    rgb = colour(place)
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    contrast = 1.05 / (luminance + 0.05) if needs_light_text(rgb) else (luminance + 0.05) / 0.05
    assert contrast >= 4.5


def test_dropped_assignments_have_a_column_where_there_are_any(make_report: MakeReport) -> None:
    report = make_report(layers=2)
    assert "dropped" not in printed(terminal.balance_table(report))
    first, second = report.layers
    total = int(first.load.counts.sum())
    dropped = replace(first, dropped=(total // 10, 0, 0, total // 40, 0, 0, 0, 0))
    text = printed(terminal.balance_table(replace(report, layers=(dropped, second))))
    assert "dropped," in text and "past an expert's" in text
    assert row(text, str(first.layer))[-1] == f"{100 * (total // 10 + total // 40) / total:.1f}" == "12.5"
    assert row(text, str(second.layer))[-1] == "–"
    assert max(len(line) for line in text.splitlines()) <= 80


def test_marks_stand_at_every_number_of_a_marked_report(make_report: MakeReport) -> None:
    report = replace(make_report(layers=2), marks=("non-causal",))
    titles = {
        "Balance by layer, worst first": terminal.balance_table(report),
        "Specialisation: normalised mutual information (NMI) of domain and expert": terminal.nmi_table(report),
        "(uniform 12.5)": terminal.heat_map(report.layers[0], report),
    }
    for title, view in titles.items():
        assert f"{title} [non-causal]" in " ".join(printed(view).split())  # a title longer than its table goes on below
    lines = terminal.what_one_run_says(report)
    assert all("[non-causal] is" in line for line in lines[:-1])
    loss = LossReport(30.0, 10, 20, 3, None)
    table = printed(terminal.loss_table(EvalReport(loss, {"code": loss}, 2, True, ("non-causal",))), 120)
    assert table.splitlines()[0].rstrip().endswith("[non-causal]")
    assert sum(line.lstrip().startswith(("code [non-causal]", "all [non-causal]")) for line in table.splitlines()) == 2
    verdicts = over_seeds([report, report])
    said = printed(terminal.verdict_table(verdicts, [0, 1], ["non-causal"]), 120)
    assert said.splitlines()[0].rstrip().endswith("[non-causal]")
    for view in (terminal.routing_report(make_report(layers=2)), terminal.verdict_table(verdicts, [0, 1])):
        assert "non-causal" not in printed(view)

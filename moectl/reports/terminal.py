"""Tables for the terminal: losses, balance, domain x expert heat-maps, specialisation. rich only.

Everything reads without colour too: a heat-map cell is its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moectl.evaluation.losses import EvalReport, LossReport
from moectl.inspection.nulls import Specialization
from moectl.inspection.routing import LayerReport, LoadReport, RoutingReport
from moectl.inspection.seeds import MINIMUM_SEEDS, LayerVerdict
from moectl.marks import marked
from moectl.reports.colours import colour, needs_light_text, position
from moectl.resampling import Interval

EXPERTS_PER_ROW = 8
#: How references are called in a sentence.
REFERENCE_NAMES = {
    "null_permutation": "shuffled domains",
    "null_random_router": "random gates",
    "step0": "step 0",
}


def loss_table(report: EvalReport) -> RenderableType:
    """Loss, perplexity and bits per byte by domain, and over all tokens."""
    view = _table(
        marked(
            f"Held-out loss: {report.overall.tokens:,} tokens in {report.blocks:,} blocks, language model alone",
            report.marks,
        ),
        ["domain", "LM loss", "95 %", "perplexity", "bits/byte", "tokens", "groups"],
    )
    for name, losses in report.domains.items():
        view.add_row(*_loss_row(marked(name, report.marks), losses))
    view.add_section()
    view.add_row(*_loss_row(marked("all", report.marks), report.overall), style="bold")
    view.caption = "LM loss in nats per token; 95 % by bootstrap over groups of texts."
    return view


def routing_report(report: RoutingReport) -> RenderableType:
    """The whole of ``inspect routing`` for one run."""
    parts: list[RenderableType] = [balance_table(report)]
    parts += [heat_map(layer, report) for layer in report.layers]
    parts.append(nmi_table(report))
    parts += [Text(f"- {line}") for line in (*what_one_run_says(report), *report.notes)]
    return Group(*parts)


def notes_of(reports: Sequence[RoutingReport]) -> RenderableType:
    """What limits the numbers of several runs, each note once."""
    return Group(*(Text(f"- {note}") for note in dict.fromkeys(note for report in reports for note in report.notes)))


def balance_table(report: RoutingReport) -> RenderableType:
    """Load statistics of each layer, the worst balanced first; each number beside its reference."""
    drops = any(layer.dropped is not None for layer in report.layers)
    columns = ["layer", "balance\n(1.0 … E/k)", "load\nCV", "max, %\n(1/E)", "entropy\n(ln E)", "dead\nexperts"]
    view = _table(
        marked("Balance by layer, worst first", report.marks), [*columns, *(["dropped,\n%"] if drops else [])]
    )
    for layer in report.layers:
        view.add_row(
            str(layer.layer),
            f"{layer.balance:.3f} (1.0 … {layer.collapse_value:.1f})",
            f"{layer.load.load_cv:.3f}",
            f"{100 * layer.load.max_share:.1f} ({100 / layer.num_experts:.1f})",
            f"{layer.load.entropy:.3f} ({math.log(layer.num_experts):.3f})",
            _dead(layer.load),
            *([_percent(layer.dropped_fraction)] if drops else []),
        )
    view.caption = (
        "In brackets what to read it by. Balance: Switch value E·Σ f·P, 1.0 balanced, E/k collapsed, never "
        "pooled over layers. Load CV: 0 when balanced. Entropy of the noise-free router, in nats."
    )
    if drops:
        view.caption += " Dropped: share of the assignments past an expert's capacity, which evaluation applies here."
    return view


def heat_map(layer: LayerReport, report: RoutingReport) -> RenderableType:
    """Domain x expert shares of one layer, in percent of each domain's assignments.

    One colour scale over all layers; more than 8 experts are shown in several tables.
    """
    highest = max(share for each in report.layers for load in each.domains.values() for share in load.shares)
    uniform = 1 / layer.num_experts
    title = f"Layer {layer.layer}: where each domain's assignments go, in % (uniform {100 * uniform:.1f})"
    title = marked(title, report.marks)
    parts: list[RenderableType] = [Text(title, style="bold")]
    for start in range(0, layer.num_experts, EXPERTS_PER_ROW):
        experts = range(start, min(start + EXPERTS_PER_ROW, layer.num_experts))
        view = Table(box=None, pad_edge=False, padding=(0, 0))
        view.add_column(Text("expert "), header_style="dim")
        for expert in experts:
            view.add_column(f"{expert} ", justify="right", header_style="dim")
        for name in ("   CV", "  max", " entropy", " dead") if start == 0 else ():
            view.add_column(name, justify="right", header_style="dim")
        for name, load in (*layer.domains.items(), ("all", layer.load)):
            cells = [_heat(load.shares[expert], uniform, highest) for expert in experts]
            view.add_row(Text(f"{name} "), *cells, *(_summary(load) if start == 0 else ()))
        parts.append(view)
    return Group(*parts, Text())


def nmi_table(report: RoutingReport) -> RenderableType:
    """NMI of each layer beside its three references, worst balanced layer first."""
    view = _table(
        marked("Specialisation: normalised mutual information (NMI) of domain and expert", report.marks),
        [
            "layer",
            "NMI",
            "95 %",
            "MI,\nnats",
            "step 0",
            "shuffled\np95",
            "\np",
            "gates\nmean",
            "gates\np95",
            "gates\nmax",
        ],
    )
    for layer in report.layers:
        nmi = layer.nmi
        view.add_row(
            str(layer.layer),
            Text(f"{nmi.value:.3f}", style="bold"),
            _interval(nmi.interval),
            f"{nmi.mutual_information:.3f}",
            _number(None if nmi.step0 is None else nmi.step0.value),
            _number(nmi.null_permutation.value),
            _number(nmi.null_permutation.p_value),
            _number(nmi.null_random_router.mean),
            _number(nmi.null_random_router.value),
            _number(nmi.null_random_router.maximum),
        )
    settings = report.settings
    view.caption = (
        f"shuffled: {settings.permutations:,} shuffles of the domain labels by group; gates: {settings.gates:,} "
        "freshly drawn gates of the same shape on the same hidden states; 95 %: bootstrap over groups."
    )
    return view


def verdict_table(verdicts: Sequence[LayerVerdict], seeds: Sequence[int], marks: Sequence[str] = ()) -> RenderableType:
    """Each layer over several seeds: NMI minus the strongest of its three references."""
    view = _table(
        marked("Specialisation over seeds: NMI minus its strongest reference", marks),
        ["layer", *(f"seed {seed}" for seed in seeds), "mean", "95 %", "seeds above\nall three", "emerged"],
    )
    for verdict in verdicts:
        said = verdict.unknown or ("yes" if verdict.emerged else "no")
        view.add_row(
            str(verdict.layer),
            *(f"{margin:+.3f}" for margin in verdict.margins),
            f"{verdict.mean:+.3f}",
            _interval(verdict.interval, sign=True),
            f"{verdict.above_all} of {len(verdict.values)}",
            said,
        )
    view.caption = (
        "References: shuffled domains and random gates (95th percentiles), step 0. Emerged: over at least "
        f"{MINIMUM_SEEDS} seeds the whole 95 % t interval lies above zero, and every seed's own run is above all "
        "three references."
    )
    return view


def what_one_run_says(report: RoutingReport) -> list[str]:
    """What the numbers of one run allow, and no more; nothing for one domain, where the NMI says nothing."""
    if len(report.domain_names) < 2:
        return []
    lines = [
        f"Layer {layer.layer}: NMI {marked(f'{layer.nmi.value:.3f}', report.marks)} is {_sentence(layer.nmi)}."
        for layer in report.by_depth()
    ]
    lines.append(
        "This is one seed. One seed is not enough to say that specialisation emerged: "
        f"train {MINIMUM_SEEDS} seeds and give all of them to `moectl inspect routing RUN1 RUN2 RUN3`."
    )
    return lines


def above(nmi: Specialization) -> str:
    """Which references the NMI exceeds: ``all three``, ``none``, or their names."""
    exceeded = [REFERENCE_NAMES[name] for name, reference in nmi.references.items() if reference.exceeded]
    if nmi.exceeds_all:
        return "all three"
    return ", ".join(exceeded) or "none"


def _sentence(nmi: Specialization) -> str:
    if nmi.exceeds_all:
        return "above all three references (shuffled domains, random gates, step 0)"
    missed = [REFERENCE_NAMES[name] for name, reference in nmi.references.items() if not reference.exceeded]
    exceeded = above(nmi)
    said = [] if exceeded == "none" else [f"above {exceeded}"]
    said += [f"not above {_joined(missed)}"] if missed else []
    unknown = "; its value at step 0 is not known" if nmi.step0 is None else ""
    return ", ".join(said) + unknown


def _joined(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _loss_row(name: str, losses: LossReport) -> list[str | Text]:
    return [
        Text(name),
        f"{losses.lm_loss:.4f}",
        _interval(losses.interval),
        f"{losses.perplexity:,.2f}",
        f"{losses.bits_per_byte:.4f}",
        f"{losses.tokens:,}",
        f"{losses.groups:,}",
    ]


def _summary(load: LoadReport) -> list[str]:
    return [f"{load.load_cv:.2f}", f"{100 * load.max_share:.1f}", f"{load.entropy:.3f}", str(len(load.dead_experts))]


def _heat(share: float, uniform: float, highest: float) -> Text:
    background = colour(position(share, uniform, highest))
    code = "#{:02x}{:02x}{:02x}".format(*background)
    ink = "#ffffff" if needs_light_text(background) else "#000000"
    return Text(f"{100 * share:5.1f} ", style=Style(color=ink, bgcolor=code))


def _table(title: str, columns: Sequence[str]) -> Table:
    # As a Text: what stands in brackets is a mark, and never markup.
    view = Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    view.title_justify = view.caption_justify = "left"
    view.caption_style = "dim"
    for index, column in enumerate(columns):
        view.add_column(Text(column), justify="left" if index == 0 else "right")
    return view


def _dead(load: LoadReport) -> str:
    dead = load.dead_experts
    return f"{len(dead)}: {', '.join(map(str, dead))}" if dead else "none"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return "–"
    return f"{interval.low:+.3f} … {interval.high:+.3f}" if sign else f"{interval.low:.3f}–{interval.high:.3f}"

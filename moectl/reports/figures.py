"""Figures that can go into a paper: PNG, SVG or PDF by the file's ending. Needs matplotlib.

Colours: one diverging scale for shares (blue, white at uniform 1/E, red), Okabe and Ito's palette
for the rest; both hold up for colour-blind readers, and every reference has its own marker too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl import paths
from moectl.errors import ConfigError, MissingDependencyError
from moectl.inspection.nulls import Specialization
from moectl.inspection.routing import RoutingReport
from moectl.inspection.seeds import LayerVerdict
from moectl.marks import marked
from moectl.reports.colours import DIVERGING, colour, needs_light_text, position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_BLACK, _ORANGE, _BLUE, _GREEN, _GREY = "#000000", "#D55E00", "#0072B2", "#009E73", "#6b6b6b"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # text stays text in PDF and SVG
    "svg.fonttype": "none",
    "svg.hashsalt": "moectl",  # the same figure is the same file
}
_NUMBERS_UP_TO = 16  # experts whose shares are also written into the cells


def check_figure_path(path: Path) -> None:
    """Whether a figure can be drawn there; cheap, so that nobody waits for a report first.

    Raises:
        ConfigError: the ending is none of .png, .svg, .pdf (exit 2).
        MissingDependencyError: matplotlib is not installed (exit 5).
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"cannot draw '{path.name}': its ending is none of {', '.join(FORMATS)}", "Try out.png.")
    paths.use_project_cache()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "figures need matplotlib, which is not installed", "Install it: pip install 'moectl[report]'"
        ) from error


def routing_figure(report: RoutingReport, path: Path, *, title: str) -> Path:
    """Domain x expert shares of every layer with one colour bar, and the NMI beside its references.

    A row per layer, from the model's input (top) to its output; the NMI shares the rows.

    Args:
        report: of one run.
        path: the file to write; its folder is made.
        title: one line, what run this is.

    Raises:
        ConfigError, MissingDependencyError: see :func:`check_figure_path`.
    """
    check_figure_path(path)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return _save(_routing(report, title), path)


def seeds_figure(verdicts: Sequence[LayerVerdict], path: Path, *, title: str) -> Path:
    """NMI minus its strongest reference, a point per seed, with mean and 95 % interval by layer.

    Raises:
        ConfigError, MissingDependencyError: see :func:`check_figure_path`.
    """
    check_figure_path(path)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return _save(_seeds(verdicts, title), path)


def _routing(report: RoutingReport, title: str) -> Figure:
    from matplotlib.figure import Figure

    layers = report.by_depth()
    experts = max(layer.num_experts for layer in layers)
    highest = max(share for layer in layers for load in layer.domains.values() for share in load.shares)
    highest = max(highest, 1.05 / experts)
    map_width = min(max(0.36 * experts, 2.6), 5.2)
    row = max((0.19 if experts <= _NUMBERS_UP_TO else 0.14) * len(report.domain_names), 0.62)
    figure = Figure(figsize=(map_width + 3.9, len(layers) * (row + 0.08) + 1.75), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.03, hspace=0.02, wspace=0.03)
    grid = figure.add_gridspec(
        len(layers) + 1, 2, width_ratios=(map_width + 0.5, 3.2), height_ratios=[row] * len(layers) + [0.72]
    )
    maps = [figure.add_subplot(grid[index, 0]) for index in range(len(layers))]
    values = [figure.add_subplot(grid[0, 1])]
    values += [figure.add_subplot(grid[index, 1], sharex=values[0]) for index in range(1, len(layers))]
    for left, right, layer in zip(maps, values, layers, strict=True):
        shares = [load.shares for load in layer.domains.values()]
        _heat_map(left, shares, report.domain_names, 1 / layer.num_experts, highest)
        left.set_ylabel(f"Layer {layer.layer}", labelpad=6, weight="bold")
        _nmi_row(right, layer.nmi)
        left.tick_params(labelbottom=left is maps[-1])
        right.tick_params(axis="x", labelbottom=right is values[-1], length=2.5 if right is values[-1] else 0)
        right.spines["bottom"].set_visible(right is values[-1])
    maps[0].set_title("a   Expert shares by domain, %", loc="left", weight="bold")
    values[0].set_title("b   NMI of domain and expert", loc="left", weight="bold")
    maps[-1].set_xlabel("Expert")
    values[-1].set_xlabel("Normalised mutual information")
    values[0].set_xlim(left=0)
    values[0].locator_params(axis="x", nbins=5)
    _colour_bar(figure, figure.add_subplot(grid[-1, 0]), 1 / experts, highest)
    _legend(figure.add_subplot(grid[-1, 1]), values[0])
    figure.suptitle(marked(title, report.marks), x=0.012, ha="left", fontsize=8, color=_GREY)
    return figure


def _colour_bar(figure: Figure, place: Axes, uniform: float, highest: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    place.set_axis_off()
    ticks = [0.0, uniform / 2, uniform, (uniform + highest) / 2, highest]
    scale = ScalarMappable(
        TwoSlopeNorm(vcenter=uniform, vmin=0.0, vmax=highest), LinearSegmentedColormap.from_list("shares", DIVERGING)
    )
    bar = figure.colorbar(scale, cax=place.inset_axes((0.0, 0.62, 1.0, 0.2)), orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{100 * tick:.3g} %" for tick in ticks])
    bar.ax.tick_params(length=2.5)
    bar.set_label("Share of assignments (white: uniform, 1/E)")
    bar.outline.set_linewidth(0.5)


def _legend(place: Axes, source: Axes) -> None:
    place.set_axis_off()
    handles, labels = source.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: _LEGEND.index(labels[index]))
    place.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="upper left",
        bbox_to_anchor=(-0.04, 1.05),
        frameon=False,
        handlelength=1.6,
        labelspacing=0.35,
        borderaxespad=0,
    )


def _heat_map(axes: Axes, shares: list[list[float]], names: Sequence[str], uniform: float, highest: float) -> None:
    colours = [[[c / 255 for c in colour(position(s, uniform, highest))] for s in row] for row in shares]
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    experts = len(shares[0])
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(0, experts, max(1, math.ceil(experts / 16))))
    axes.tick_params(length=0)
    axes.set_xticks([x - 0.5 for x in range(1, experts)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(names))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if experts <= _NUMBERS_UP_TO else 0.3)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if experts > _NUMBERS_UP_TO:
        return
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            ink = "white" if needs_light_text(colour(position(share, uniform, highest))) else "black"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5, color=ink)


_LEGEND = (
    "trained router, 95 % interval",
    "random gates: mean – 95th pct., max",
    "shuffled domains: mean – 95th pct., max",
    "before training (step 0)",
)


def _nmi_row(axes: Axes, nmi: Specialization) -> None:
    """One layer: the value with its interval on top, and one lane per reference below it."""
    value_lane, gates_lane, shuffled_lane, start_lane = (0.0, 1.0, 2.0, 3.0)
    for null, lane, ink, label in (
        (nmi.null_random_router, gates_lane, _ORANGE, _LEGEND[1]),
        (nmi.null_permutation, shuffled_lane, _BLUE, _LEGEND[2]),
    ):
        assert null.mean is not None and null.maximum is not None
        axes.plot([null.mean, null.maximum], [lane, lane], color=ink, lw=0.9, solid_capstyle="butt")
        axes.plot([null.mean, null.value], [lane, lane], color=ink, lw=3.6, solid_capstyle="butt", label=label)
        axes.plot(null.value, lane, "|", color=ink, ms=7.5, mew=1.5)
    if nmi.step0 is not None:
        hollow = {"mfc": "white", "mec": _GREEN, "mew": 1.2, "ms": 4.2, "clip_on": False}
        axes.plot(nmi.step0.value, start_lane, "D", ls="", label=_LEGEND[3], **hollow)
    spread = [[0.0], [0.0]]
    if nmi.interval is not None:
        spread = [[max(nmi.value - nmi.interval.low, 0)], [max(nmi.interval.high - nmi.value, 0)]]
    axes.errorbar(
        nmi.value, value_lane, xerr=spread, fmt="o", color=_BLACK, ms=4.8, lw=1.4, capsize=2.5, label=_LEGEND[0]
    )
    axes.set_ylim(3.8, -0.8)
    axes.set_yticks([])
    axes.grid(axis="x", color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_color("#b0b0b0")


def _seeds(verdicts: Sequence[LayerVerdict], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 1.3 + 0.5 * len(verdicts)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color=_GREY, lw=1, zorder=1)
    for row, verdict in enumerate(verdicts):
        seeds = "single seeds" if row == 0 else None
        axes.plot(
            verdict.margins, [row + 0.18] * len(verdict.margins), "o", mfc="white", mec=_BLUE, ms=4.5, label=seeds
        )
        if verdict.interval is not None:
            half = verdict.interval.high - verdict.mean
            label = "mean, 95 % t interval" if row == 0 else None
            axes.errorbar(
                verdict.mean, row - 0.12, xerr=half, fmt="o", color=_BLACK, ms=5, lw=1.4, capsize=2.5, label=label
            )
    _rows(axes, [verdict.layer for verdict in verdicts])
    axes.set_xlabel("NMI minus its strongest reference")
    axes.set_title(title, loc="left")
    axes.locator_params(axis="x", nbins=6)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _rows(axes: Axes, numbers: Sequence[int]) -> None:
    """Layers as rows, the first on top."""
    axes.set_ylim(len(numbers) - 0.5, -0.5)
    axes.set_yticks(range(len(numbers)), [f"Layer {number}" for number in numbers])
    axes.tick_params(axis="y", length=0)
    for edge in range(1, len(numbers)):
        axes.axhline(edge - 0.5, color="#dddddd", lw=0.6, zorder=0)
    axes.grid(axis="x", color="#ececec", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    figure.savefig(path, dpi=300, facecolor="white", metadata=undated)
    return path

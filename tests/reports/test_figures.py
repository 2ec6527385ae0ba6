"""Figures: real files in three formats, the same each time, with the report's numbers in them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.errors import ConfigError, MissingDependencyError
from moectl.inspection.routing import RoutingReport
from moectl.inspection.seeds import over_seeds
from moectl.reports.figures import check_figure_path, routing_figure, seeds_figure

MakeReport = Callable[..., RoutingReport]
MAGIC = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_formats(make_report: MakeReport, tmp_path: Path, suffix: str) -> None:
    path = routing_figure(make_report(layers=2), tmp_path / "new folder" / f"out{suffix}", title="a run")
    assert path.read_bytes().startswith(MAGIC[suffix])


def test_svg_holds_the_numbers(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report()
    texts = re.findall(
        r"<text[^>]*>([^<]*)</text>", routing_figure(report, tmp_path / "a.svg", title="a run").read_text()
    )
    assert "a run" in texts
    for layer in report.layers:
        assert f"Layer {layer.layer}" in texts
        for load in layer.domains.values():
            for share in load.shares:
                assert f"{100 * share:.0f}" in texts
    assert "12.5 %" in texts, "the colour bar names the uniform share"
    assert texts.count("code") == 3


def test_layers_run_from_input_to_output(make_report: MakeReport, tmp_path: Path) -> None:
    text = routing_figure(make_report(layers=4), tmp_path / "a.svg", title="a run").read_text()
    places = [text.index(f">Layer {number}<") for number in range(4)]
    assert places == sorted(places)


def test_the_same_report_is_the_same_file(make_report: MakeReport, tmp_path: Path) -> None:
    files = [routing_figure(make_report(), tmp_path / f"{name}.svg", title="a run") for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "shape", [{"layers": 1, "experts": 2, "domains": 2}, {"layers": 6, "experts": 64, "domains": 5}]
)
def test_small_and_large(make_report: MakeReport, tmp_path: Path, shape: dict[str, int]) -> None:
    assert routing_figure(make_report(**shape), tmp_path / "a.pdf", title="a run").stat().st_size > 5_000


def test_without_step_0(make_report: MakeReport, tmp_path: Path) -> None:
    text = routing_figure(make_report(with_step0=False), tmp_path / "a.svg", title="a run").read_text()
    assert "step 0" not in text


@pytest.mark.parametrize("seeds", [1, 3])
def test_seeds(make_report: MakeReport, tmp_path: Path, seeds: int) -> None:
    text = seeds_figure(over_seeds([make_report()] * seeds), tmp_path / "a.svg", title="seeds").read_text()
    assert "strongest reference" in text
    assert ("t interval" in text) == (seeds > 1)


def test_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its ending is none of \.png, \.svg, \.pdf") as caught:
        check_figure_path(tmp_path / "out.gif")
    assert caught.value.exit_code == 2


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what Python itself does for "not importable"
    with pytest.raises(MissingDependencyError) as caught:
        check_figure_path(tmp_path / "out.png")
    assert caught.value.exit_code == 5
    assert caught.value.hint is not None and "moectl[report]" in caught.value.hint


def test_importing_the_module_needs_no_matplotlib() -> None:
    code = "import sys, moectl.reports.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_marked_report_marks_its_figure_whatever_the_title(make_report: MakeReport, tmp_path: Path) -> None:
    marked = replace(make_report(layers=1), marks=("non-causal",))
    assert ">a run [non-causal]<" in routing_figure(marked, tmp_path / "a.svg", title="a run").read_text()
    again = routing_figure(marked, tmp_path / "b.svg", title="a run [non-causal]").read_text()
    assert again.count("[non-causal]") == 1
    assert "non-causal" not in routing_figure(make_report(layers=1), tmp_path / "c.svg", title="a run").read_text()

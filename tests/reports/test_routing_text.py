"""Colours and marks of generated text, and the sums below it."""

from __future__ import annotations

import math

import pytest

from moectl.models.generation import Said, Visit
from moectl.reports.routing_text import BACKGROUNDS, legend, painted, style_of, summarize, summary_rows

ONE, TWO = Visit((3,), 0.5), Visit((1, 0), 1.0)


def test_marks_stand_behind_a_piece() -> None:
    assert painted(" sea", [ONE], colour=False) == " sea[e3]"
    assert painted("日", [ONE, TWO], colour=False) == "日[e3,e1+e0]"
    assert painted("x", [None], colour=False) == "x" and painted("", [ONE], colour=False) == ""


def test_colour_is_the_first_experts_and_ends_with_each_line() -> None:
    code = style_of(1)
    assert painted("a\nb\n", [TWO], colour=True) == f"\x1b[{code}ma\x1b[0m\n\x1b[{code}mb\x1b[0m\n"
    assert painted("x", [None], colour=True) == "x"


def test_experts_look_different() -> None:
    assert len({style_of(expert) for expert in range(4 * len(BACKGROUNDS))}) == 4 * len(BACKGROUNDS)


def test_the_legend_names_every_expert() -> None:
    assert all(f" e{expert} " in legend(5, 9, colour=True) for expert in range(9))
    assert legend(5, 9, colour=False).startswith("layer 5: [e0] to [e8]")
    assert "\x1b" not in legend(5, 9, colour=False)


def test_shares_are_of_visits_and_entropy_is_a_mean() -> None:
    said = [Said(7, {2: ONE, 4: TWO}), Said(8, {2: Visit((0,), 1.5), 4: Visit((1, 2), 2.0)}), Said(9, {})]
    second, fourth = summarize(said, {2: 4, 4: 3})
    assert second.shares == (0.5, 0.0, 0.0, 0.5) and second.entropy == 1.0 and second.tokens == 2
    assert fourth.shares == (0.25, 0.5, 0.25) and fourth.entropy == 1.5
    assert fourth.to_json()["even_share"] == pytest.approx(1 / 3)
    assert fourth.to_json()["uniform_entropy"] == pytest.approx(math.log(3))
    rows = summary_rows([second, fourth])
    assert rows[0] == ["2", "e0 50.0 e1 0.0 e2 0.0 e3 50.0", "25.0", "1.000 of 1.386", "2"]


def test_nothing_said_is_no_number() -> None:
    (summary,) = summarize([], {0: 2})
    assert summary.tokens == 0 and math.isnan(summary.shares[0]) and math.isnan(summary.entropy)
    assert summary_rows([summary])[0] == ["0", "e0 – e1 –", "50.0", "–", "0"]

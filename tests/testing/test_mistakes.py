"""Every mistake that a router can make fails the check that is named after it, and nothing ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.testing import Report, run_checks, runner
from tests.testing.mistakes import GOOD, GRAPHS, LOADING, MISTAKES, Mistake


def report_on(source: str, folder: Path) -> Report:
    (folder / "mine.py").write_text(source, encoding="utf-8")
    return run_checks(f"{folder}/mine.py:Mine")


def test_the_good_router_passes_every_check(tmp_path: Path) -> None:
    report = report_on(GOOD, tmp_path)
    assert report.ok
    assert {check.name for check in report.checks if check.status != "ok"} == {"buffers"}  # it has none


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake_fails_the_check_named_after_it(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mistake not in GRAPHS.values():
        monkeypatch.delitem(runner.CHECKS, "compile")  # it takes longer than all the others
    report = report_on(mistake.source(), tmp_path)

    failed = {check.name: check.says for check in report.failed}
    expected = set(mistake.fails.split())
    assert expected <= set(failed) if mistake.others else expected == set(failed), failed
    first = mistake.fails.split()[0]
    assert mistake.says in failed[first]
    assert [check.name for check in report.checks] == [runner.LOADS, *runner.CHECKS]
    if mistake in LOADING.values() and first != "options":
        skipped = {check.says for check in report.checks if check.status == "skipped"}
        assert skipped == {f"not run, because '{first}' failed"}


def test_every_check_has_a_mistake_that_it_catches() -> None:
    caught = {name for mistake in MISTAKES.values() for name in mistake.fails.split()[:1]}
    assert caught == {runner.LOADS, *runner.CHECKS}

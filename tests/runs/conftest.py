"""A home of the test's own, and runs made through the real recorder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from moectl import paths
from moectl.runs import RunDir

MakeRun = Callable[..., RunDir]
_CONFIG = """\
name: {name}
model: {{base: tiny}}
moe: {moe}
optim: {{lr: {lr}}}
train: {{steps: {steps}, seed: {seed}, early_stop: {early_stop}}}
eval: {{max_blocks: {max_blocks}}}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("MOECTL_HOME", str(folder))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("MOECTL_GIT_COMMIT", raising=False)
    return folder


@contextmanager
def _nobody() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def without_privileges() -> Callable[[], AbstractContextManager[None]]:
    """Root writes anywhere, read-only or not: inside this, nobody in particular does the work."""
    return _nobody


@pytest.fixture
def make_run(home: Path) -> MakeRun:
    """A run with an evaluation every 100 steps of 1,000 tokens each; ``losses`` are its values.

    As the trainer does it: with ``max_blocks`` those on the way read a part of the split, the last one of a run
    that has ended the whole.
    """

    def build(
        id: str,
        *,
        losses: list[float] = [3.0, 2.5, 2.0],  # noqa: B006 - never changed
        status: str = "finished",
        steps: int = 300,
        seed: int = 0,
        router: str | None = "top1",
        lr: float = 3e-3,
        early_stop: bool = False,
        max_blocks: int | None = None,
        final_loss: float | None = None,
        close: bool = True,
        **record: Any,
    ) -> RunDir:
        moe = "null" if router is None else f"{{router: {{name: {router}}}}}"
        stop = str(early_stop).lower()
        blocks = "null" if max_blocks is None else max_blocks
        config = _CONFIG.format(name=id, moe=moe, lr=lr, steps=steps, seed=seed, early_stop=stop, max_blocks=blocks)
        fields = {
            "router": router,
            "preset": None,
            "moe": router is not None,
            "seed": seed,
            "steps": steps,
            "data": {"id": "d" * 12, "sha256": "e" * 64},
            "commit": "c" * 40,
            "dirty": False,
            **record,
        }
        run = RunDir.create(id, config_yaml=config, record=fields, runs_dir=paths.runs_dir())
        for number, loss in enumerate(losses, start=1):
            run.log(100 * number, 100_000 * number, {"train/lm_loss": loss + 0.1})
            ending = number == len(losses) and status in ("finished", "collapsed", "failed") and final_loss is None
            kind = "eval" if max_blocks is None or ending else "eval_part"
            run.log(100 * number, 100_000 * number, {f"{kind}/lm_loss": loss, f"{kind}/code/lm_loss": loss - 0.5})
        if final_loss is not None:  # a run that stops early is evaluated once more, on the whole split
            run.log(100 * len(losses), 100_000 * len(losses), {"eval/lm_loss": final_loss})
        if status != "running":
            run.update(status=status, step=100 * len(losses), tokens=100_000 * len(losses))
        if close:
            run.release()
        return run

    return build

"""``moectl eval``: held-out loss of a run, by domain, recorded in the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.evaluation.losses import EvalReport, Progress, evaluate
from moectl.walk.loading import run_config
from moectl.walk.measured import Say, record_result, subject


@dataclass(frozen=True)
class EvaluatedRun:
    """One run's held-out losses, and what was measured."""

    header: dict[str, Any]
    report: EvalReport

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {**self.header, **self.report.to_dict(), "marks": self.header["marks"]}


def evaluate_run(
    run: str | Path | None = None,
    *,
    step: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> EvaluatedRun:
    """Loss, perplexity and bits per byte over the whole held-out split.

    Args:
        run: id, name, prefix or folder; None is the newest finished run.
        step: of a checkpoint; None is the last.
        device: auto, cpu or cuda.
        progress: told after every batch.
        say: takes a sentence for the user.

    Raises:
        NotFoundError, CheckError, MissingDependencyError: see :func:`moectl.walk.measured.subject`.
    """
    measured = subject(run, step=step, device=device, say=say)
    batch_size = run_config(measured.run.path).eval.batch_size
    report = evaluate(measured.model, measured.data, batch_size=batch_size, progress=progress)
    result = EvaluatedRun(measured.header(), report)
    record_result(measured, "eval.json", result.to_dict(), report.metrics(), say)
    return result

"""The whole walk at once: a dense baseline and a Mixture of Experts on the same tokens, measured alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.config.loading import load_config
from moectl.config.schema import ExperimentConfig
from moectl.errors import MissingDependencyError, MoectlError
from moectl.runs.compare import Comparison, compare
from moectl.runs.rundir import RunDir
from moectl.walk.evaluate import EvaluatedRun, evaluate_run
from moectl.walk.inspect import InspectedRun, inspect_run
from moectl.walk.train import RunOutcome, RunRequest, start_run

CONFIG = "quickstart"
#: Draws the routing of a run into a file; given by the caller, because figures need an optional package.
Draw = Callable[[InspectedRun, Path], Path]


@dataclass(frozen=True)
class Contestant:
    """One of the two runs, with what was measured of it."""

    outcome: RunOutcome
    record: dict[str, Any]
    losses: EvaluatedRun

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of optimizer steps, without evaluation and checkpoints."""
        return float(self.record["train_tokens"]) / max(float(self.record["train_seconds"]), 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "run": self.outcome.id,
            "parameters": self.record["parameters"],
            "tokens": self.record["tokens"],
            "tokens_per_second": self.tokens_per_second,
            "commit": self.record["commit"],
            "marks": self.record["marks"],
            "eval": self.losses.report.to_dict(),
        }


@dataclass(frozen=True)
class Quickstart:
    """Both runs, their matched comparison, and the routing of the one with experts."""

    dense: Contestant
    moe: Contestant
    comparison: Comparison
    routing: InspectedRun
    figure: Path | None

    @property
    def throughput_ratio(self) -> float:
        """MoE tokens per second over dense tokens per second."""
        return self.moe.tokens_per_second / self.dense.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "dense": self.dense.to_dict(),
            "moe": self.moe.to_dict(),
            "throughput_ratio": self.throughput_ratio,
            "comparison": self.comparison.to_dict(),
            "routing": self.routing.to_dict(),
            "figure": None if self.figure is None else str(self.figure),
        }


def quickstart(request: RunRequest, *, sets: list[str] | None = None, draw: Draw | None = None) -> Quickstart:
    """Prepare, train both, evaluate both, inspect. A run that has ended is not trained again; one that was
    interrupted goes on.

    Args:
        request: as for a training run.
        sets: ``key=value`` changes to the shipped ``quickstart`` config, for both runs.
        draw: draws the figure; without its package the walk goes on and says so.

    Raises:
        MoectlError: a run did not finish (its own exit code), or whatever a step raises.
    """
    config = load_config(CONFIG, sets=sets or [])
    if config.moe is None:
        raise MoectlError("the quickstart compares a dense model with experts: it needs a moe section", exit_code=2)
    if config.name is not None:
        raise MoectlError("the quickstart trains two runs: one name cannot be both", exit_code=2)
    request = replace(request, go_on=True)
    dense = _contestant(config.model_copy(update={"moe": None}), "dense baseline", request)
    request = replace(request, data=dense.record["data"]["id"])
    moe = _contestant(config, f"{config.moe.num_experts} experts, router {config.moe.router_name}", request)
    request.say(f"inspecting the routing of {moe.outcome.id}")
    routing = inspect_run(moe.outcome.folder, say=request.say)
    figure = None
    if draw is not None:
        try:
            figure = draw(routing, moe.outcome.folder / "routing.png")
        except MissingDependencyError as error:
            request.say(f"no figure: {error.message}. {error.hint}")
    return Quickstart(dense, moe, compare([dense.outcome.folder, moe.outcome.folder]), routing, figure)


def _contestant(config: ExperimentConfig, what: str, request: RunRequest) -> Contestant:
    request.say(f"{what}: {config.train.steps:,} steps")
    outcome = start_run(config, request)
    if outcome.status != "finished":
        raise MoectlError(
            f"{outcome.id} did not finish: {outcome.reason}",
            f"Continue it with `moectl train --resume {outcome.id}`, then run the quickstart again.",
            exit_code=outcome.exit_code,
        )
    losses = evaluate_run(outcome.folder, say=request.say)
    return Contestant(outcome, RunDir.open(outcome.folder).record, losses)

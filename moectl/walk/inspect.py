"""``moectl inspect routing``: the routing of one run, or of several seeds of one configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.errors import ConfigError, NotFoundError
from moectl.inspection.routing import InspectSettings, RoutingReport, inspect_routing
from moectl.inspection.seeds import MINIMUM_SEEDS, LayerVerdict, over_seeds
from moectl.marks import marked
from moectl.runs.find import find_run, newest_first, readable_runs
from moectl.runs.subject import Subject as Configured
from moectl.walk.loading import load_run
from moectl.walk.measured import Say, Subject, record_result, subject


@dataclass(frozen=True)
class InspectedRun:
    """One run's routing, and what was measured."""

    header: dict[str, Any]
    report: RoutingReport

    @property
    def title(self) -> str:
        """One line for tables and figures."""
        worst = self.report.layers[0]
        router = f"{self.header['router']}, {worst.num_experts} experts, top-{worst.top_k}"
        what = (
            f"{self.header['run']} · step {self.header['step']:,} · {router} · {self.report.tokens:,} held-out tokens"
        )
        return marked(what, self.header["marks"])

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON; ``emerged`` is null: one seed cannot say."""
        return {
            **self.header,
            **self.report.to_dict(),
            "marks": self.header["marks"],
            "seeds": 1,
            "emerged": None,
            "verdict": f"one seed is not enough to say that specialisation emerged; {MINIMUM_SEEDS} are needed",
        }


@dataclass(frozen=True)
class InspectedSeeds:
    """Several runs' routing, and the verdict over them.

    Attributes:
        runs: in the order given.
        problems: why no verdict is given; empty when there is one.
        verdicts: by layer, in order of depth; empty with ``problems``.
    """

    runs: tuple[InspectedRun, ...]
    problems: tuple[str, ...]
    verdicts: tuple[LayerVerdict, ...]

    @property
    def seeds(self) -> list[int]:
        """Of the runs, in their order."""
        return [int(run.header["seed"]) for run in self.runs]

    @property
    def marks(self) -> list[str]:
        """Of any of the runs: the verdict rests on all of them."""
        return list(dict.fromkeys(mark for run in self.runs for mark in run.header["marks"]))

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "runs": [run.to_dict() for run in self.runs],
            "marks": self.marks,
            "seeds": len(set(self.seeds)),
            "problems": list(self.problems),
            "verdict": [verdict.to_dict() for verdict in self.verdicts],
        }


def inspect_run(
    run: str | Path | None = None,
    *,
    step: int | None = None,
    device: str = "auto",
    settings: InspectSettings | None = None,
    say: Say = lambda text: None,
) -> InspectedRun:
    """Routing statistics of one run over the whole held-out split, beside the value at step 0.

    Args:
        run: id, name, prefix or folder; None is the newest finished run that has experts.
        step: of a checkpoint; None is the last.
        device: auto, cpu or cuda.
        settings: how much to draw.
        say: takes a sentence for the user.

    Raises:
        ConfigError: a dense run.
        NotFoundError, CheckError, MissingDependencyError: see :func:`moectl.walk.measured.subject`.
    """
    folder = newest_moe_run() if run is None else find_run(run)
    measured = subject(folder, step=step, device=device, say=say)
    if not measured.model.moe_layers():
        raise ConfigError(
            f"the run '{measured.run.id}' is dense: it has no experts, so there is no routing to look at",
            "Name a run with experts (`moectl runs ls` shows them), or make one: moectl train --router top1",
        )
    report = inspect_routing(measured.model, measured.data, step0=_before_training(measured, say), settings=settings)
    result = InspectedRun(measured.header(), report)
    metrics = {f"nmi/layer.{layer.layer}": layer.nmi.value for layer in report.layers}
    record_result(measured, "inspect.json", result.to_dict(), metrics, say)
    return result


def inspect_seeds(
    runs: Sequence[str | Path],
    *,
    step: int | None = None,
    device: str = "auto",
    settings: InspectSettings | None = None,
    say: Say = lambda text: None,
) -> InspectedSeeds:
    """Several seeds of one configuration: each run's statistics, and a verdict for each layer.

    No verdict is given, and the reason said, when the runs differ in more than their seed.

    Raises:
        ConfigError: a dense run, or the same run twice.
        NotFoundError, CheckError, MissingDependencyError: see :func:`moectl.walk.measured.subject`.
    """
    folders = [find_run(run) for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("a run is named twice", "Name each seed's run once.")
    inspected = []
    for folder in folders:
        inspected.append(inspect_run(folder, step=step, device=device, settings=settings, say=say))
        say(f"inspected {inspected[-1].title}")
    problems = _differences(folders, inspected)
    verdicts = [] if problems else over_seeds([run.report for run in inspected])
    return InspectedSeeds(tuple(inspected), tuple(problems), tuple(verdicts))


def newest_moe_run() -> Path:
    """The newest finished run with experts.

    Raises:
        NotFoundError: there is none, or no finished run at all (exit 4).
    """
    for run in newest_first(readable_runs()):
        if run.status == "finished" and run.record.get("moe"):
            return run.path
    dense = find_run(None)  # raises where no run has finished
    raise NotFoundError(
        f"no finished run has experts; the newest, '{dense.name}', is dense", "Make one: moectl train --router top1"
    )


def _before_training(measured: Subject, say: Say) -> Any | None:
    """The model at step 0 on the same device, or None where that checkpoint is gone."""
    try:
        start = load_run(measured.run.path, step=0)
    except NotFoundError as error:
        say(error.message)
        return None
    return start.model.to(next(measured.model.parameters()).device)


def _differences(folders: Sequence[Path], inspected: Sequence[InspectedRun]) -> list[str]:
    """Why these runs are not seeds of one thing, in sentences; empty when they are."""
    from moectl.runs.rundir import RunDir

    configurations = [Configured.read(RunDir.open(folder)).configuration for folder in folders]
    keys = sorted({key for configuration in configurations for key in configuration})
    changed = [key for key in keys if any(c.get(key) != configurations[0].get(key) for c in configurations)]
    problems = []
    if changed:
        problems.append(f"The runs differ in more than their seed: {', '.join(changed)}.")
    for key, what in (("data", "were trained on different data"), ("step", "are at different steps")):
        values = [run.header[key] for run in inspected]
        if len(set(values)) > 1:
            problems.append(f"The runs {what}: {', '.join(map(str, values))}.")
    seeds = [run.header["seed"] for run in inspected]
    if len(set(seeds)) < len(seeds):
        problems.append(f"Seeds repeat ({', '.join(map(str, seeds))}): a seed counts once.")
    return problems

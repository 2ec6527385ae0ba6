"""``moectl distill``: a run's model into a dense one, beside the same dense model trained without a teacher.

Both students have the same first weights, data, order of data, schedule and number of tokens; only the loss differs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moectl.config.loading import load_config, parse_set
from moectl.config.schema import ExperimentConfig, ModelConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError, MoectlError
from moectl.evaluation.losses import EvalReport
from moectl.evaluation.paired import Difference, Measured, difference, measure
from moectl.models.config import SIZES
from moectl.runs.find import find_run
from moectl.runs.intervals import MeanInterval, mean_interval
from moectl.runs.rundir import RunDir
from moectl.training.protocol import Progress
from moectl.training.runtime import resolve_device
from moectl.walk.bases import find_base
from moectl.walk.data import dataset_of
from moectl.walk.loading import load_run
from moectl.walk.train import RunOutcome, RunRequest, start_run

DENSE = "dense"
DIRECT, DISTILLED = "direct", "distilled"


@dataclass(frozen=True)
class DistillRequest:
    """What is asked for.

    Attributes:
        teacher: a finished run; None: the newest.
        into: ``dense``: the teacher's own base without experts; else a size, or a dense base.
        temperature, alpha: see :class:`moectl.config.distillation.DistillConfig`.
        steps: of each student; None: as many as the teacher's run.
        seeds: pairs of students, of consecutive seeds.
        data: dataset id, prefix or path; None: the teacher's own.
        sets: further ``key=value`` of the students' config, for both of them.
        command, commit, say, progress: as in a training run.
    """

    teacher: str | None = None
    into: str = DENSE
    temperature: float = 2.0
    alpha: float = 0.5
    steps: int | None = None
    seeds: int = 1
    data: str | None = None
    sets: Sequence[str] = ()
    command: Sequence[str] = ()
    commit: str | None = None
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], Progress | None] = lambda run, steps: None


@dataclass(frozen=True)
class Pair:
    """Two students of one seed, their held-out losses, and by how much the distilled one's differs (nats per token)."""

    seed: int
    direct: RunOutcome
    distilled: RunOutcome
    losses: dict[str, EvalReport]
    difference: Difference


@dataclass(frozen=True)
class Distillate:
    """What came of it.

    Attributes:
        teacher: the run's id; ``teacher_loss`` is measured on the students' held-out split.
        pairs: one for each seed.
        over_seeds: the mean difference with its 95 % interval; without one from a single seed.
    """

    teacher: str
    teacher_loss: EvalReport
    pairs: list[Pair]
    over_seeds: MeanInterval
    temperature: float
    alpha: float

    @property
    def better(self) -> str | None:
        """``distilled`` or ``direct``, where the interval does not hold zero; from one seed that of the texts."""
        sure = self.over_seeds.excludes_zero if len(self.pairs) > 1 else self.pairs[0].difference.excludes_zero
        return (DISTILLED if self.over_seeds.mean < 0.0 else DIRECT) if sure else None

    @property
    def scope(self) -> str:
        """What :attr:`better` speaks of."""
        return "over seeds" if len(self.pairs) > 1 else "these two models of one seed, on these texts"

    @property
    def verdict(self) -> str:
        """A sentence, and what it does not say."""
        one, found = len(self.pairs) == 1, self.over_seeds
        low, high = (self.pairs[0].difference.interval or (None, None)) if one else (found.low, found.high)
        sure = "no interval: too few texts" if low is None else f"95 % interval {low:+.4f} to {high:+.4f}"
        over = "over texts" if one else f"over {found.n} seeds"
        text = f"{DISTILLED} − {DIRECT} = {found.mean:+.4f} nats per token ({sure}, {over}): "
        if self.better is None:
            text += "no difference is shown."
        elif self.better == DISTILLED:
            text += "the distilled model has the lower loss."
        else:
            text += "the model trained directly has the lower loss."
        return text + (" One seed is one seed: --seeds 3 says more." if one else "")

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "teacher": {"id": self.teacher, **_loss(self.teacher_loss)},
            "temperature": self.temperature,
            "alpha": self.alpha,
            "tokens": self.pairs[0].direct.tokens,
            "pairs": [
                {
                    "seed": pair.seed,
                    DIRECT: {"id": pair.direct.id, **_loss(pair.losses[DIRECT])},
                    DISTILLED: {"id": pair.distilled.id, **_loss(pair.losses[DISTILLED])},
                    "difference": pair.difference.mean,
                    "interval": None if pair.difference.interval is None else list(pair.difference.interval),
                }
                for pair in self.pairs
            ],
            "over_seeds": self.over_seeds._asdict(),
            "better": self.better,
            "scope": self.scope,
            "verdict": self.verdict,
        }


def distill(request: DistillRequest) -> Distillate:
    """Train both students of every seed, leaving out what is done, and measure them on the held-out split.

    Raises:
        ConfigError: a teacher that has not finished, a base with experts, a key that is not the students'.
        CheckError: another tokenizer or vocabulary than the teacher's (exit code 3).
        MoectlError: a student did not finish.
    """
    teacher = RunDir.open(find_run(request.teacher))
    configs = student_configs(teacher, request)
    data = request.data or str(dataset_of(teacher.record))
    if request.seeds < 1:
        raise ConfigError(f"--seeds {request.seeds} trains nothing", "Give 1 or more.")
    outcomes: list[dict[str, RunOutcome]] = []
    for number in range(request.seeds):
        pair = {name: _seeded(config, config.train.seed + number) for name, config in configs.items()}
        # The distilled one first: what a teacher cannot teach is told before anything is trained.
        outcomes.append({name: _train(pair[name], data, request) for name in (DISTILLED, DIRECT)})
    opened = PackedDataset.open(load_run(outcomes[0][DIRECT].folder).data)

    def measured(run: Any) -> Measured:
        model = load_run(run).model.to(resolve_device(configs[DIRECT].train.device))
        return measure(model, opened, batch_size=configs[DIRECT].eval.batch_size)

    pairs = []
    for each in outcomes:
        both = {name: measured(each[name].folder) for name in (DIRECT, DISTILLED)}
        reports = {name: found.report for name, found in both.items()}
        seed = int(RunDir.open(each[DIRECT].folder).record["seed"])
        pairs.append(Pair(seed, each[DIRECT], each[DISTILLED], reports, difference(both[DIRECT], both[DISTILLED])))
    over_seeds = mean_interval([pair.difference.mean for pair in pairs])
    found = measured(teacher.path).report
    return Distillate(teacher.id, found, pairs, over_seeds, request.temperature, request.alpha)


def student_configs(teacher: RunDir, request: DistillRequest) -> dict[str, ExperimentConfig]:
    """The configs of both students: the teacher's own, dense, and one of them with the teacher.

    Raises:
        ConfigError: the base has experts, or a key that the students cannot share.
    """
    for text in request.sets:
        key = parse_set(text)[0]
        if key.split(".")[0] in ("distill", "moe", "preset", "name"):
            instead = "--temperature and --alpha" if key.startswith("distill") else "moectl train"
            raise ConfigError(f"--set {key} is not for both students, who are dense", f"Use {instead}.")
    base = [] if request.into == DENSE else [*_own_shape(), f"model.base={json.dumps(request.into)}"]
    plain = ["name=null", "finetune={}", *base, *request.sets]
    taught = {"teacher": teacher.id, "temperature": request.temperature, "alpha": request.alpha}
    sections = {DIRECT: "distill=null", DISTILLED: f"distill={json.dumps(taught)}"}
    configs = {
        name: load_config(
            teacher.path / "config.yaml",
            sets=[*plain, section],
            overrides={"train.steps": request.steps},
            preset="dense",
        )
        for name, section in sections.items()
    }
    chosen = configs[DIRECT].model.base
    if chosen not in SIZES and find_base(chosen, weights=False).moe is not None:
        raise ConfigError(
            f"the base '{chosen}' has experts: it is no start for a dense student",
            f"Name a size ({', '.join(SIZES)}) or a dense base: --into SIZE.",
        )
    return configs


def _own_shape() -> list[str]:
    """Sizes that the teacher's config may set for its own base are not another base's."""
    return [f"model.{key}=null" for key in ModelConfig.model_fields if key != "base"]


def _seeded(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def _train(config: ExperimentConfig, data: str, request: DistillRequest) -> RunOutcome:
    terms = RunRequest(
        data=data,
        command=request.command,
        commit=request.commit,
        go_on=True,
        say=request.say,
        progress=request.progress,
    )
    outcome = start_run(config, terms)
    if outcome.status != "finished":
        raise MoectlError(
            f"the student {outcome.id} is {outcome.status}: {outcome.reason}",
            "Ask again to go on with it." if outcome.status == "interrupted" else f"moectl runs show {outcome.id}",
            exit_code=outcome.exit_code,
        )
    request.say(f"{outcome.id}: {'done before' if outcome.already_done else outcome.reason}")
    return outcome


def _loss(report: EvalReport) -> dict[str, Any]:
    interval = report.overall.interval
    return {"lm_loss": report.overall.lm_loss, "lm_loss_interval": None if interval is None else list(interval)}

"""The teacher of a run that is distilled: which run it is, whether it may teach, and its model."""

from __future__ import annotations

from typing import Any

from moectl import paths
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import Manifest
from moectl.errors import CheckError, ConfigError, NotFoundError
from moectl.models.language_model import LanguageModel
from moectl.runs.find import find_run
from moectl.runs.rundir import RunDir
from moectl.training.distill import Distillation, refuse_other_vocabulary
from moectl.training.protocol import Objective, language_modelling
from moectl.training.runtime import resolve_device
from moectl.walk.data import dataset_of
from moectl.walk.loading import load_run


def with_found_teacher(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its teacher's id (its folder, where it lies elsewhere): a prefix may fit two runs tomorrow.

    Raises:
        NotFoundError, ConfigError: no such run, or several.
    """
    if config.distill is None:
        return config
    folder = find_run(config.distill.teacher)
    name = folder.name if folder.parent.resolve() == paths.runs_dir().resolve() else str(folder)
    return config.model_copy(update={"distill": config.distill.model_copy(update={"teacher": name})})


def teacher_record(config: ExperimentConfig, data: PackedDataset, student: LanguageModel) -> dict[str, Any] | None:
    """For run.json and the run's key: ``{"id", "step", "sha256"}`` of the teacher's checkpoint; None without one.

    Raises:
        ConfigError: it has not finished, or its outputs depend on later tokens.
        CheckError: it was trained with another tokenizer, has another vocabulary than the student, or its checkpoints
            are damaged (exit code 3).
        NotFoundError: no such run, or its dataset is gone.
    """
    if config.distill is None:
        return None
    run = RunDir.open(find_run(config.distill.teacher))
    if run.status != "finished":
        raise ConfigError(
            f"the teacher '{run.id}' is {run.status}, not finished",
            f"Let it finish: moectl train --resume {run.id}; or name a finished run.",
        )
    if any("causal" in str(mark) for mark in run.record.get("marks") or []):
        raise ConfigError(
            f"the teacher '{run.id}' sees later tokens: its distribution holds the answer that the student is to find",
            "Distil from a causal run.",
        )
    try:
        taught = Manifest.load(dataset_of(run.record))
    except NotFoundError as error:
        raise NotFoundError(
            f"whether the data are of the teacher's tokenizer cannot be checked: {error.message}", error.hint
        ) from error
    data.manifest.check_tokenizer(
        taught.tokenizer.sha256,
        f"the teacher '{run.id}'",
        f"Distil on the teacher's own data (--data {taught.id}), or on data of its tokenizer.",
    )
    loaded = load_run(run.path)
    refuse_other_vocabulary(student.vocab_size, loaded.model.vocab_size)
    return {"id": run.id, "step": loaded.step, "sha256": loaded.sha256}


def objective_of(config: ExperimentConfig, recorded: Any) -> Objective:
    """What a run is trained on: the text, or with a teacher its distribution too.

    Args:
        recorded: what run.json says of the teacher.

    Raises:
        NotFoundError: the teacher is gone. CheckError: it is not what it was when the run began.
    """
    if config.distill is None:
        return language_modelling
    try:
        loaded = load_run(config.distill.teacher)
    except NotFoundError as error:
        raise NotFoundError(f"the teacher is gone: {error.message}", "Put its run folder back.") from error
    if not isinstance(recorded, dict) or recorded.get("sha256") != loaded.sha256:
        raise CheckError(
            f"the teacher '{loaded.folder.name}' is not what it was when this run began: its hash differs",
            "Put the run folder back as it was, or start a new run.",
        )
    return Distillation(loaded.model.to(resolve_device(config.train.device)), config.distill)

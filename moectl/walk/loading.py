"""Runs back into models: the latest checkpoint, verified, with the tokenizer that it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.manifest import TOKENIZER_FILE
from moectl.errors import CheckError, NotFoundError
from moectl.hf.folder import build_described, with_kept_router, with_moe
from moectl.models.language_model import LanguageModel
from moectl.runs.find import find_run
from moectl.runs.rundir import RunDir
from moectl.runs.settings import broken_config, read_config
from moectl.training import finetune
from moectl.training.state import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    load_model_strict,
    newest_usable,
    step_name,
)
from moectl.walk.data import dataset_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class LoadedRun(NamedTuple):
    """A run's model and where it came from.

    Attributes:
        model: in eval mode, on the CPU.
        folder: the run folder.
        data: the prepared dataset's folder.
        step: the step of the checkpoint.
        messages: one for every checkpoint passed over on the way to a good one.
        sha256: of the checkpoint's manifest, which lists the hash of every file.
    """

    model: LanguageModel
    folder: Path
    data: Path
    step: int
    messages: list[str]
    sha256: str


def load_run(run: str | Path | None = None, *, step: int | None = None, moe: MoEConfig | None = None) -> LoadedRun:
    """The model of a run (id, unique prefix or folder; None: the newest finished), at its last or a given step.

    Args:
        moe: other settings of its experts than those that it was trained with, for as many and as large ones.

    Raises:
        NotFoundError: no such run, dataset or checkpoint (exit code 4).
        CheckError: the checkpoint is damaged (exit code 3).
    """
    folder = find_run(run)
    checkpoint, model, messages = _newest(folder, moe) if step is None else _at(folder, step, moe)
    return LoadedRun(model.eval(), folder, dataset_of(run_record(folder)), checkpoint.step, messages, checkpoint.sha256)


def load(run: str | Path | None = None) -> tuple[LanguageModel, Tokenizer]:
    """A model, ready to call or generate, and its tokenizer: ``model, tokenizer = moectl.load("RUN")``.

    Args:
        run: a run (id, unique prefix or folder; None: the newest finished), or whatever else ``--base`` takes: a
            folder that ``moectl upcycle`` wrote, a Hugging Face folder, a GGUF file, a known name, a hub id.

    Raises:
        NotFoundError: nothing of that name, or it has no tokenizer.
    """
    from moectl.corpus.tokenization import load_tokenizer
    from moectl.walk.bases import find_base, open_base

    if run is None or (Path(run) / "run.json").is_file():
        loaded = load_run(run)
        return loaded.model, load_tokenizer(loaded.data / TOKENIZER_FILE)
    found = find_base(str(run))
    model = open_base(found).model
    if found.tokenizer is None:
        raise NotFoundError(f"{run} has no {TOKENIZER_FILE}", "Put the model's own into its folder.")
    return model, load_tokenizer(found.tokenizer / TOKENIZER_FILE)


def model_from(checkpoint: Checkpoint, run_folder: Path, moe: MoEConfig | None = None) -> LanguageModel:
    """The model that a checkpoint of a run describes, with its weights in their own dtype.

    Args:
        moe: see :func:`load_run`.

    Raises:
        CheckError: a key is missing, unexpected or of the wrong shape, or no model is described at all.
    """
    try:
        weights = checkpoint.tensors["model"]
        description = with_kept_router(checkpoint.state["model"], run_folder)
        model = build_described(description if moe is None else with_moe(description, moe))
        finetune.apply(model, run_config(run_folder).finetune)  # its adapters have weights of their own
        # Not the buffers: rotary frequencies and balancing biases keep their own dtype.
        for name, parameter in model.named_parameters():
            if name in weights:  # what is missing is named below
                parameter.data = parameter.data.to(weights[name].dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckError(f"the checkpoint {checkpoint.folder.name} describes no model: {error!r}") from error
    load_model_strict(model, weights)
    return model


def run_record(folder: Path) -> dict[str, Any]:
    """What run.json says."""
    return RunDir.open(folder).record


def run_config(folder: Path) -> ExperimentConfig:
    """The resolved configuration that a run was made with.

    Raises:
        MoectlError: config.yaml is missing, broken, or describes no experiment (exit 1), naming its path.
    """
    from pydantic import ValidationError

    try:
        return ExperimentConfig.model_validate(read_config(folder))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise broken_config(folder / "config.yaml", f"{key}: {first['msg']}" if key else first["msg"]) from None


def _newest(folder: Path, moe: MoEConfig | None) -> tuple[Checkpoint, LanguageModel, list[str]]:
    return newest_usable(folder / "checkpoints", lambda found: model_from(found, folder, moe), parts=("model",))


def _at(folder: Path, step: int, moe: MoEConfig | None) -> tuple[Checkpoint, LanguageModel, list[str]]:
    root = folder / "checkpoints"
    if not (root / step_name(step)).is_dir():
        steps = ", ".join(str(kept) for kept in checkpoint_steps(root)) or "none"
        raise NotFoundError(f"the run {folder.name} has no checkpoint of step {step}", f"It has: {steps}.")
    checkpoint = load_checkpoint(root / step_name(step), parts=("model",))
    return checkpoint, model_from(checkpoint, folder, moe), []

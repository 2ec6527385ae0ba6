"""What ``eval`` and ``inspect`` share: a finished run on a device, and its results put into its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl import paths
from moectl.corpus.loader import PackedDataset
from moectl.errors import MoectlError
from moectl.marks import marks_of
from moectl.models.language_model import LanguageModel
from moectl.runs.files import dumps, write_atomic
from moectl.runs.logger import RunRecorder
from moectl.runs.rundir import RunDir
from moectl.training.runtime import resolve_device
from moectl.walk.loading import load_run, run_config

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A run that is about to be measured.

    Attributes:
        run: its folder.
        model: at ``step``, on the device that was asked for.
        data: the prepared dataset, verified.
        step: of the checkpoint.
    """

    run: RunDir
    model: LanguageModel
    data: PackedDataset
    step: int

    @property
    def is_final(self) -> bool:
        """Whether this is the last step that the run has done: only then is the result the run's own."""
        return self.run.record.get("step") == self.step

    def header(self) -> dict[str, Any]:
        """What was measured, with stable keys for JSON."""
        record = self.run.record
        return {
            "run": self.run.id,
            "name": record.get("name", self.run.id),
            "status": self.run.status,
            "step": self.step,
            "seed": record.get("seed"),
            "router": record.get("router"),
            "data": self.data.manifest.id,
            "commit": record.get("commit"),
            "marks": self.marks,
        }

    @property
    def marks(self) -> list[str]:
        """What every number measured here must be read with: what the record says, and what the model is."""
        return list(dict.fromkeys([*(self.run.record.get("marks") or []), *marks_of(self.model)]))


def subject(run: str | Path | None, *, step: int | None, device: str, say: Say) -> Subject:
    """Open a run's model and its data; it is measured with the run's own number of CPU threads, if it set one.

    Raises:
        NotFoundError: no such run, step or dataset (exit 4).
        CheckError: a damaged checkpoint or an edited dataset (exit 3).
        MissingDependencyError: a device that is not there (exit 5).
    """
    target = resolve_device(device)
    loaded = load_run(run, step=step)
    for message in loaded.messages:
        say(message)
    threads = run_config(loaded.folder).train.threads
    if threads is not None:
        torch.set_num_threads(threads)
    data = PackedDataset.open(loaded.data)
    return Subject(RunDir.open(loaded.folder), loaded.model.to(target), data, loaded.step)


def record_result(
    measured: Subject, file: str, document: Mapping[str, Any], metrics: Mapping[str, float], say: Say
) -> None:
    """Put a result into the run: ``file`` in its folder, ``metrics`` into run.json and the registry.

    Only for the run's last step. A run that is being written, or cannot be written, is left alone,
    and the user told: the result itself stands.
    """
    if not measured.is_final:
        return
    run = measured.run
    try:
        run.acquire()
        with RunRecorder(run, paths.registry_path(), warn=say) as recorder:
            write_atomic(run.path / file, dumps(document, indent=1) + "\n")
            recorder.update(metrics={**(run.record.get("metrics") or {}), **metrics})
    except MoectlError as error:
        say(f"not recorded in the run: {error.message}")

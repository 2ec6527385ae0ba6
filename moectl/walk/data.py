"""Which prepared dataset a command means, and making it when it is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.manifest import MANIFEST_FILE, Manifest
from moectl.corpus.prepare import prepare
from moectl.corpus.store import dataset_ids, find_dataset
from moectl.errors import NotFoundError


def dataset_for(
    config: ExperimentConfig, data: str | None, say: Callable[[str], None] = lambda text: None
) -> tuple[Path, ExperimentConfig]:
    """The dataset of a run, and the config with that dataset's own data section.

    ``data`` names one (id, prefix or path). Without it, a config that has a ``data`` section gets
    exactly that dataset, prepared now if need be; else the newest prepared one; else the sample.

    Raises:
        NotFoundError: ``data`` names none.
        MoectlError: whatever ``prepare`` raises.
    """
    if data is not None:
        folder = find_dataset(data)
        wanted = Manifest.load(folder).config
        if "data" in config.model_fields_set and config.data != DataConfig.model_validate(wanted):
            say(f"data: {folder.name}, as asked for by name; the config's own data section is not used")
    elif "data" in config.model_fields_set or not dataset_ids():
        result = prepare(config.data)
        folder = result.folder
        say(f"data: {'prepared' if result.created else 'using'} {folder.name} ({', '.join(config.data.domains)})")
    else:
        folder = find_dataset(None)
        say(f"data: the newest prepared set, {folder.name}")
    recorded = DataConfig.model_validate(Manifest.load(folder).config)
    return folder, config.model_copy(update={"data": recorded})


def dataset_of(record: Mapping[str, Any]) -> Path:
    """The dataset that a run was trained on, by its id; where it was then, if it lies outside the home folder.

    Raises:
        NotFoundError: it is in neither place (exit code 4).
    """
    data = record["data"]
    try:
        return find_dataset(data["id"])
    except NotFoundError as error:
        elsewhere = Path(data.get("folder", ""))
        if (elsewhere / MANIFEST_FILE).is_file():
            return elsewhere
        raise NotFoundError(
            f"the run's dataset {data['id']} is gone",
            "Put its folder back, or prepare it again: the same texts and settings make the same id.",
        ) from error

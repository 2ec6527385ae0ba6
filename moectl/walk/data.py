"""Which prepared dataset a command means, and making it when it is not there yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.manifest import Manifest
from moectl.corpus.prepare import prepare
from moectl.corpus.store import dataset_ids, find_dataset


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
    elif "data" in config.model_fields_set or not dataset_ids():
        result = prepare(config.data)
        folder = result.folder
        say(f"data: {'prepared' if result.created else 'using'} {folder.name} ({', '.join(config.data.domains)})")
    else:
        folder = find_dataset(None)
        say(f"data: the newest prepared set, {folder.name}")
    recorded = DataConfig.model_validate(Manifest.load(folder).config)
    return folder, config.model_copy(update={"data": recorded})

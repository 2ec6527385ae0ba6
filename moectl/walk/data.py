"""Which prepared dataset a command means, making it when it is not there yet, and whether it fits the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.config.schema import DataConfig, ExperimentConfig
from moectl.corpus.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from moectl.corpus.prepare import prepare
from moectl.corpus.store import dataset_ids, datasets_by_age, find_dataset
from moectl.disk import hash_file
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf.bases import known_bases
from moectl.models.config import SIZES

if TYPE_CHECKING:
    from moectl.walk.bases import FoundBase

Say = Callable[[str], None]


def dataset_for(
    config: ExperimentConfig, data: str | None, say: Say = lambda text: None
) -> tuple[Path, ExperimentConfig]:
    """The dataset of a run, and the config with that dataset's own data section.

    ``data`` names one (id, prefix or path). Without it, a config that has a ``data`` section gets
    exactly that dataset, prepared now if need be; else the newest prepared one; else the sample. Under a
    trained base, the newest is the newest of the base's tokenizer, and a tokenizer that is not named is the base's.

    Raises:
        NotFoundError: ``data`` names none.
        CheckError: the data are of another tokenizer than the base's (exit 3), with the command that mends it.
        ConfigError: blocks that are longer than the base takes.
        MoectlError: whatever ``prepare`` raises.
    """
    from moectl.walk.bases import find_base  # which finds runs, and their datasets by dataset_of

    base = find_base(config.model.base, weights=False, say=say)
    if data is not None:
        folder = find_dataset(data)
        wanted = Manifest.load(folder).config
        if "data" in config.model_fields_set and config.data != DataConfig.model_validate(wanted):
            say(f"data: {folder.name}, as asked for by name; the config's own data section is not used")
    elif "data" in config.model_fields_set:
        folder = _prepared(_own(config.data, base), base, say)
    else:
        newest = next(_candidates(config.data, base), None)
        if newest is None:
            folder = _prepared(_own(config.data, base), base, say)
        else:
            folder = newest
            say(f"data: the newest prepared set{'' if base.kind == 'scratch' else f' of the tokenizer of {base.name}'},"
                f" {folder.name}")  # fmt: skip
    manifest = Manifest.load(folder)
    check_fits(manifest, base, say)
    return folder, config.model_copy(update={"data": DataConfig.model_validate(manifest.config)})


def data_config(config: ExperimentConfig, say: Say = lambda text: None) -> DataConfig:
    """What ``prepare`` makes for a config: its data section, with its base's tokenizer where it names none."""
    if config.model.base in SIZES:
        return config.data
    from moectl.walk.bases import find_base

    return _own(config.data, find_base(config.model.base, weights=False, say=say))


def prepared_for(config: ExperimentConfig, data: str | None, base: FoundBase) -> Path | None:
    """The dataset that :func:`dataset_for` would take, where it is prepared already; nothing is made."""
    if data is not None:
        return find_dataset(data)
    if "data" not in config.model_fields_set:
        return next(_candidates(config.data, base), None)
    wanted = _own(config.data, base)
    return next((folder for folder, manifest in _readable() if _is_of(manifest, wanted, base)), None)


def check_fits(manifest: Manifest, base: FoundBase, say: Say = lambda text: None) -> None:
    """Raise unless a dataset can be read by a trained base: its tokenizer, its vocabulary, its positions.

    Raises:
        CheckError: another tokenizer, or token ids that the base has no embedding for (exit 3).
        ConfigError: blocks of more tokens than the base has positions.
    """
    if base.kind == "scratch":
        return
    if base.tokenizer is None:
        say(f"warning: {base.name} has no {TOKENIZER_FILE}: whether the data are of its tokenizer cannot be checked")
    else:
        _check_tokenizer(manifest, base, base.tokenizer)
    if base.vocab_size is not None and manifest.vocab_size > base.vocab_size:
        raise CheckError(
            f"dataset {manifest.id} has token ids up to {manifest.vocab_size - 1:,}, but the base '{base.name}' has"
            f" embeddings for {base.vocab_size:,}",
            f"Prepare with the base's own tokenizer: moectl prepare --tokenizer {_named(base)}"
            if base.tokenizer is not None
            else f"Put the base's own {TOKENIZER_FILE} into {base.folder}, and prepare with it.",
        )
    if base.max_length is not None and manifest.block_size > base.max_length:
        raise ConfigError(
            f"dataset {manifest.id} has blocks of {manifest.block_size:,} tokens, but the base '{base.name}' has"
            f" {base.max_length:,} positions",
            f"moectl prepare --tokenizer {_named(base)} --block-size {base.max_length}",
        )


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


def _prepared(wanted: DataConfig, base: FoundBase, say: Say) -> Path:
    result = prepare(wanted)
    theirs = f", with the tokenizer of {base.name}" if wanted.tokenizer == str(base.tokenizer) else ""
    verb = "prepared" if result.created else "using"
    say(f"data: {verb} {result.folder.name} ({', '.join(wanted.domains)}{theirs})")
    return result.folder


def _own(wanted: DataConfig, base: FoundBase) -> DataConfig:
    """The data that a config asks for, where it names no tokenizer with the base's, in blocks that the base takes."""
    if base.kind == "scratch":
        return wanted
    if base.data is not None and DataConfig.model_validate(Manifest.load(base.data).config) == wanted:
        return wanted  # what the base itself was trained on
    changes: dict[str, Any] = {}
    if "tokenizer" not in wanted.model_fields_set:
        if base.tokenizer is None:
            raise NotFoundError(
                f"{base.name} has no {TOKENIZER_FILE}, and neither config nor --data says what text it reads",
                f"Put the base's own {TOKENIZER_FILE} into its folder, or prepare data and name them: --data.",
            )
        changes["tokenizer"] = str(base.tokenizer)
    elif base.kind == "hf" and base.tokenizer is not None and wanted.tokenizer.startswith("bpe:"):
        raise CheckError(  # known before anything is prepared
            f"data.tokenizer is {wanted.tokenizer}, but the base '{base.name}' has a tokenizer of its own",
            f"Leave data.tokenizer away, or set it to the base's: --set data.tokenizer={_named(base)}",
        )
    if base.max_length is not None and wanted.block_size > base.max_length:
        if "block_size" in wanted.model_fields_set:
            raise ConfigError(
                f"data.block_size is {wanted.block_size:,}, but the base '{base.name}' has"
                f" {base.max_length:,} positions",
                f"--set data.block_size={base.max_length}",
            )
        changes["block_size"] = base.max_length
    return wanted.model_copy(update=changes)


def _candidates(wanted: DataConfig, base: FoundBase) -> Iterator[Path]:
    """Prepared datasets that fit, the newest first; from scratch only that one."""
    if base.kind == "scratch":
        if dataset_ids():
            yield find_dataset(None)
        return
    if base.tokenizer is None:
        return
    for folder, manifest in _readable():
        with suppress(MoectlError):
            check_fits(manifest, base)
            yield folder


def _readable() -> Iterator[tuple[Path, Manifest]]:
    for folder in datasets_by_age():
        with suppress(MoectlError, ValueError):  # a damaged one is none
            yield folder, Manifest.load(folder)


def _is_of(manifest: Manifest, wanted: DataConfig, base: FoundBase) -> bool:
    """Whether a dataset is what ``wanted`` makes; the base's tokenizer is the same from wherever it was read."""
    try:
        made = DataConfig.model_validate(manifest.config)
    except ValueError:
        return False
    if base.tokenizer is not None and wanted.tokenizer == str(base.tokenizer):
        same = manifest.tokenizer.sha256 == hash_file(base.tokenizer / TOKENIZER_FILE)
        return same and made == wanted.model_copy(update={"tokenizer": made.tokenizer})
    return made == wanted


def _check_tokenizer(manifest: Manifest, base: FoundBase, tokenizer: Path) -> None:
    if base.data is not None:
        hint = (
            f"Train on the base's own data (--data {base.data.name}), or prepare with its tokenizer:"
            f" moectl prepare --tokenizer {base.data}"
        )
    else:
        hint = (
            f"Prepare with its tokenizer: moectl prepare --tokenizer {_named(base)}; or leave --data and"
            " data.tokenizer away: training then does it."
        )
    manifest.check_tokenizer(hash_file(tokenizer / TOKENIZER_FILE), f"the base '{base.name}'", hint)


def _named(base: FoundBase) -> str:
    """What --tokenizer takes for a base's own."""
    return base.name if base.name in known_bases() else str(base.tokenizer or base.folder)

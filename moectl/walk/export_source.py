"""What is exported: a run or an upcycled folder, opened, with its tokenizer's files and all that is known of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl.corpus.manifest import TOKENIZER_FILE, Manifest
from moectl.errors import ConfigError, MoectlError
from moectl.hf import gguf
from moectl.hf.bases import base_folder, known_bases
from moectl.hf.folder import RECEIPT, is_folder, load_folder
from moectl.hf.lora import merged
from moectl.hf.pretrained import TOKENIZER_FILES
from moectl.hf.speaker import is_checkpoint
from moectl.models.language_model import LanguageModel
from moectl.runs.files import read_json
from moectl.runs.rundir import RunDir
from moectl.walk.inspect import newest_moe_run
from moectl.walk.loading import load_run
from moectl.walk.models import BESIDE

_LICENCE = re.compile(r"^licen[cs]e:\s*([\w.+-]+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A model to be exported, and where it comes from.

    Attributes:
        name: a run's id or a folder's name.
        model: in eval mode, on the CPU, its adapters merged.
        step: of a run's checkpoint.
        record: a run's run.json; empty of a folder.
        manifest: of the data that a run was trained on.
        receipt: of the upcycling; empty where none is known.
        losses: of the held-out split, as ``moectl eval`` left them for this very step; None where it did not.
        tokenizer: its files.
        licence: of the base; None where it is not known.
        messages: of checkpoints that were passed over.
    """

    name: str
    model: LanguageModel
    step: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] | None = None
    tokenizer: tuple[Path, ...] = ()
    licence: str | None = None
    messages: tuple[str, ...] = ()

    @property
    def positions(self) -> int | None:
        """Length of the rows that a run was trained on."""
        return None if self.manifest is None else self.manifest.block_size


def open_source(name: str | Path | None, *, step: int | None = None) -> Source:
    """The model of a run (id, name, prefix or folder; None: the newest finished with experts) or upcycled folder.

    Raises:
        NotFoundError, CheckError: no such run or step; a damaged checkpoint or folder.
        ConfigError: a step of a folder, or a folder that is a checkpoint of transformers already.
    """
    folder = None if name is None else Path(name).expanduser()
    if folder is not None and is_folder(folder):
        return _of_folder(folder, step)
    if folder is not None and is_checkpoint(folder) and not (folder / "run.json").is_file():
        raise ConfigError(
            f"{folder} is a checkpoint of transformers already", "Give a run, or a folder of `moectl upcycle`."
        )
    return _of_run(newest_moe_run() if name is None else name, step)


def _of_folder(folder: Path, step: int | None) -> Source:
    if step is not None:
        raise ConfigError(f"{folder} is a folder: it has no step {step}", "Leave --step away, or name a run.")
    receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    return Source(
        name=folder.resolve().name,
        model=merged(load_folder(folder)),
        receipt=receipt,
        tokenizer=tokenizer_files([folder]),
        licence=licence_of(str(receipt.get("base", ""))),
    )


def _of_run(name: str | Path, step: int | None) -> Source:
    loaded = load_run(name, step=step)
    record = RunDir.open(loaded.folder).record
    base = record.get("base") or {}
    return Source(
        name=loaded.folder.name,
        model=merged(loaded.model.eval()),
        step=loaded.step,
        record=record,
        manifest=Manifest.load(loaded.data),
        receipt=_read(loaded.folder / RECEIPT) or {},
        losses=_losses(loaded.folder, loaded.step),
        tokenizer=run_tokenizer(loaded.folder, loaded.data),
        licence=licence_of(str(base.get("id", ""))) if base.get("kind") in ("hf", "upcycled") else None,
        messages=tuple(loaded.messages),
    )


def run_tokenizer(folder: Path, data: Path) -> tuple[Path, ...]:
    """The files of a run's tokenizer: its dataset's, with what its base brought along."""
    base = RunDir.open(folder).record.get("base") or {}
    return tokenizer_files([data, folder / BESIDE, *_base_places(base)])


def tokenizer_files(places: list[Path]) -> tuple[Path, ...]:
    """A tokenizer's files from the first folder that has it, or the same one with more beside it.

    A dataset keeps the ``tokenizer.json`` alone; its base's folder has the chat template too.
    """
    having = [place for place in places if (place / TOKENIZER_FILE).is_file()]
    if not having:
        return ()
    same = [place for place in having if _vocabulary(place) == _vocabulary(having[0])]
    files: list[list[Path]] = [[place / name for name in TOKENIZER_FILES if (place / name).is_file()] for place in same]
    return tuple(sorted(files, key=len, reverse=True)[0])


def licence_of(base: str) -> str | None:
    """The licence of a base by its name or folder; None where nothing says it."""
    if base in known_bases():
        return known_bases()[base].licence
    folder = Path(base).expanduser()
    if base and gguf.is_converted(folder):
        return str(gguf.read_source(folder).get("licence") or "") or None
    card = folder / "README.md"
    try:
        head = card.read_text(encoding="utf-8")[:4000]
    except (OSError, UnicodeDecodeError):
        return None
    found = _LICENCE.search(head.split("---")[1]) if head.startswith("---") and head.count("---") > 1 else None
    return found[1] if found else None


def _base_places(base: Mapping[str, Any]) -> list[Path]:
    """The folder of a run's base, where it is still there."""
    if base.get("kind") not in ("hf", "upcycled"):
        return []
    folder = Path(str(base["id"])).expanduser()
    if folder.is_dir():
        return [folder]
    if str(base["id"]) not in known_bases():
        return []  # a hub id: the network is not asked for the sake of a tokenizer
    try:
        return [base_folder(str(base["id"]), weights=False)]
    except MoectlError:
        return []


def _vocabulary(place: Path) -> Any:
    try:
        plain = json.loads((place / TOKENIZER_FILE).read_bytes())
        return plain.get("model"), plain.get("added_tokens")
    except (OSError, ValueError, AttributeError):
        return place  # equal to nothing else


def _losses(folder: Path, step: int) -> Mapping[str, Any] | None:
    """What ``moectl eval`` measured, if it did of this step."""
    found = _read(folder / "eval.json")
    return found if found is not None and found.get("step") == step else None


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    return read_json(file)

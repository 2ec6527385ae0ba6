"""What a run starts from, by whatever name the user has for it: found first, opened when its weights are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moectl import paths
from moectl.config.schema import MoEConfig
from moectl.corpus.manifest import TOKENIZER_FILE
from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean
from moectl.hf.bases import base_folder, known_bases, weights_sha256
from moectl.hf.dense import family_of
from moectl.hf.folder import is_folder, load_folder, read_description, with_kept_router
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.lora import merge
from moectl.hf.pretrained import CONFIG, TOKENIZER_FILES, load_dense, read_config
from moectl.models.config import SIZES
from moectl.models.language_model import LanguageModel
from moectl.runs.find import find_run, readable_runs
from moectl.training.state import newest_checkpoint
from moectl.walk.data import dataset_of
from moectl.walk.loading import load_run, run_record

Say = Callable[[str], None]
LICENCE = "LICENSE"
Kind = Literal["scratch", "run", "hf", "upcycled"]


@dataclass(frozen=True)
class FoundBase:
    """A base that was found: what it is, from its small files alone.

    Attributes:
        name: as the user said it.
        kind: ``scratch`` (a size), ``run``, ``hf`` (a dense model of transformers), ``upcycled`` (a folder that
            ``moectl upcycle`` or ``grow`` wrote).
        folder: of the run or model; None from scratch.
        description: what :meth:`LanguageModel.describe` says of it; empty from scratch.
        data: the dataset that a run was trained on.
    """

    name: str
    kind: Kind
    folder: Path | None = None
    description: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of its ``tokenizer.json``; None where it has none."""
        place = self.data or self.folder
        return place if place is not None and (place / TOKENIZER_FILE).is_file() else None

    @property
    def moe(self) -> MoEConfig | None:
        """What it has experts with."""
        found = self._architecture.get("moe")
        return None if found is None else MoEConfig.model_validate(found)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of its layers with experts."""
        return tuple(self._architecture.get("moe_layers", ()))

    @property
    def num_layers(self) -> int | None:
        return self._number("num_layers", "num_hidden_layers", "n_layer")

    @property
    def vocab_size(self) -> int | None:
        return self._number("vocab_size")

    @property
    def max_length(self) -> int | None:
        """Positions that it was made for; None for no limit."""
        return self._number("max_position_embeddings", "n_positions")

    @property
    def _architecture(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.description.get("decoder", self.description)
        return found

    def _number(self, *names: str) -> int | None:
        sizes = self.description.get("decoder") or self.description.get("config") or {}
        return next((int(sizes[name]) for name in names if sizes.get(name) is not None), None)


class Base(NamedTuple):
    """A base with its weights.

    Attributes:
        name: as the user said it.
        model: in eval mode, on the CPU.
        beside: its tokenizer's files, and its licence.
        folder: of a model of transformers; None for a run.
        record: where it came from, for run.json: ``{"kind", "id", "step", "sha256"}``.
        messages: of checkpoints that were passed over.
    """

    name: str
    model: LanguageModel
    beside: Sequence[Path] = ()
    folder: Path | None = None
    record: Mapping[str, Any] = {}
    messages: Sequence[str] = ()


def find_base(name: str, *, weights: bool = True, say: Say = lambda text: None) -> FoundBase:
    """What the user means: a size, an upcycled folder, a folder or GGUF file, a known name, a run, a hub id.

    Args:
        weights: False where the weights will not be read, and the hub is asked for config and tokenizer alone.

    Raises:
        ConfigError: nothing of that name, or a model that cannot be upcycled (exit 2).
        NotFoundError: a known base that was not fetched (exit 4).
        MoectlError, CheckError: it does not load, or is damaged.
    """
    if name in SIZES:
        return FoundBase(name, "scratch")
    paths.use_project_cache()
    folder = Path(name).expanduser()
    if is_folder(folder):
        return FoundBase(name, "upcycled", folder.resolve(), read_description(folder))
    if not (folder / CONFIG).is_file() and name not in known_bases() and not folder.is_file():
        run = _find_run(name)
        if run is not None:
            return run
    try:
        found = base_folder(name, weights=weights, say=say)
    except MoectlError as error:
        if folder.exists() or name in known_bases() or "/" in name:
            raise
        near = did_you_mean(name, [*SIZES, *known_bases(), *(run.id for run in readable_runs(problems=[]))])
        raise ConfigError(
            f"unknown base '{name}': no size ({', '.join(SIZES)}), no run, no folder, not"
            f" {' or '.join(known_bases())}, and no model of the Hugging Face hub that can be had now",
            near or error.hint,
        ) from error
    config = read_config(found)
    family_of(config)
    plain = json.loads(config.to_json_string(use_diff=False))
    return FoundBase(name, "hf", found.resolve(), {"kind": "hf", "config": plain, "moe": None, "moe_layers": []})


def open_base(base: str | FoundBase, moe: MoEConfig | None = None) -> Base:
    """A base with its weights.

    Args:
        moe: of a base with experts: what its routers, capacity and expert computation are to be set to.

    Raises:
        ConfigError: a base from scratch, which has no weights; see :func:`find_base` for the rest.
    """
    found = find_base(base) if isinstance(base, str) else base
    if found.kind == "scratch":
        raise ConfigError(f"'{found.name}' is a size, not a trained model", "Name a folder, a run or a hub id.")
    assert found.folder is not None
    if found.kind == "run":
        loaded = load_run(found.folder, moe=moe)
        record = {"kind": "run", "id": loaded.folder.name, "step": loaded.step, "sha256": loaded.sha256}
        beside = _files(loaded.data, (TOKENIZER_FILE,))
        return Base(found.name, merge(loaded.model), beside, None, record, loaded.messages)
    record = base_record(found)
    if found.kind == "upcycled":
        model = load_folder(found.folder, moe=moe)
    else:
        model = HFLanguageModel(load_dense(found.folder))
    return Base(found.name, model, _files(found.folder, (*TOKENIZER_FILES, LICENCE)), found.folder, record)


def base_record(found: FoundBase) -> dict[str, Any]:
    """Where weights come from, for run.json: ``{"kind", "id", "step", "sha256"}``; they are hashed, not loaded."""
    assert found.folder is not None
    if found.kind == "run":
        checkpoint, _ = newest_checkpoint(found.folder / "checkpoints", parts=("model",))
        return {"kind": "run", "id": found.folder.name, "step": checkpoint.step, "sha256": checkpoint.sha256}
    named = found.name if _is_name(found.name) else str(found.folder)
    return {"kind": found.kind, "id": named, "step": 0, "sha256": weights_sha256(found.folder)}


def prompts_sha256(moe: MoEConfig) -> str | None:
    """SHA-256 (hex) of the texts that gates start from, those in files too; None without any."""
    if not moe.router_prompts:
        return None
    texts = [Path(text[1:]).expanduser().read_text("utf-8") if text[:1] == "@" else text for text in moe.router_prompts]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _find_run(name: str) -> FoundBase | None:
    """The run of that name; None where there is none. A folder that is no run may still be a model."""
    try:
        folder = find_run(name)
    except NotFoundError:
        return None
    except MoectlError:
        if Path(name).expanduser().is_dir():
            return None
        raise
    checkpoint, _ = newest_checkpoint(folder / "checkpoints", parts=())
    description = with_kept_router(checkpoint.state["model"], folder)
    return FoundBase(name, "run", folder, description, dataset_of(run_record(folder)))


def _is_name(name: str) -> bool:
    """Whether ``name`` means the same from any working folder."""
    return not Path(name).expanduser().exists()


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]

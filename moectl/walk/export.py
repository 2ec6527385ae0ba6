"""``moectl export``: a run with experts becomes a checkpoint that transformers loads, and is held beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moectl import __version__
from moectl.corpus.manifest import TOKENIZER_FILE
from moectl.corpus.tokenization import load_tokenizer
from moectl.errors import CheckError, ConfigError, unknown
from moectl.hf.export import Layout, Plan, plan_export, write_model
from moectl.hf.export_write import SHARD_BYTES, write_json
from moectl.hf.folder import load_folder, save_folder
from moectl.hf.new_folder import new_folder, refuse_existing
from moectl.models import accounting
from moectl.walk.export_card import model_card
from moectl.walk.export_check import Checked, cast_error, check, expected
from moectl.walk.export_source import Source, open_source

Say = Callable[[str], None]
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
FORMATS = ("hf", "moectl")
LAYOUTS = ("fused", "per-expert")


@dataclass(frozen=True)
class ExportRequest:
    """How a model is to be exported.

    Attributes:
        format: ``hf``: a checkpoint of transformers; ``moectl``: the folder that moectl loads, whatever the router.
        family: see :func:`moectl.hf.export.plan_export`.
        layout: ``fused``: experts stacked, as transformers 5 holds them; ``per-expert``: one tensor each, as older
            releases and other tools read them.
        dtype: of the weights; None: as trained.
        step: of a run's checkpoint; None: the last.
        replicate_dense: see :func:`moectl.hf.export.plan_export`.
        shard_bytes: above which the weights are cut into several files.
    """

    format: str = "hf"
    family: str = "auto"
    layout: str = "fused"
    dtype: str | None = None
    step: int | None = None
    replicate_dense: bool = False
    shard_bytes: int = SHARD_BYTES

    def check(self) -> None:
        """Raises ConfigError for words that mean nothing."""
        if self.format not in FORMATS:
            raise unknown("export format", self.format, FORMATS)
        if self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.shard_bytes < 1:
            raise ConfigError("a shard must be of at least one byte", "Give a size above 0.")
        given = {"--family": self.family != "auto", "--layout": self.layout != "fused", "--dtype": self.dtype,
                 "--replicate-dense": self.replicate_dense}  # fmt: skip
        useless = [name for name, said in given.items() if said]
        if self.format == "moectl" and useless:
            raise ConfigError(
                f"{useless[0]} changes nothing: moectl's own folder holds the model as it is", "Leave it away."
            )


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        why: this target.
        refused: plain families that could not say the model, and why.
        checked: against the model; None for moectl's own folder, whose logits are the same bits.
    """

    source: str
    step: int | None
    format: str
    family: str
    architecture: str
    why: str
    layout: str
    dtype: str
    bytes: int
    parameters: Mapping[str, int]
    files: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    checked: Checked | None = None

    @property
    def trust_remote_code(self) -> bool:
        """Whether loading it runs code from the folder."""
        return self.family == "own"

    def to_json(self) -> dict[str, Any]:
        """Everything, with stable keys."""
        plain = {key: value for key, value in vars(self).items() if key != "checked"}
        return {
            **plain,
            "trust_remote_code": self.trust_remote_code,
            "check": None if self.checked is None else self.checked.to_json(),
        }

    def to_text(self) -> str:
        """For a reader."""
        step = "" if self.step is None else f", step {self.step:,}"
        lines = [
            f"{self.source}{step} as {self.architecture} ({self.family})",
            f"why      {self.why}",
            f"weights  {self.bytes:,} bytes, {self.dtype}, experts {self.layout}; {self.parameters['total']:,}"
            " parameters",
        ]
        if self.checked is None:
            lines.append("check    loaded back: the same logits, bit for bit")
        else:
            lines.append(f"check    {self.checked.sentence()}")
        if self.trust_remote_code:
            lines += [f"not {name}: {'; '.join(why)}" for name, why in self.refused.items()]
        return "\n".join(lines)


def export_model(
    name: str | Path | None, out: Path, request: ExportRequest | None = None, *, say: Say = lambda text: None
) -> Exported:
    """Write the model of a run, or of an upcycled folder, into the new folder ``out``.

    Args:
        name: None for the newest finished run with experts.

    Raises:
        ConfigError: the folder exists; a target that cannot say the model, with every reason (exit 2).
        CheckError: the checkpoint, loaded back, computes something else; nothing is left behind (exit 3).
        NotFoundError: no such run or step (exit 4).
    """
    request = request or ExportRequest()
    request.check()
    refuse_existing(out)
    source = open_source(name, step=request.step)
    for message in source.messages:
        say(message)
    if request.format == "moectl":
        return _own_folder(source, out)
    plan = plan_export(
        source.model, family=request.family, replicate_dense=request.replicate_dense, positions=source.positions
    )
    return _checkpoint(source, plan, out, request)


def _checkpoint(source: Source, plan: Plan, out: Path, request: ExportRequest) -> Exported:
    layout: Layout = "per-expert" if request.layout == "per-expert" else "fused"
    native = next(source.model.parameters()).dtype
    dtype = native if request.dtype is None else DTYPES[request.dtype]
    wanted = expected(source.model)
    with new_folder(out) as folder:
        size = write_model(plan, source.model, folder, dtype=None, layout=layout, shard_bytes=request.shard_bytes)
        checked = check(plan, folder, wanted)
        if not checked.holds:
            raise CheckError(
                f"the checkpoint computes something else: {checked.sentence()}",
                "Nothing was kept. Please report it, with the run's config.",
            )
        if dtype != native:
            size = write_model(plan, source.model, folder, dtype=dtype, layout=layout, shard_bytes=request.shard_bytes)
            checked = Checked(**{**vars(checked), "cast": cast_error(plan, folder, wanted)})
        _write_tokenizer(source, plan, folder)
        stored = "experts stacked" if layout == "fused" else "one tensor per expert"
        card = model_card(source, plan, checked, dtype=_name(dtype), stored=stored)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = tuple(sorted(file.name for file in folder.iterdir()))
    counted = accounting.count(source.model)
    return Exported(
        source=source.name,
        step=source.step,
        format="hf",
        family=plan.family,
        architecture=plan.architecture,
        why=plan.sentence(),
        layout=layout,
        dtype=_name(dtype),
        bytes=size,
        parameters={"total": counted.total + plan.extra, "active": counted.active, "added": plan.extra},
        files=files,
        refused=plan.refused,
        checked=checked,
    )


def _write_tokenizer(source: Source, plan: Plan, folder: Path) -> None:
    """The tokenizer's files, chat template and generation settings; those that are missing say the least they must."""
    for file in source.tokenizer:
        shutil.copyfile(file, folder / file.name)
    config = plan.facts.config
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {key: config[key] for key in keys if config.get(key) is not None}
    if not (folder / "generation_config.json").is_file():
        write_json(
            folder / "generation_config.json", {key: value for key, value in special.items() if value is not None}
        )
    settings = folder / "tokenizer_config.json"
    if not source.tokenizer or settings.is_file():
        return
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    eos = special.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    written: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(config.get("max_position_embeddings") or config["n_positions"]),
    }
    if eos is not None and tokenizer.id_to_token(eos) is not None:
        written["eos_token"] = tokenizer.id_to_token(eos)
    write_json(settings, written)


def _own_folder(source: Source, out: Path) -> Exported:
    """The folder that ``moectl upcycle`` writes too."""
    model = source.model
    record = {
        **source.receipt,
        "exported": {
            "by": f"moectl {__version__}",
            "source": source.name,
            "step": source.step,
            "commit": source.record.get("commit"),
            "data": None if source.manifest is None else source.manifest.content_sha256,
        },
    }
    ids = torch.randint(0, model.vocab_size, (2, min(32, model.max_length or 32)))
    save_folder(model, out, receipt=json.loads(json.dumps(record)), beside=source.tokenizer)
    with torch.no_grad():
        same = torch.equal(load_folder(out)(ids), model(ids))
    if not same:
        shutil.rmtree(out, ignore_errors=True)
        raise CheckError("the folder, loaded back, computes something else", "Nothing was kept. Please report it.")
    counted = accounting.count(model)
    return Exported(
        source=source.name,
        step=source.step,
        format="moectl",
        family="moectl",
        architecture=type(getattr(model, "model", model)).__name__,
        why="moectl's own folder holds any model; moectl.load opens it",
        layout="fused",
        dtype=_name(next(model.parameters()).dtype),
        bytes=accounting.weight_bytes(model),
        parameters={"total": counted.total, "active": counted.active, "added": 0},
        files=tuple(sorted(file.name for file in out.iterdir())),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

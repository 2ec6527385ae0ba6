"""``moectl upcycle``: a dense base becomes a Mixture of Experts in a folder of its own, with its receipt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moectl import paths
from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.hf.folder import RECEIPT, is_folder, load_folder, refuse_existing, save_folder
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.pretrained import CONFIG, TOKENIZER_FILES, find_base, load_dense, text_ids
from moectl.hf.upcycle import upcycle
from moectl.models.config import resolve_layers
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.models.upcycle import upcycle_decoder
from moectl.runs.find import find_run
from moectl.walk.loading import load_run
from moectl.walk.receipt import Receipt, measure_dense, shape_of, write_receipt

_RUN_TOKENIZER = ("tokenizer.json",)


class Base(NamedTuple):
    """A dense model, and where it came from.

    Attributes:
        name: as the user said it.
        model: in eval mode, on the CPU.
        beside: its tokenizer's files.
        folder: of a Hugging Face base; None for a run.
    """

    name: str
    model: LanguageModel
    beside: list[Path]
    folder: Path | None


def upcycle_to_folder(
    base: str, out: Path, moe: MoEConfig, *, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> Receipt:
    """Upcycle ``base`` (a local folder, a run, or a hub id) into the new folder ``out``.

    Raises:
        ConfigError: the folder exists; a base, layer list, router or init that does not go together.
        NotFoundError, MoectlError, CheckError: a base that is not there, does not load, or is damaged.
    """
    refuse_existing(out)
    opened = open_base(base)
    say(f"{base}: {type(getattr(opened.model, 'model', opened.model)).__name__}, measured before it is changed")
    model, receipt = upcycle_model(opened, moe, seed=seed)
    save_folder(model, out, receipt=receipt.to_json(), beside=opened.beside)
    return receipt


def upcycle_model(
    base: Base, moe: MoEConfig, *, seed: int = 0, length: int | None = None
) -> tuple[LanguageModel, Receipt]:
    """The upcycled model, and its receipt: what a run has before step 0. A Hugging Face base is changed in place.

    Args:
        moe: ``init: auto`` is ``copy``.
        seed: of all that is drawn; torch's global generator is left as it was.
        length: of a row, for the FLOPs.
    """
    moe = moe.model_copy(update={"init": "copy"}) if moe.init == "auto" else moe
    shape = shape_of(base.model)
    resolve_layers(moe.layers, shape.num_layers)  # before anything is measured: a wrong number is answered at once
    moe.expert_size(shape.mlp_size)
    dense = measure_dense(base.model, seed=seed, length=length)
    experts = [open_base(name).model for name in moe.experts_from]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model: LanguageModel
        if isinstance(base.model, HFLanguageModel):
            donors = [each.model for each in experts if isinstance(each, HFLanguageModel)]
            _same_kind(experts, donors)
            upcycle(base.model.model, moe, generator=generator, experts=donors, prompts=_prompts(base, moe))
            model = base.model
        else:
            assert isinstance(base.model, Decoder)
            decoders = [each for each in experts if isinstance(each, Decoder)]
            _same_kind(experts, decoders)
            model = upcycle_decoder(base.model, moe, generator, experts=decoders).eval()
    return model, write_receipt(dense, model, moe, base=base.name, seed=seed, length=length)


def open_base(base: str) -> Base:
    """A dense model by what the user called it: a folder with a config.json, a run, or an id on the hub.

    Raises:
        ConfigError: it has experts already, or cannot be upcycled.
        NotFoundError, MoectlError, CheckError: it is not there, or does not load.
    """
    paths.use_project_cache()
    folder = Path(base).expanduser()
    if is_folder(folder):
        raise ConfigError(f"{base} has experts already", "Upcycling makes experts out of a dense model.")
    if not (folder / CONFIG).is_file():
        run = _run(base)
        if run is not None:
            return run
    found = find_base(base)
    model = HFLanguageModel(load_dense(found))
    return Base(base, model, _files(found, TOKENIZER_FILES), found)


def load_upcycled(folder: Path) -> tuple[LanguageModel, str]:
    """The model of a folder that :func:`upcycle_to_folder` wrote, and its receipt as JSON text."""
    return load_folder(folder), (folder / RECEIPT).read_text(encoding="utf-8")


def _run(base: str) -> Base | None:
    try:
        find_run(base)
    except NotFoundError:
        return None
    except MoectlError as error:  # a folder that is no run, say: the next to look will tell
        if Path(base).expanduser().is_dir():
            return None
        raise error
    loaded = load_run(base)
    if loaded.model.moe_layers():
        raise ConfigError(f"the run {loaded.folder.name} has experts already", "Upcycle a dense run (preset: dense).")
    return Base(base, loaded.model, _files(loaded.data, _RUN_TOKENIZER), None)


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _same_kind(experts: Sequence[LanguageModel], of_kind: Sequence[object]) -> None:
    if len(experts) != len(of_kind):
        raise ConfigError(
            "a model of moe.experts_from is not of the base's kind: one is a run, the other a Hugging Face model",
            "Experts are fine-tunes of the base.",
        )


def _prompts(base: Base, moe: MoEConfig) -> list[list[Tensor]]:
    """Token ids of each expert's texts."""
    if not moe.router_prompts:
        return []
    assert base.folder is not None
    texts: list[list[str]] = []
    for prompt in moe.router_prompts:
        if not prompt.startswith("@"):
            texts.append([prompt])
            continue
        file = Path(prompt[1:]).expanduser()
        try:
            texts.append([line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()])
        except (OSError, UnicodeDecodeError) as error:
            raise NotFoundError(f"cannot read the texts in {file}: {error}", "See moe.router_prompts.") from error
    longest = base.model.max_length
    return [[ids[:longest] for ids in text_ids(base.folder, group)] for group in texts]

"""``moectl upcycle``: a dense base becomes a Mixture of Experts in a folder of its own, with its receipt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.corpus.tokenization import load_tokenizer
from moectl.errors import ConfigError, NotFoundError
from moectl.hf.folder import RECEIPT, load_folder, save_folder
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.new_folder import refuse_existing
from moectl.hf.pretrained import text_ids
from moectl.hf.upcycle import check_upcycling, upcycle
from moectl.models.config import resolve_layers
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.models.upcycle import check_upcycling as check_decoder
from moectl.models.upcycle import upcycle_decoder
from moectl.walk.bases import Base, find_base, open_base
from moectl.walk.receipt import Receipt, measure_dense, shape_of, write_receipt
from moectl.walk.router_code import router_file


def upcycle_to_folder(
    base: str, out: Path, moe: MoEConfig, *, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> Receipt:
    """Upcycle ``base`` (whatever :func:`moectl.walk.bases.find_base` finds) into the new folder ``out``.

    A router that comes from a file is copied there too: the folder then loads anywhere.

    Raises:
        ConfigError: the folder exists; a base, layer list, router or init that does not go together.
        NotFoundError, MoectlError, CheckError: a base that is not there, does not load, or is damaged.
    """
    refuse_existing(out)
    opened = open_base(find_base(base, say=say))
    say(f"{base}: {type(getattr(opened.model, 'model', opened.model)).__name__}, measured before it is changed")
    model, receipt = upcycle_model(opened, moe, seed=seed)
    save_folder(model, out, receipt=receipt.to_json(), beside=opened.beside, router=router_file(moe))
    return receipt


def upcycle_model(
    base: Base, moe: MoEConfig, *, seed: int = 0, length: int | None = None
) -> tuple[LanguageModel, Receipt]:
    """The upcycled model, and its receipt: what a run has before step 0. A Hugging Face base is changed in place.

    Args:
        moe: ``init: auto`` is ``copy``.
        seed: of all that is drawn; torch's global generator is left as it was.
        length: of a row, for the FLOPs.

    Raises:
        ConfigError: the base has experts already; a layer list, size, router or init that does not fit.
    """
    if base.model.moe_layers():
        raise ConfigError(
            f"{base.name} has experts already", "Upcycling makes experts out of a dense model; moectl grow adds some."
        )
    moe = moe.model_copy(update={"init": "copy"}) if moe.init == "auto" else moe
    shape = shape_of(base.model)
    resolve_layers(moe.layers, shape.num_layers)
    moe.expert_size(shape.mlp_size)
    # All that can be refused is, before anything is measured: that takes a float64 copy of the model.
    experts = [open_base(name).model for name in moe.experts_from]
    donors = [each.model for each in experts if isinstance(each, HFLanguageModel)]
    decoders = [each for each in experts if isinstance(each, Decoder)]
    hugging_face = isinstance(base.model, HFLanguageModel)
    _same_kind(experts, donors if hugging_face else decoders)
    prompts = _prompts(base, moe)
    if isinstance(base.model, HFLanguageModel):
        check_upcycling(base.model.model, moe, donors)
    else:
        assert isinstance(base.model, Decoder)
        check_decoder(base.model, moe, decoders)
    dense = measure_dense(base.model, seed=seed, length=length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model: LanguageModel = base.model
        if isinstance(base.model, HFLanguageModel):
            upcycle(base.model.model, moe, generator=generator, experts=donors, prompts=prompts)
        else:
            model = upcycle_decoder(base.model, moe, generator, experts=decoders).eval()
    return model, write_receipt(dense, model, moe, base=base.name, seed=seed, length=length)


def load_upcycled(folder: Path) -> tuple[LanguageModel, str]:
    """The model of a folder that :func:`upcycle_to_folder` wrote, and its receipt as JSON text."""
    return load_folder(folder), (folder / RECEIPT).read_text(encoding="utf-8")


def _same_kind(experts: Sequence[LanguageModel], of_kind: Sequence[object]) -> None:
    if len(experts) != len(of_kind):
        raise ConfigError(
            "a model of moe.experts_from is not of the base's kind: one is a run, the other a Hugging Face model",
            "Experts are fine-tunes of the base.",
        )


def _prompts(base: Base, moe: MoEConfig) -> list[list[Tensor]]:
    """Token ids of each expert's texts.

    Raises:
        ConfigError: a run of our own as the base, or a tokenizer with ids that the model does not have.
        NotFoundError: texts that cannot be read.
    """
    if not moe.router_prompts or not isinstance(base.model, HFLanguageModel):
        return []  # a run of our own: refused with all else that does not go together
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
    longest, size = base.model.max_length, base.model.vocab_size
    prompts = [[ids[:longest] for ids in _ids(base, group)] for group in texts]
    largest = max((int(ids.max()) for group in prompts for ids in group if ids.numel()), default=0)
    if largest >= size:
        raise ConfigError(
            f"the tokenizer of {base.name} has the id {largest}, but the model's vocabulary has {size:,}",
            "Put the model's own tokenizer beside it.",
        )
    return prompts


def _ids(base: Base, texts: Sequence[str]) -> list[Tensor]:
    if base.folder is not None:
        return text_ids(base.folder, texts)
    tokenizer = load_tokenizer(base.beside[0])  # of a run's dataset
    return [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64) for text in texts]

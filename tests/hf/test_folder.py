"""An upcycled model's folder: whole or not there, verified when read, and never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moectl.config import MoEConfig
from moectl.config.schema import MoEConfig as Schema
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf import upcycle
from moectl.hf.folder import build_described, is_folder, load_folder, save_folder
from moectl.hf.language_model import HFLanguageModel
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.models.growth import append, multiply
from moectl.models.language_model import LanguageModel
from tests.hf.tiny_models import KINDS, some_ids, tiny


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> HFLanguageModel:
    values = {"num_experts": 4, "layers": "0,2", "init": "copy", "init_noise": 0.1, "n_shared_experts": 1, **changes}
    return HFLanguageModel(upcycle(tiny(kind, dtype), MoEConfig.model_validate(values))).eval()


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model(some_ids())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype, router={"name": "sigmoid"})
    save_folder(model, tmp_path / "new" / "moe", receipt={"init": "copy"})
    loaded = load_folder(tmp_path / "new" / "moe")
    assert isinstance(loaded, HFLanguageModel)
    assert torch.equal(logits(loaded), logits(model))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert not loaded.model.training
    mine, theirs = model.model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert {name: t.dtype for name, t in mine.items()} == {name: t.dtype for name, t in theirs.items()}
    if kind == "gpt2":  # tied, and stored once
        assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert loaded.describe() == model.describe()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["moe"]


def test_a_dense_model_and_our_decoder_come_back(tmp_path: Path) -> None:
    dense = HFLanguageModel(tiny("qwen3"))
    save_folder(dense, tmp_path / "dense", receipt={})
    assert torch.equal(logits(load_folder(tmp_path / "dense")), logits(dense))
    shape = DecoderConfig(vocab_size=61, hidden_size=16, intermediate_size=20, num_layers=2, head_dim=4)
    torch.manual_seed(0)
    decoder = Decoder(shape.with_moe(Schema(num_experts=4, layers="last:1"))).eval()
    save_folder(decoder, tmp_path / "ours", receipt={})
    loaded = load_folder(tmp_path / "ours")
    assert isinstance(loaded, Decoder)
    assert torch.equal(logits(loaded), logits(decoder))
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_grown_models_come_back(tmp_path: Path) -> None:
    model = model_of("llama", router={"name": "top2"})
    moe = multiply(model.moe_layers(), model.model.moectl_moe, 2, parts=True)
    model.model.moectl_moe = append(model.moe_layers(), moe, 3)
    save_folder(model, tmp_path / "grown", receipt={})
    loaded = load_folder(tmp_path / "grown")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.moe_layers()[0].experts.num_experts == 11


def test_transformers_refuses_the_folder_instead_of_inventing_mlps(tmp_path: Path) -> None:
    save_folder(model_of("llama"), tmp_path / "moe", receipt={})
    with pytest.raises(ValueError, match="moectl_upcycled"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")


def test_files_beside_and_the_receipt_are_kept_and_listed(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    folder = tmp_path / "moe"
    save_folder(model_of("llama"), folder, receipt={"error": {"float64": 0.0}}, beside=[tokenizer])
    assert json.loads((folder / "receipt.json").read_text()) == {"error": {"float64": 0.0}}
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(listed) == ["config.json", "model.safetensors", "receipt.json", "tokenizer.json"]
    assert is_folder(folder)
    assert not is_folder(tmp_path)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        save_folder(model_of("llama"), tmp_path / "there", receipt={})
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MoectlError, match="cannot write"):
        save_folder(model_of("llama"), tmp_path / "file" / "moe", receipt={})
    with pytest.raises(MoectlError, match="cannot write"):  # what is to be copied is missing: after the weights
        save_folder(model_of("llama"), tmp_path / "moe", receipt={}, beside=[tmp_path / "none"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "there"]


def damaged(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "flipped":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "gone":
        weights.unlink()
    elif kind == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("61", "62"))
    elif kind == "manifest":
        (folder / "manifest.json").write_text("[")
    else:
        (folder / "manifest.json").write_text('{"format": 1, "files": {}}')


@pytest.mark.parametrize("kind", ["flipped", "truncated", "gone", "config", "manifest", "empty"])
def test_damage_is_noticed(tmp_path: Path, kind: str) -> None:
    save_folder(model_of("llama"), tmp_path / "moe", receipt={})
    damaged(tmp_path / "moe", kind)
    with pytest.raises(CheckError) as error:
        load_folder(tmp_path / "moe")
    assert error.value.exit_code == 3


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """A folder whose files are whole, but were written of another model: its manifest is made anew."""
    import hashlib

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "moe"
    save_folder(model_of("llama"), folder, receipt={})
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop("model.norm.weight")
    tensors["model.extra"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    manifest: Any = json.loads((folder / "manifest.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckError) as error:
        load_folder(folder)
    for part in ("model.norm.weight is missing", "model.extra is not known", "lm_head.weight has another shape"):
        assert part in error.value.message


def test_other_folders_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_folder(tmp_path / "none")
    save_folder(model_of("llama"), tmp_path / "moe", receipt={})
    manifest = tmp_path / "moe" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(MoectlError, match="format 2, this release reads 1"):
        load_folder(tmp_path / "moe")


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_is_json_and_makes_the_architecture(kind: str) -> None:
    model = model_of(kind)
    again = build_described(json.loads(json.dumps(model.describe())))
    assert again.describe() == model.describe()
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == mine

"""A base's folder read, and what is said of folders that are none; no network anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf.pretrained import find_base, load_dense
from tests.hf.tiny_models import KINDS, some_ids, tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_in_its_own_dtype(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype)
    model.save_pretrained(tmp_path)
    loaded = load_dense(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(some_ids()).logits, model(some_ids()).logits)


def test_shards_come_back(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path)(some_ids()).logits, model(some_ids()).logits)


def saved(folder: Path) -> Path:
    tiny("llama", torch.float32).save_pretrained(folder)
    return folder


def test_no_folder_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path))
    with pytest.raises(NotFoundError, match="there is no folder /no/such/folder"):
        find_base("/no/such/folder")
    with pytest.raises(
        MoectlError, match="'owner/name' is neither a folder nor a run, and the Hugging Face hub"
    ) as error:
        find_base("owner/name")
    assert "without a network, give a local folder" in str(error.value.hint)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no config.json"):
        load_dense(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(MoectlError, match="is no config of a model"):
        load_dense(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match="'never-heard-of' is not one that transformers knows"):
        load_dense(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(MoectlError, match="transformers cannot load"):
        load_dense(tmp_path)
    with pytest.raises(NotFoundError, match="is a file"):
        find_base(str(tmp_path / "config.json"))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    next(saved(tmp_path).glob("*.safetensors")).unlink()
    with pytest.raises(NotFoundError, match="has a config.json but no weights"):
        load_dense(tmp_path)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    next(saved(tmp_path).glob("*.safetensors")).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is pickled, and reading a pickle runs what is in it"):
        load_dense(tmp_path)
    with pytest.raises(ConfigError, match="is pickled"):
        find_base(str(tmp_path / "pytorch_model.bin"))


def test_damaged_and_incomplete_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = saved(tmp_path).glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # what is loaded is the file itself
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MoectlError, match="transformers cannot load"):
        load_dense(tmp_path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="lack model.layers.1.mlp.up_proj.weight"):
        load_dense(tmp_path)


def edited(folder: Path, **changes: object) -> Path:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))
    return folder


def test_weights_beyond_the_config_are_refused(tmp_path: Path) -> None:
    """Transformers would leave them out and say nothing: a model of two layers, one without biases."""
    with pytest.raises(CheckError, match=r"hold more than its config.json describes: model.layers.2.*, .* and 4 more"):
        load_dense(edited(saved(tmp_path / "deep"), num_hidden_layers=2))
    tiny("qwen2", torch.float32).save_pretrained(tmp_path / "biased")
    said = "describes: model.layers.0.self_attn.k_proj.bias, "
    with pytest.raises(CheckError, match=said) as error:
        load_dense(edited(tmp_path / "biased", model_type="llama", architectures=["LlamaForCausalLM"]))
    assert error.value.exit_code == 3 and "another model" in str(error.value.hint)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_buffers_that_older_releases_saved_are_no_weights(tmp_path: Path, kind: str, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tiny(kind, torch.float32).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    save_file({**tensors, name: torch.ones(4)}, file, metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path)(some_ids()).logits, tiny(kind, torch.float32)(some_ids()).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantised \(bitsandbytes\)",
        ),
        ({"quantization_config": {"quant_method": "of-tomorrow"}}, r"quantised \(of-tomorrow\)"),
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mixtral"}, "experts already"),
        ({"model_type": "opt"}, "the family 'opt' is not supported: its layers"),
    ],
)
def test_models_that_cannot_be_upcycled_are_refused_by_their_config(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    saved(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    if "model_type" in changes:
        plain = {}
    (tmp_path / "config.json").write_text(json.dumps({**plain, **changes}))
    with pytest.raises(ConfigError, match=said):
        load_dense(tmp_path)

"""Which models can be upcycled, where their MLPs are, and what is said of all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from moectl.errors import ConfigError
from moectl.hf.dense import FAMILIES, family_of
from moectl.moe import GatedExperts, MLPExperts
from tests.hf.tiny_models import KINDS, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_computes_what_the_mlp_computes(kind: str) -> None:
    """One expert of that layout, against the MLP itself: bit for bit, in the dtypes that models come in."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = tiny(kind, dtype)
        family = family_of(model)
        mlp = family.mlp_of(family.layers_of(model)[1], "layer 1")
        layout = family.layout_of(mlp)
        size = family.mlp_size(model.config)
        activation = family.activation_of(model.config)
        experts = GatedExperts(1, 32, size) if family.gated else MLPExperts(1, 32, size, activation=activation)  # type: ignore[arg-type]
        experts.to(dtype).load_state_dict({name: tensor[None] for name, tensor in layout.items()})
        x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.no_grad():
            assert torch.equal(experts.one(0, x), mlp(x))


def test_families() -> None:
    assert {kind: family_of(tiny(kind)).name for kind in KINDS} == {
        "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    }  # fmt: skip
    assert {name: family.exports_to for name, family in FAMILIES.items()} == {
        "gpt2": None, "llama": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
    }  # fmt: skip


def test_sizes_come_from_the_config() -> None:
    wide = family_of(tiny("gpt2", n_inner=40)).shape_of(tiny("gpt2", n_inner=40).config)
    assert (wide.mlp_size, wide.query_size, wide.key_size, wide.mlp_matrices) == (40, 32, 32, 2)
    model = tiny("qwen3")
    shape = family_of(model).shape_of(model.config)
    assert (shape.mlp_size, shape.query_size, shape.key_size, shape.mlp_matrices) == (48, 32, 16, 3)
    assert shape.vocab_size == 61


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.BertConfig(), "is an encoder .*'bert'"),
        (transformers.T5Config(), "encoder-decoder .*'t5'"),
        (transformers.Qwen3MoeConfig(), "has experts already|experts already"),
        (transformers.MixtralConfig(), "experts already"),
        (transformers.OPTConfig(num_hidden_layers=1), r"no part 'mlp' .* but self_attn"),
        (transformers.GPTNeoXConfig(num_hidden_layers=1), "matrices of its MLP .* dense_h_to_4h, dense_4h_to_h"),
        (transformers.GemmaConfig(num_hidden_layers=1), "activation 'gelu_pytorch_tanh'"),
        (transformers.OlmoConfig(num_hidden_layers=1), "look like Llama's, but its layers"),
        (transformers.GPT2Config(add_cross_attention=True), "cross-attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_what_cannot_be_upcycled_is_said(config: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        family_of(config)
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_quantised_model_is_refused() -> None:
    config = tiny("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ConfigError, match=r"quantised \(gptq\)"):
        family_of(config)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu' .*hidden_act"),
        ("gpt2", {"activation_function": "relu"}, "activation 'relu' .*activation_function"),
    ],
)
def test_an_activation_that_experts_have_not(kind: str, changes: dict[str, Any], said: str) -> None:
    model = tiny(kind, **changes)
    with pytest.raises(ConfigError, match=said):
        family_of(model).activation_of(model.config)


def test_a_bias_that_experts_have_not() -> None:
    model = tiny("llama", mlp_bias=True)
    family = family_of(model)
    with pytest.raises(ConfigError, match=r"layer 0.mlp.gate_proj has a bias \(mlp_bias\)"):
        family.mlp_of(family.layers_of(model)[0], "layer 0")


def test_a_wrapped_matrix_and_a_model_without_a_head() -> None:
    model = tiny("qwen2")
    family = family_of(model)
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ConfigError, match=r"layer 0.mlp.up_proj is Sequential, not a Linear"):
        family.mlp_of(family.layers_of(model)[0], "layer 0")
    with pytest.raises(ConfigError, match=r"Qwen2Model has no 'model.layers'"):
        family.backbone_of(model.model)

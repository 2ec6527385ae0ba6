"""Model folders in Hugging Face's layout: real tiny models, written by transformers, whole and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DogeConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moectl.cli.app import main
from moectl.doctor.audit import examine
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf.checkpoint_files import CheckpointError
from tests.doctor.test_audit import check, codes, found, snapshot

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


def qwen3(**changes: Any) -> PreTrainedConfig:
    return Qwen3MoeConfig(**{**SHAPE, **MOE, "head_dim": 8, "num_experts": 4, "norm_topk_prob": True, **changes})


def write(
    config: PreTrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    edit: Callable[[Any], None] = lambda model: None,
) -> Path:
    """A model of that config as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(qwen3(), tmp_path_factory.mktemp("models") / "sound")


FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen3_moe": qwen3(),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(**SHAPE, **MOE, num_experts=4, shared_expert_intermediate_size=8),
    "gpt_oss": GptOssConfig(
        **SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "deepseek_v3": DeepseekV3Config(
        **SHAPE, **MOE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_its_family_draws_it_has_no_problem(tmp_path: Path, family: str) -> None:
    report = examine(str(write(FAMILIES[family], tmp_path / family)))
    assert report.ok and codes(report, "problem", "warning") == set(), report.findings
    layers = 1 if family == "deepseek_v3" else 2
    assert f"{layers} of 2 layers have experts" in report.notes
    assert any("1,024 random token ids" in note for note in report.notes)
    # Routes, logits and gradients were really seen: these checks speak of every layer.
    for name in ("dead-experts", "lm-gradient", "causality"):
        assert check(report, name).detail.count("layer ") == layers, check(report, name)
    assert check(report, "router-logits").detail == f"logits in {layers} of {layers} layers"


def test_dense_models_are_looked_at_as_far_as_they_go(tmp_path: Path) -> None:
    report = examine(str(write(LlamaConfig(**SHAPE), tmp_path / "llama")))
    assert report.ok and not report.findings and report.notes[0] == "dense"
    assert "nothing to route" in check(report, "zero-gate").detail
    # Learned positions are counted from the padding: transformers leaves that to the caller.
    gpt2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)
    finding = found(examine(str(write(gpt2, tmp_path / "gpt2"))), "MOE061")
    assert finding.severity == "warning" and "position_ids" in finding.todo


def test_looking_writes_nothing_and_leaves_transformers_as_it_was(sound: Path) -> None:
    from transformers.utils import logging

    before, level = snapshot(sound), logging.get_verbosity()
    try:
        logging.set_verbosity(logging.INFO)
        logging.enable_progress_bar()
        examine(str(sound))
        assert snapshot(sound) == before
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(level)


# --- the balance loss


def pooled_by_hand(logits: list[Tensor], top_k: int) -> float:
    """Switch's E·Σ f·P over the tokens of all layers at once, in float64."""
    all_TE = torch.cat(logits).double()
    probs_TE = all_TE.softmax(-1)
    chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k).indices, 1.0)
    return float(all_TE.shape[1] * (chosen_TE.mean(0) * probs_TE.mean(0)).sum())


def test_the_pooled_balance_loss_is_named_with_its_numbers(tmp_path: Path) -> None:
    def opposite(model: Any) -> None:
        """Layer 0 sends all to experts 0 and 1, layer 1 to 2 and 3."""
        for layer, pair in zip(model.model.layers, ((0, 1), (2, 3)), strict=True):
            layer.post_attention_layernorm.weight.fill_(1.0)
            model.model.embed_tokens.weight[:, 0] = 5.0
            layer.mlp.gate.weight.mul_(0.1)
            layer.mlp.gate.weight[list(pair), 0] += 4.0

    folder = write(qwen3(output_router_logits=True, router_aux_loss_coef=0.01), tmp_path / "m", edit=opposite)
    report = examine(str(folder))
    finding = found(report, "MOE038")
    assert finding.severity == "warning"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (16, 65), generator=generator)[:, :-1]
    with torch.no_grad():
        logits = list(model(ids, output_router_logits=True).router_logits)
    own, worst = pooled_by_hand(logits, 2), max(pooled_by_hand([each], 2) for each in logits)
    assert "it hides that layer" in finding.seen
    # Balanced is 2 and both layers have collapsed (4): pooled, nothing shows.
    assert worst > 3.5 and own < 2.5
    assert f"{own:.3f}, where layer" in finding.seen and f"has {worst:.3f}" in finding.seen
    assert found(examine(str(write(qwen3(), tmp_path / "off"))), "MOE038").severity == "note"
    # A model whose layers are as even as its mean is told how its loss works, and warned of nothing.
    even = found(examine(str(write(qwen3(output_router_logits=True), tmp_path / "even"))), "MOE038")
    assert even.severity == "note" and "it hides nothing" in even.seen and "it is off" not in even.seen


def test_a_coefficient_without_the_switch_is_said_to_be_without_effect(sound: Path, tmp_path: Path) -> None:
    assert "neither computed nor added" in found(examine(str(sound)), "MOE046").seen
    on = examine(str(write(qwen3(output_router_logits=True), tmp_path / "on")))
    assert "MOE046" not in codes(on) and check(on, "balance-gradient").outcome == "ok"
    none = examine(str(write(qwen3(router_aux_loss_coef=0.0), tmp_path / "none")))
    assert check(none, "balance-gradient").outcome == "not made"


def test_probabilities_in_place_of_logits_are_found(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router as transformers 5.0.0 to 5.5.4 had it."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        probs_TE = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight).softmax(-1)
        weights_TK, indices_TK = probs_TE.topk(self.top_k, dim=-1)
        return probs_TE, weights_TK / weights_TK.sum(-1, keepdim=True), indices_TK

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forward)
    report = examine(str(sound))
    assert codes(report, "problem") == {"MOE057"} and [each.layer for each in report.problems] == [0, 1]


# --- planted faults


def same_experts(model: Any) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj[3] = experts.gate_up_proj[1]
    experts.down_proj[3] = experts.down_proj[1]


def zero_gate(model: Any) -> None:
    model.model.layers[1].mlp.gate.weight.zero_()


def not_finite(model: Any) -> None:
    model.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")


@pytest.mark.parametrize(
    ("edit", "code", "said"),
    [
        (same_experts, "MOE058", "such as 1 and 3"),
        (zero_gate, "MOE034", "all zeros"),
        (not_finite, "MOE072", "layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_fault_in_the_weights_is_found_in_its_layer(
    tmp_path: Path, edit: Callable[[Any], None], code: str, said: str
) -> None:
    finding = found(examine(str(write(qwen3(), tmp_path / "m", edit=edit))), code)
    assert finding.severity == "problem" and finding.layer == 1 and said in finding.seen


def test_one_renormalised_expert_gives_its_gate_nothing(tmp_path: Path) -> None:
    """p / p is 1 whatever the gate says; without renormalisation the gate is taught."""
    report = examine(str(write(qwen3(num_experts_per_tok=1), tmp_path / "m")))
    assert codes(report, "problem") == {"MOE032"} and {each.layer for each in report.problems} == {0, 1}
    assert "MOE033" not in codes(report)  # p / p differentiates to rounding, in eval too: that is no straight-through
    assert "MOE032" not in codes(
        examine(str(write(qwen3(num_experts_per_tok=1, norm_topk_prob=False), tmp_path / "n")))
    )


def test_a_gate_in_bf16_warns_with_the_tokens_that_it_moves(tmp_path: Path) -> None:
    def wide(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()

    report = examine(str(write(qwen3(dtype="bfloat16"), tmp_path / "m", dtype=torch.bfloat16, edit=wide)))
    assert report.ok and found(report, "MOE027").severity == "warning"
    seen = found(report, "MOE027").seen
    assert "the gate is bfloat16, and so are its logits" in seen and "of 512 tokens" in seen
    # DeepSeek's router is cast to float32 before it multiplies; transformers keeps its bias there too.
    deepseek = DeepseekV3Config(**FAMILIES["deepseek_v3"].to_dict() | {"dtype": "bfloat16"})
    other = examine(str(write(deepseek, tmp_path / "n", dtype=torch.bfloat16)))
    assert found(other, "MOE027").severity == "note" and "computed in float32" in found(other, "MOE027").seen
    assert "stored in bfloat16; looked at in float32" in report.notes


def test_a_learned_bias_of_the_gate_is_no_balancing_bias(tmp_path: Path) -> None:
    """gpt-oss in bfloat16, as it is published: its logits have the bias, also where they are held against float64."""

    def biased(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.router.weight.normal_()
            layer.mlp.router.bias.copy_(torch.tensor([8.0, 0.0, -8.0, 4.0]))

    config = GptOssConfig(**FAMILIES["gpt_oss"].to_dict() | {"dtype": "bfloat16"})
    report = examine(str(write(config, tmp_path / "m", dtype=torch.bfloat16, edit=biased)))
    assert report.ok and "MOE041" not in codes(report)
    assert check(report, "bias-dtype").outcome == "not made"
    # Without the bias the two sides would choose others for most tokens; rounding alone moves a few per cent.
    shares = [each.seen.rpartition("for ")[2] for each in report.findings if each.code == "MOE027"]
    assert len(shares) == 2 and all(float(share.partition("%")[0]) < 10 for share in shares)


def test_tensors_that_loading_would_skip_are_listed(sound: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(sound, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.gate.bias"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    finding = found(examine(str(folder)), "MOE070")
    assert finding.severity == "problem"
    assert "model.norm.weight: not in the files" in finding.seen and "gate.bias: in the files" in finding.seen
    assert "about the drawn ones too" in finding.seen


# --- folders that cannot be looked at


def test_pickled_weights_are_refused_unread(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(sound / "config.json", folder)
    trap = tmp_path / "opened"
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    assert main(["doctor", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "MOE069" in said and "save_pretrained" in said and "pytorch_model.bin" in said
    assert not trap.exists()


def test_a_damaged_file_is_named(sound: Path, tmp_path: Path) -> None:
    for name, spoil in {
        "header": lambda raw: b"\xff\xff\xff\xff\xff\xff\xff\x7f" + raw[8:],
        "cut": lambda raw: raw[:-100],
        "empty": lambda raw: b"",
    }.items():
        folder = tmp_path / name
        shutil.copytree(sound, folder)
        file = folder / "model.safetensors"
        file.write_bytes(spoil(file.read_bytes()))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: a truncated file or a corrupt header"):
            examine(str(folder))


def test_a_missing_shard_and_a_broken_index_are_named(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(sound)
    model.save_pretrained(folder, max_shard_size="10KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and examine(str(folder)).ok
    shards[0].unlink()
    with pytest.raises(NotFoundError, match=shards[0].name):
        examine(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="index.json holds a JSON list"):
        examine(str(folder))
    # A path that leads out of the folder is not followed, though transformers would.
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../sound/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in that folder"):
        examine(str(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "qwen3_mooe", "architectures": ["Qwen3MooeForCausalLM"]}, "Qwen3MooeForCausalLM"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no causal language model"),
        ({}, "model_type None"),
    ],
)
def test_an_unsupported_architecture_is_named(sound: Path, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = tmp_path / "m"
    shutil.copytree(sound, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoectlError, match=said) as caught:
        examine(str(folder))
    assert caught.value.exit_code == 2
    if config.get("model_type") == "qwen3_mooe":
        assert "qwen3_moe" in (caught.value.hint or "")


def test_experts_in_another_layout_are_said_to_be_unsupported(tmp_path: Path) -> None:
    """Doge's experts are rows of embeddings, which a product of keys chooses."""
    doge = DogeConfig(**SHAPE, head_dim=8, is_moe=True, num_experts=16, num_experts_per_tok=2)
    with pytest.raises(ConfigError, match="'DogeForCausalLM' is not supported: its experts"):
        examine(str(write(doge, tmp_path / "m")))


def test_a_family_with_experts_may_be_written_without(tmp_path: Path) -> None:
    report = examine(str(write(qwen3(mlp_only_layers=[0, 1]), tmp_path / "m")))
    assert report.ok and report.notes[0] == "dense"


def test_folders_that_are_neither_are_told_apart(tmp_path: Path, sound: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a run .* it is empty"):
        examine(str(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"neither .* it holds notes\.txt"):
        examine(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is a file"):
        examine(str(sound / "config.json"))
    (tmp_path / "bare").mkdir()
    shutil.copy(sound / "config.json", tmp_path / "bare")
    with pytest.raises(NotFoundError, match=r"holds no \*\.safetensors"):
        examine(str(tmp_path / "bare"))
    shutil.copytree(sound, tmp_path / "unnamed")
    (tmp_path / "unnamed" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        examine(str(tmp_path / "unnamed"))
    (tmp_path / "bare" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        examine(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="--step is for runs"):
        examine(str(sound), step=3)


def test_a_config_that_does_not_fit_its_code_is_one_sentence(tmp_path: Path) -> None:
    wrong = FAMILIES["deepseek_v3"].to_dict() | {"num_key_value_heads": 1}
    config = DeepseekV3Config(**wrong)
    with pytest.raises(CheckError, match="cannot be run: RuntimeError: The size of tensor"):
        examine(str(write(config, tmp_path / "m")))

"""Exported folders compute what the model computes: every family, base, router, layer list and layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moectl.errors import CheckError, ConfigError, MoectlError
from moectl.hf.export import plan_export, reload, write_model
from moectl.hf.new_folder import new_folder
from moectl.hf.targets import TARGETS
from moectl.models.language_model import LanguageModel
from tests.hf.export_models import BASES, model_of
from tests.hf.tiny_models import some_ids

ROUTERS: list[Any] = ["top1", "switch", "top2", {"name": "topk", "top_k": 3, "norm_topk_prob": False}, "sigmoid"]
LAYERS = {"all": "all", "some": "last:1"}
#: Float32 sums in another order: the largest seen is 9e-6, of logits up to 3.
TOLERANCE = 2e-5


def difference(model: LanguageModel, folder: Path, plan: Any) -> float:
    with torch.no_grad():
        theirs = reload(plan, folder, torch.float32)(input_ids=some_ids()).logits
        return float((theirs - model(some_ids())).abs().max())


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_transformers_computes_the_same(tmp_path: Path, base: str, router: Any, layers: str) -> None:
    model = model_of(base, router, LAYERS[layers])
    plan = plan_export(model)
    write_model(plan, model, tmp_path, dtype=None)
    assert difference(model, tmp_path, plan) <= TOLERANCE
    assert (plan.target is None) == (base == "gpt2")
    if plan.target is not None:
        write_model(plan, model, tmp_path, dtype=None, layout="per-expert")
        assert any(".experts.3." in name for name in load_file(tmp_path / "model.safetensors"))
        assert difference(model, tmp_path, plan) <= TOLERANCE


#: What else a base may have; and the same in the folder with its own code.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 16}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}),
    ("llama", {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    ("llama", {"router": "sigmoid", "rms_norm_eps": 1e-2}),
    ("llama", {"router": {"name": "sigmoid", "routed_scaling_factor": 2.5, "norm_topk_prob": False}}),
    ("llama", {"router": {"name": "sigmoid", "n_group": 2, "topk_group": 2}}),
    ("llama", {"router": {"name": "sigmoid", "n_group": 2, "topk_group": 1}}),
    ("llama", {"router": {"name": "top2", "logit_clamp": 0.5}}),
    ("llama", {"moe": {"n_shared_experts": 2}, "layers": "1"}),
    ("llama", {"moe": {"n_shared_experts": 2}, "router": "sigmoid", "layers": "last:2"}),
    ("llama", {"moe": {"expert_intermediate_size": 16}, "layers": "0,2"}),
    ("gpt2", {"moe": {"n_shared_experts": 1}, "router": "top2"}),
    ("gpt2", {"n_inner": 40, "activation_function": "gelu_pytorch_tanh"}),
    ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": 5, "layers": "1"}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
]


@pytest.mark.parametrize("family", ["auto", "own"])
@pytest.mark.parametrize(("base", "changes"), VARIANTS, ids=str)
def test_every_trait_of_a_base_is_said(tmp_path: Path, base: str, changes: dict[str, Any], family: str) -> None:
    model = model_of(base, **changes)
    plan = plan_export(model, family=family)
    write_model(plan, model, tmp_path, dtype=None)
    assert difference(model, tmp_path, plan) <= TOLERANCE


def test_dense_layers_become_equal_experts(tmp_path: Path) -> None:
    model = model_of("llama", "top2", "1")
    plan = plan_export(model, family="mixtral", replicate_dense=True)
    assert plan.replicate_dense and plan.extra > 0
    for layout in ("fused", "per-expert"):
        write_model(plan, model, tmp_path, dtype=None, layout=layout)  # type: ignore[arg-type]
        assert difference(model, tmp_path, plan) <= TOLERANCE
    assert not plan_export(model_of("llama"), replicate_dense=True).replicate_dense  # nothing dense there


def test_weights_are_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    model = model_of("llama", "top1", "all")
    plan = plan_export(model)
    whole = write_model(plan, model, tmp_path, dtype=None)
    before = load_file(tmp_path / "model.safetensors")
    assert whole == sum(tensor.nbytes for tensor in before.values())
    assert write_model(plan, model, tmp_path, dtype=None, shard_bytes=20_000) == whole
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == whole and sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], before[name])
    assert difference(model, tmp_path, plan) <= TOLERANCE


def test_a_bias_for_the_choice_stays_in_float32(tmp_path: Path) -> None:
    """In bfloat16 the choice of experts moves where scores are close."""
    for family in ("auto", "own"):
        model = model_of("llama", "sigmoid")
        plan = plan_export(model, family=family)
        write_model(plan, model, tmp_path, dtype=torch.bfloat16)
        stored = load_file(tmp_path / "model.safetensors")
        kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
        assert kept == {f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in range(3)}
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
        loaded = reload(plan, tmp_path, torch.bfloat16)
        assert loaded.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_what_does_not_load_whole_is_told(tmp_path: Path) -> None:
    model = model_of("llama", "top1", "all")
    plan = plan_export(model)
    write_model(plan, model, tmp_path, dtype=None)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckError, match=r"mlp.gate.weight \(missing\).*mlp.extra.weight \(unexpected\)"):
        reload(plan, tmp_path, torch.float32)


def test_the_folder_with_its_own_code_has_no_per_expert_layout(tmp_path: Path) -> None:
    model = model_of("gpt2")
    with pytest.raises(ConfigError, match="has no per-expert layout"):
        write_model(plan_export(model), model, tmp_path, dtype=None, layout="per-expert")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"), new_folder(out) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "whole").write_text("x")
    assert [file.name for file in out.iterdir()] == ["whole"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match="exists already"), new_folder(out):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(MoectlError, match="cannot write"), new_folder(tmp_path / "file" / "out"):
        pass


PLAIN = """
import json, sys
sys.modules["moectl"] = None  # whoever asks for it gets an ImportError
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder, trust in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    given = load_file(f"{folder}/../{folder.rsplit('/', 1)[1]}.wanted")
    with torch.no_grad():
        error = (model(input_ids=given["ids"]).logits - given["logits"]).abs().max().item()
    written = model.generate(given["ids"][:, :4], max_new_tokens=6, do_sample=False)
    print(json.dumps([type(model).__name__, error, list(written.shape)]))
"""


def test_a_process_without_moectl_loads_and_generates(tmp_path: Path) -> None:
    """The only thing that is shared is the folder."""
    cases = [
        ("mixtral", "llama", "top1", "all"), ("qwen2_moe", "llama", "top2", "1"), ("qwen3_moe", "decoder", "top1", "1"),
        ("glm4_moe", "qwen3", "sigmoid", "last:1"), ("own", "gpt2", "top2", "last:2"), ("own", "llama", "sigmoid", "0"),
    ]  # fmt: skip
    asked = []
    for number, (family, base, router, layers) in enumerate(cases):
        folder = tmp_path / f"{number}-{family}"
        model = model_of(base, router, layers)
        with new_folder(folder) as temporary:
            write_model(plan_export(model, family=family), model, temporary, dtype=None)
        with torch.no_grad():
            save_file({"ids": some_ids(), "logits": model(some_ids())}, tmp_path / f"{folder.name}.wanted")
        asked.append((str(folder), family == "own"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, json.dumps(asked)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in answers] == [
        *(TARGETS[family].architecture for family in ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe")),
        "GPT2ExpertsForCausalLM", "LlamaExpertsForCausalLM",
    ]  # fmt: skip
    assert all(error <= TOLERANCE for _, error, _ in answers), answers
    assert all(rows == 3 and length > 4 for _, _, (rows, length) in answers)

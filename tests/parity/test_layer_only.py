"""The layer of the published size, at a small one: the same code, the same rows.

What it is for, 2.4 GB of weights in less than 8 GiB, is measured by hand and not in every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.hf.build import build as build_theirs
from moectl.hf.checkpoint import read_folder
from moectl.hf.family import FAMILIES
from moectl.moe.activations import ACTIVATIONS, Activation
from moectl.parity import layer_only as module
from moectl.parity.case import Case, Unsupported
from moectl.parity.families import config_of, formula_of, random_weights
from moectl.parity.hugging_face import HuggingFace
from moectl.parity.layer_only import LIMIT_BYTES, LayerOnly, layer_only, peak_bytes
from moectl.parity.own import Own
from moectl.parity.own_build import build as build_ours
from tests.hf.test_checkpoint import saved

TINY = config_of("qwen3", "tiny")


def failing(result: LayerOnly) -> list[str]:
    return [row.name for row in result.rows if row.ok is False]


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 8}, {"norm_topk_prob": False}], ids=str)
def test_all_rows_hold(changes: dict[str, Any], backend: str) -> None:
    result = layer_only("qwen3", config={**TINY, **changes}, tokens=24, backend=backend)
    assert result.ok, failing(result)
    names = [row.name for row in result.rows]
    case = module._case(TINY, random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32), 24, 0)
    assert sorted(names) == sorted(HuggingFace("qwen3").run(case)), "every tensor and gradient of the layer"
    assert all(row.ok for row in result.rows), "and none left out"
    assert 0 < result.peak_bytes <= result.limit_bytes == LIMIT_BYTES == 8 * 2**30
    assert result.seconds > 0


def test_gradients_one_by_one_are_those_of_the_whole_layer() -> None:
    """Every expert's, on both sides, against one backward pass through the layer. Float32: 1e-6 of the largest."""
    weights = random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32)
    case = module._case(TINY, weights, 24, 0)
    tape = HuggingFace("qwen3").run(case)
    x_TD, grad_TD = tape["mlp.input"].flatten(0, 1), case.inputs.cotangent.flatten(0, 1)  # type: ignore[union-attr]
    layer: Any = build_theirs(FAMILIES["qwen3"], "layer", TINY, weights, dtype=torch.float32)
    ours: Any = build_ours("qwen3", case, "grouped").module
    for experts, run in ((layer.mlp.experts, module._run_theirs), (ours.mlp.experts, module._run_ours)):
        for expert in range(8):
            ids = tape["mlp.chosen"][:, expert].nonzero().flatten()
            given = x_TD[ids], tape["mlp.weights"][ids, expert][:, None], grad_TD[ids]
            for name, grad in module._one_expert(experts, expert, run, *given).items():
                whole = tape[f"grad.mlp.experts.{name}"]
                assert (grad[0] - whole[expert]).abs().max() <= 1e-6 * whole.abs().max(), (name, expert)
        assert experts.num_experts == 8 and experts.gate_up_proj.shape[0] == 8, "the layer's own are left alone"


def test_both_sides_share_one_storage() -> None:
    weights = random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32)
    case = module._case(TINY, weights, 4, 0)
    theirs = dict(module._Theirs("qwen3", case).layer.named_parameters())
    ours = build_ours("qwen3", case, "grouped").parameters
    for name, tensor in weights.items():
        assert tensor.data_ptr() == theirs[name].data_ptr() == ours[name].data_ptr(), name
    alone = module._one_expert  # its weights are views: what it makes is as large as one expert
    grads = alone(theirs_experts(case), 3, module._run_theirs, torch.randn(2, 32), torch.ones(2, 1), torch.randn(2, 32))
    assert {name: tuple(grad.shape) for name, grad in grads.items()} == {
        "gate_up_proj": (1, 48, 32),
        "down_proj": (1, 32, 24),
    }


def theirs_experts(case: Case) -> Any:
    return module._Theirs("qwen3", case).layer.mlp.experts


def test_no_gradient_of_all_experts_is_ever_made() -> None:
    """With the experts frozen neither side's backward pass returns one."""
    weights = random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32)
    case = module._case(TINY, weights, 8, 0)
    theirs = module._Theirs("qwen3", case)
    tape = theirs.tape()
    ours = Own("qwen3", frozen=(module.EXPERTS,)).run(case)
    for side in (tape, ours):
        assert "grad.mlp.gate.weight" in side
        assert not [name for name in side if name.startswith("grad.mlp.experts.")]
    assert theirs.layer.mlp.experts.gate_up_proj.grad is None


def test_a_wrong_expert_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward of the up half alone is off by one part in a thousand: the forward pass still holds."""
    right = ACTIVATIONS["swiglu"]

    def wrong(pre_NH: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NF, grad_NH = right.backward(pre_NH, grad_NF)
        gate_NF, up_NF = grad_NH.chunk(2, dim=-1)
        return hidden_NF, torch.cat([gate_NF, 1.001 * up_NF], dim=-1)

    monkeypatch.setitem(ACTIVATIONS, "swiglu", Activation(right.forward, wrong, gated=True))
    result = layer_only("qwen3", config=TINY, tokens=24)
    assert not result.ok
    assert "grad.mlp.experts.gate_up_proj" in failing(result)
    assert "grad.mlp.experts.down_proj" not in failing(result)
    assert not [name for name in failing(result) if not name.startswith("grad.")]


def test_a_gradient_that_is_nan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first expert with tokens only: a later one must not push it out of the maximum."""
    right, calls = ACTIVATIONS["swiglu"], []

    def wrong(pre_NH: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NF, grad_NH = right.backward(pre_NH, grad_NF)
        calls.append(1)
        return hidden_NF, grad_NH * float("nan") if len(calls) == 9 else grad_NH  # eight are of the layer as a whole

    monkeypatch.setitem(ACTIVATIONS, "swiglu", Activation(right.forward, wrong, gated=True))
    result = layer_only("qwen3", config=TINY, tokens=64)
    assert not result.ok
    assert failing(result) == ["grad.mlp.experts.gate_up_proj"]


def test_a_wrong_forward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ACTIVATIONS["swiglu"]

    def gelu(pre_NH: Tensor) -> Tensor:
        gate_NF, up_NF = pre_NH.chunk(2, dim=-1)
        return F.gelu(gate_NF) * up_NF

    monkeypatch.setitem(ACTIVATIONS, "swiglu", Activation(gelu, right.backward, gated=True))
    result = layer_only("qwen3", config=TINY, tokens=24)
    assert not result.ok
    assert failing(result)[0] == "mlp.expert_outputs"


def test_too_much_memory_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_BYTES", 1)
    result = layer_only("qwen3", config=TINY, tokens=4)
    assert not failing(result)
    assert not result.ok


def test_peak_is_in_bytes_and_never_falls() -> None:
    before = peak_bytes()
    held = torch.ones(40 * 2**20, dtype=torch.uint8)
    assert 2**26 < before <= peak_bytes() < 2**40
    del held


def test_experts_without_tokens_are_counted() -> None:
    result = layer_only("qwen3", config=TINY, tokens=2)
    assert result.ok, failing(result)
    note = result.rows[-1].note
    weights = random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32)
    chosen = HuggingFace("qwen3").run(module._case(TINY, weights, 2, 0))["mlp.chosen"]
    idle = int((~chosen.any(0)).sum())
    assert idle >= 4
    assert f"{idle} experts had no token" in note


@pytest.mark.parametrize("apart", [True, False], ids=["per-expert", "fused"])
def test_a_layer_of_a_checkpoint(tmp_path: Path, apart: bool) -> None:
    """That layer's numbers, in whatever dtype they are stored, and no other layer's file."""
    expected = saved(tmp_path, save_original_format=apart, max_shard_size="20KB", model={"dtype": torch.bfloat16})
    checkpoint = read_folder(tmp_path, family="qwen3")
    part = checkpoint.tensors.part("model.layers.1.")
    result = layer_only("qwen3", config=checkpoint.config, tokens=8, weights=part)
    assert result.ok, failing(result)
    prefix = "model.layers.1."
    given = {n.removeprefix(prefix): t.float() for n, t in expected.items() if n.startswith(prefix)}
    same = layer_only("qwen3", config=TINY, tokens=8, weights=given)
    assert [row.max_abs for row in result.rows] == [row.max_abs for row in same.rows]


def test_seeds_and_sizes() -> None:
    one, two, other = (layer_only("qwen3", config=TINY, tokens=8, seed=seed) for seed in (0, 0, 1))
    assert [row.max_abs for row in one.rows] == [row.max_abs for row in two.rows]
    assert [row.max_rel for row in one.rows] != [row.max_rel for row in other.rows]
    assert one.rows[2].shape == (1, 8, 32)


def test_a_dense_layer(tmp_path: Path) -> None:
    config = {**TINY, "mlp_only_layers": [0, 1, 2]}
    result = layer_only("qwen3", config=config, tokens=8)
    assert result.ok, failing(result)
    assert not [row for row in result.rows if "experts" in row.name]


def test_the_first_layer_with_experts_is_taken() -> None:
    result = layer_only("qwen3", config={**TINY, "mlp_only_layers": [0]}, tokens=8)
    assert result.ok, failing(result)
    assert result.rows[-1].name == "grad.mlp.experts.down_proj"


def test_other_families_are_said_to_be_none_of_ours() -> None:
    with pytest.raises(Unsupported, match="moectl's decoder is a Qwen3-MoE"):
        layer_only("mixtral", config=config_of("mixtral", "tiny"), tokens=4)


def test_near_ties_that_fall_otherwise_are_no_differences() -> None:
    """Experts in pairs whose gate rows differ by rounding, and k = 3 cuts through a pair for every token.

    The two sides' attention differs by rounding, too, so that some choices fall otherwise; all that follows
    from them is then compared on the reference's routes.
    """
    config = {**TINY, "num_experts_per_tok": 3}
    weights = random_weights(formula_of("qwen3", config), "layer", seed=0, dtype=torch.float32)
    gate = weights["mlp.gate.weight"]
    gate[1::2] = gate[::2] * (1 + 3e-7 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    result = layer_only("qwen3", config=config, tokens=64, weights=weights)
    assert result.ok, failing(result)
    assert [row.name for row in result.rows if row.verdict == "tie"] == ["mlp.chosen"]
    rows = {row.name: row.verdict for row in result.rows}
    for name in ("mlp.routed", "mlp.residual", "grad.input", "grad.self_attn.q_proj.weight"):
        assert rows[name] == "ok", name


def test_each_expert_is_given_its_own_tokens_weights_and_gradient() -> None:
    """The largest gradient that was seen one by one is that of one backward pass through the whole layer."""
    weights = random_weights(formula_of("qwen3", TINY), "layer", seed=0, dtype=torch.float32)
    tape = HuggingFace("qwen3").run(module._case(TINY, weights, 24, 0))
    rows = {row.name: row for row in layer_only("qwen3", config=TINY, tokens=24).rows}
    for name in ("grad.mlp.experts.gate_up_proj", "grad.mlp.experts.down_proj"):
        row = rows[name]
        assert row.max_abs and row.max_rel and row.tolerance
        assert row.shape == tuple(tape[name].shape)
        assert row.max_abs / row.max_rel == pytest.approx(float(tape[name].abs().max()), rel=1e-5)
        assert row.tolerance == pytest.approx(1e-5 * float(tape[name].abs().max()), rel=1e-5)

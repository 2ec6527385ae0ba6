"""Precision modes on real runs: what stays in float32, what a checkpoint keeps, what an overflow does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.moe.products import cpu_has_bfloat16
from moectl.moe.router import Router
from moectl.training.muon import MuonAdamW
from moectl.training.precision import Precision
from moectl.training.state import newest_checkpoint
from moectl.training.trainer import Trainer
from tests.training.test_trainer import _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
LOW = ["bfloat16", "bfloat16-pure", "float16"]
native = pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU would compute bfloat16 modes in float32")


def skip_unless_native(precision: str) -> None:
    if precision.startswith("bfloat16") and not cpu_has_bfloat16():
        pytest.skip("this CPU would compute it in float32")


@pytest.mark.parametrize("precision", LOW)
def test_routers_and_losses_stay_in_float32(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, precision: str
) -> None:
    """By hooks: dtypes of every router's output, of every dense product, of what is differentiated, and of the gate."""
    skip_unless_native(precision)
    moe = {"layers": "1", "router": {"name": "sigmoid"}}
    trainer = make_trainer(experiment(moe=moe, train={"precision": precision}), dataset, tmp_path)
    seen: dict[str, set[torch.dtype]] = {"router": set(), "product": set(), "loss": set()}

    def on_router(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["router"] |= {field.dtype for field in output if field is not None and field.is_floating_point()}

    def on_product(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen["product"].add(output.dtype)

    layer = trainer.model.layers[0]
    trainer.model.layers[1].mlp.router.register_forward_hook(on_router)
    layer.mlp.up_proj.register_forward_hook(on_product)
    layer.self_attn.q_proj.register_forward_hook(on_product)
    micro_batch = trainer.gradients._micro_batch

    def watched(*args: Any) -> Any:
        loss, parts = micro_batch(*args)
        seen["loss"] |= {loss.dtype, *(part.dtype for part in parts.values())}
        return loss, parts

    trainer.gradients._micro_batch = watched  # type: ignore[method-assign]  # looks on, and changes nothing
    assert trainer.train().status == "finished"
    assert seen["product"] == {torch.float16 if precision == "float16" else torch.bfloat16}
    exact = {torch.float32, torch.float64}
    assert torch.float32 in seen["router"] and seen["router"] | seen["loss"] <= exact
    routed = {
        p.dtype for m in trainer.model.modules() if isinstance(m, Router) for p in (*m.parameters(), *m.buffers())
    }
    assert routed <= {torch.float32, torch.int64} and torch.float32 in routed


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [*((precision, "adamw") for precision in LOW), ("float32", "muon"), ("bfloat16-pure", "muon")],
)
def test_resume_is_bit_exact_in_every_precision(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, precision: str, optimizer: str
) -> None:
    skip_unless_native(precision)
    train = {"precision": precision, "grad_accum": 2, "keep_checkpoints": 5}
    config = experiment(train=train, optim={"optimizer": optimizer})
    whole = make_trainer(config, dataset, tmp_path / "whole")
    whole.train()
    make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(5)).train()
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    torch.manual_seed(999)
    resumed.restore(newest_checkpoint(tmp_path / "cut")[0])
    assert resumed.step == 5 and resumed.train().status == "finished"
    assert_equal(weights(whole), weights(resumed))
    ours, theirs = (newest_checkpoint(tmp_path / name)[0].tensors for name in ("whole", "cut"))
    assert_equal(ours["optimizer"], theirs["optimizer"])


@native
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_pure_bfloat16_moves_masters_and_keeps_rounded_copies(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, optimizer: str
) -> None:
    trainer = make_trainer(
        experiment(train={"precision": "bfloat16-pure"}, optim={"optimizer": optimizer}), dataset, tmp_path
    )
    trainer.train()
    assert isinstance(trainer.optimizer, MuonAdamW)
    tensors = newest_checkpoint(tmp_path)[0].tensors
    low = {name for name, tensor in tensors["model"].items() if tensor.dtype == torch.bfloat16} - {"lm_head.weight"}
    assert "layers.0.mlp.experts.gate_up_proj" in low and "layers.0.mlp.router.weight" not in low
    for name in low:
        master = tensors["optimizer"][f"{name}/master"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), tensors["model"][name])
    # A master holds what its copy cannot: some number between two bfloat16 ones.
    assert any(not torch.equal(tensors["optimizer"][f"{n}/master"], tensors["model"][n].float()) for n in low)
    assert all(t.dtype == torch.float32 for n, t in tensors["optimizer"].items() if "exp_avg" in n or "momentum" in n)


@native
def test_many_small_steps_are_not_lost_in_pure_bfloat16() -> None:
    """Steps of 1e-4 at weights of 1, whose bfloat16 neighbours are 2^-7 away: without a master nothing would move."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MuonAdamW([{"params": [weight], "lr": 1e-4}])
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 100 steps of 1e-4 each (AdamW's are of the learning rate's length for a constant gradient) are 0.01.
    assert optimizer.state[weight]["master"].tolist() == pytest.approx([0.99] * 4, rel=1e-4)
    assert weight.tolist() == torch.full((4,), 0.99).bfloat16().tolist()


@native
def test_gradients_of_several_micro_batches_are_summed_in_float32(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    for accumulated, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        config = experiment(train={"precision": "bfloat16-pure", "grad_accum": accumulated})
        trainer = make_trainer(config, dataset, tmp_path / str(accumulated))
        trainer.optimizer_step()
        dense, experts = trainer.model.layers[0].self_attn.q_proj.weight, trainer.model.layers[0].mlp.experts
        assert dense.grad.dtype == experts.gate_up_proj.grad.dtype == dtype


def overflowing(trainer: Trainer, scale: float) -> None:
    assert trainer.precision.scaler is not None
    trainer.precision.scaler.load_state_dict({**trainer.precision.scaler.state_dict(), "scale": scale})


def test_an_overflow_skips_the_step_and_lowers_the_scale(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(train={"precision": "float16"}), dataset, tmp_path)
    overflowing(trainer, 2.0**40)
    before = weights(trainer)
    metrics, problem = trainer.optimizer_step()
    assert problem is None and trainer.step == 1 and not metrics["train/grad_norm"] < float("inf")
    moved = [name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])]
    assert all("router.noise" in name for name in moved), moved
    assert trainer.precision.scaler is not None and trainer.precision.scaler.get_scale() == 2.0**39
    assert [kind for kind, _ in trainer.logger.events] == ["overflow"]  # type: ignore[attr-defined]
    overflowing(trainer, 2.0**16)
    result = trainer.train()
    assert result.status == "finished" and result.metrics["train/grad_norm"] < 100


def test_an_overflow_at_the_lowest_scale_names_where_it_began(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(train={"precision": "float16"}), dataset, tmp_path)
    overflowing(trainer, 1.0)
    weight = trainer.model.layers[0].self_attn.o_proj.weight
    weight.register_hook(lambda grad: grad * float("nan"))
    before = weights(trainer)
    _, problem = trainer.optimizer_step()
    assert problem is not None and "layers.0.self_attn.o_proj.weight" in problem
    assert_equal(weights(trainer), before)


def test_a_gradient_that_stays_nan_ends_the_run_when_the_scale_has_bottomed_out(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"precision": "float16", "steps": 40}, optim={"warmup_steps": 2})
    trainer = make_trainer(config, dataset, tmp_path)
    trainer.model.layers[1].self_attn.q_proj.weight.register_hook(lambda grad: grad * float("nan"))
    result = trainer.train()
    # From 2^16 to 1 in sixteen halvings, each a step that moves nothing; the seventeenth is the end.
    assert (result.status, result.step) == ("failed", 16)
    assert "layers.1.self_attn.q_proj.weight" in result.reason


def test_a_loss_scale_changes_no_gradient(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """Powers of two round nowhere: the same gradients at every scale that does not overflow."""
    norms = []
    for scale in (8.0, 1024.0):
        trainer = make_trainer(experiment(train={"precision": "float16"}), dataset, tmp_path / str(scale))
        overflowing(trainer, scale)
        norms.append(trainer.optimizer_step()[0]["train/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)  # but for float16's smallest numbers, which a scale saves


WITHOUT = """
import json, sys, torch
from moectl.training.precision import Precision
cpu = torch.device("cpu")
print(json.dumps({n: [p.name, p.warning, str(p.weights)] for n in sys.argv[1:] for p in [Precision(n, cpu)]}))
"""


def test_bfloat16_without_instructions_is_float32_with_a_warning() -> None:
    """oneDNN held to AVX512: the CPU is to it one without bfloat16, which it would emulate."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT, "bfloat16", "bfloat16-pure", "float32"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout)
    for name in ("bfloat16", "bfloat16-pure"):
        assert found[name][0] == "float32" and found[name][2] == "torch.float32"
        assert "no bfloat16 instructions" in found[name][1] and name in found[name][1]
    assert found["float32"] == ["float32", None, "torch.float32"]


def test_the_warning_is_an_event_of_the_run(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(train={"precision": "float16", "steps": 4}), dataset, tmp_path)
    result = trainer.train()
    assert ("precision", trainer.precision.warning) in trainer.logger.events  # type: ignore[attr-defined]
    assert result.speed is not None and result.speed.precision == "float16"


def test_cuda_gets_what_it_asks_for() -> None:
    for name in ("float32", "bfloat16", "bfloat16-pure", "float64"):
        assert Precision(name, torch.device("cuda")).name == name
        assert Precision(name, torch.device("cuda")).warning is None

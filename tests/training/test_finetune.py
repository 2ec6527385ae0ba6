"""Fine-tuning: what is frozen stays, bit for bit, what is asked moves, and the counts agree with the formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.config.finetuning import FinetuneConfig
from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.loader import PackedDataset
from moectl.errors import CheckError, ConfigError
from moectl.models.decoder import Decoder
from moectl.moe.experts import GatedExperts
from moectl.training import optim
from moectl.training.finetune import FrozenRows, apply, count_found, trained_share
from moectl.training.state import newest_checkpoint
from tests.support import tiny_shape
from tests.training.test_trainer import _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
SLOW_RATES = {"weight_decay": 0.3, "lr": 0.01, "grad_clip": 0.05}
"""Decay and clipping that would show on whatever they touch."""


def model_with(num_experts: int = 4, **moe: Any) -> Decoder:
    torch.manual_seed(0)
    given = {"router": {"name": "topk", "top_k": 2}, "init": "random", "layers": "all", **moe}
    return Decoder(tiny_shape(50, MoEConfig.model_validate({"num_experts": num_experts, **given})))


def part_of(name: str) -> str:
    return "router" if ".router." in name else "experts" if ".experts." in name else "dense"


def rows_moved(before: dict[str, Tensor], after: dict[str, Tensor], layer: int) -> dict[str, set[int]]:
    """Which rows of each stacked parameter are not bit for bit what they were."""
    names = [name for name in before if name.startswith(f"layers.{layer}.mlp.experts.")]
    assert names
    return {
        name: {row for row in range(len(before[name])) if not torch.equal(before[name][row], after[name][row])}
        for name in names
    }


# D 16, F 24, E 4, two layers, vocabulary 50: per expert 3·16·24, per layer a gate of 4·16; the head is tied.
ROUTERS, EXPERT = 2 * 4 * 16, 3 * 16 * 24
DENSE = 50 * 16 + 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 2 * 8 + 2 * 16) + 16


@pytest.mark.parametrize(
    ("finetune", "expected"),
    [
        ({}, ROUTERS + 8 * EXPERT + DENSE),
        ({"freeze": "router"}, 8 * EXPERT + DENSE),
        ({"freeze": "experts"}, ROUTERS + DENSE),
        ({"freeze": "dense"}, ROUTERS + 8 * EXPERT),
        ({"freeze": ["router", "dense"]}, 8 * EXPERT),
        ({"train_experts": "0,3"}, ROUTERS + 4 * EXPERT + DENSE),
        ({"train_experts": "0,3", "freeze": "router,dense"}, 4 * EXPERT),
        ({"train_experts": {1: [2]}, "freeze": "dense"}, ROUTERS + EXPERT),
        ({"train_experts": "0,1,2,3", "freeze": "router"}, 8 * EXPERT + DENSE),
    ],
)
def test_what_trains_is_counted_by_hand(finetune: dict[str, Any], expected: int) -> None:
    model = model_with()
    settings = FinetuneConfig.model_validate(finetune)
    report = apply(model, settings)
    assert report.found == sum(report.asked.values()) == count_found(model, settings) == expected
    assert report.total == ROUTERS + 8 * EXPERT + DENSE
    assert f"{expected:,} of {report.total:,}" in report.to_text()
    assert trained_share({"trainable": expected, "total": report.total}) in report.to_text()
    if settings.train_experts is None:
        parts = {part_of(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert parts == {*settings.freeze}
        held = sum(p.numel() for group in optim.build_optimizer(model, _optim()).param_groups for p in group["params"])
        assert held == expected


def test_shared_experts_are_experts_and_have_no_number() -> None:
    shared = 2 * 3 * 16 * 24
    for finetune, expected in (
        ({"freeze": "router,dense"}, 8 * EXPERT + shared),
        ({"freeze": "router,dense", "train_experts": [1]}, 2 * EXPERT),
        ({"freeze": "experts"}, ROUTERS + DENSE),
    ):
        model = model_with(n_shared_experts=1)
        assert apply(model, FinetuneConfig.model_validate(finetune)).found == expected


def _optim() -> Any:
    return ExperimentConfig().optim


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16-pure"])
def test_only_the_named_experts_move_under_decay_and_clipping(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, optimizer: str, precision: str
) -> None:
    config = experiment(
        finetune={"train_experts": {0: [0, 3], 1: [2]}},
        optim={**SLOW_RATES, "optimizer": optimizer},
        train={"steps": 20, "grad_accum": 2, "batch_size": 2, "precision": precision},
    )
    trainer = make_trainer(config, dataset, tmp_path)
    before = weights(trainer)
    assert trainer.train().status == "finished"
    after = weights(trainer)
    for layer, experts in ((0, {0, 3}), (1, {2})):
        assert all(rows == experts for rows in rows_moved(before, after, layer).values())
    assert not torch.equal(before["layers.0.mlp.router.weight"], after["layers.0.mlp.router.weight"])
    assert not torch.equal(before["layers.1.self_attn.q_proj.weight"], after["layers.1.self_attn.q_proj.weight"])
    stacked = trainer.layers[0].experts.gate_up_proj
    moments = [v for k, v in trainer.optimizer.state[stacked].items() if v.shape == stacked.shape and k != "master"]
    assert moments and all(bool(value[row].any()) == (row in (0, 3)) for value in moments for row in range(4))


def test_frozen_experts_do_not_count_in_the_gradient_norm(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    changes = {"train": {"steps": 4, "grad_accum": 2}, "optim": {"grad_clip": 1e9}}
    seen: list[float] = []
    for finetune in ({}, {"train_experts": [0], "freeze": "router,dense"}):
        trainer = make_trainer(experiment(finetune=finetune, **changes), dataset, tmp_path / str(len(finetune)))
        metrics, problem = trainer.optimizer_step()
        assert problem is None
        seen.append(metrics["train/grad_norm"])
        norms = {key: value for key, value in metrics.items() if key.startswith("grad_norm/layer.0.expert.")}
        if finetune:
            assert norms["grad_norm/layer.0.expert.0"] > 0.0 and norms["grad_norm/layer.0.expert.1"] == 0.0
            of_experts = sum(value**2 for key, value in metrics.items() if ".expert." in key) ** 0.5
            assert metrics["train/grad_norm"] == pytest.approx(of_experts, rel=1e-5)
    assert seen[1] < 0.5 * seen[0]


@pytest.mark.parametrize(
    "finetune",
    [
        {"train_experts": "1,2"},
        {"freeze": "router,dense"},
        {"lora": {"rank": 2, "targets": "experts"}},
        {"lora": {"rank": 2, "dropout": 0.1, "targets": "attention,experts", "train_router": True}},
    ],
    ids=["train_experts", "freeze", "lora of experts", "lora of all"],
)
def test_a_resumed_fine_tuning_is_the_same(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, finetune: dict[str, Any]
) -> None:
    if "attention" in str(finetune):
        pytest.importorskip("peft")
    config = experiment(finetune=finetune, optim=SLOW_RATES, train={"steps": 20, "keep_checkpoints": 9})
    whole = make_trainer(config, dataset, tmp_path / "whole")
    assert whole.train().status == "finished"
    cut = make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(8))
    assert cut.train().status == "interrupted"
    resumed = make_trainer(config, dataset, tmp_path / "cut", logger=cut.logger)
    resumed.restore(newest_checkpoint(tmp_path / "cut")[0])
    assert resumed.step == 8 and resumed.train().status == "finished"
    assert_equal(weights(whole), weights(resumed))
    assert whole.logger.rows == resumed.logger.rows  # type: ignore[attr-defined]


@pytest.mark.parametrize("router", ["top1", "sigmoid", "expert-choice-threshold", "noisy-topk"])
def test_a_frozen_router_does_not_move_nor_explore(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str
) -> None:
    trainer = make_trainer(
        experiment(moe={"router": {"name": router}}, finetune={"freeze": "router"}), dataset, tmp_path
    )
    before = weights(trainer)
    assert trainer.train().status == "finished"
    for name, tensor in weights(trainer).items():
        if ".router." in name and "anneal" not in name:  # the length of the annealing is told before the first step
            assert torch.equal(tensor, before[name]), name
    layer = trainer.layers[0]
    x_TD = torch.randn(64, 16)
    trainer.model.train()
    first, again = (layer.router(x_TD).router_probs for _ in range(2))
    assert torch.equal(first, again)
    trainer.model.eval()
    assert torch.equal(first, layer.router(x_TD).router_probs)


def test_a_learning_router_of_the_same_run_does_move(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(moe={"router": {"name": "sigmoid"}}), dataset, tmp_path)
    before = weights(trainer)
    trainer.train()
    for name in ("layers.0.mlp.router.weight", "layers.0.mlp.router.expert_bias"):
        assert not torch.equal(before[name], weights(trainer)[name])


def test_each_part_learns_at_its_own_rate(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    rates = {"router_lr": 1e-3, "expert_lr": 1e-4, "dense_lr": 1e-5, "lr": 1e-2}
    config = experiment(optim={**rates, "weight_decay": 0.0, "warmup_steps": 0}, train={"steps": 4})
    trainer = make_trainer(config, dataset, tmp_path)
    before = weights(trainer)
    trainer.optimizer_step()  # AdamW's first step is lr · sign(gradient), wherever that is well above eps
    for name, tensor in weights(trainer).items():
        if tensor.is_floating_point() and not torch.equal(tensor, before[name]):
            rate = {"router": 1e-3, "experts": 1e-4, "dense": 1e-5}[part_of(name)]
            largest = float((tensor.double() - before[name].double()).abs().max())
            assert largest == pytest.approx(rate, rel=0.02), name  # 2 %: float32 weights near 1 round at 6e-8


def test_biases_of_plain_experts_have_the_experts_rate() -> None:
    from moectl.moe.experts import MLPExperts

    settings = _optim().model_copy(update={"expert_lr": 0.5})
    groups = optim.parameter_groups(nn.Sequential(MLPExperts(2, 4, 6)), settings)
    assert {group["name"]: group["lr"] for group in groups} == {"experts": 0.5, "expert_biases": 0.5}
    assert {group["name"]: group["weight_decay"] for group in groups} == {"experts": 0.1, "expert_biases": 0.0}


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"train_experts": "0,4"}, "expert 4, but layer 0 has 4"),
        ({"train_experts": {2: [0]}}, "layer 2, which has no experts"),
        ({"train_experts": {0: [7]}}, "expert 7, but layer 0 has 4"),
        ({"train_experts": {}, "freeze": "router,dense"}, "names no expert"),
    ],
)
def test_what_the_model_has_not_is_refused(finetune: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        apply(model_with(), FinetuneConfig.model_validate(finetune))


def test_a_run_with_nothing_to_train_is_refused() -> None:
    dense = Decoder(tiny_shape(50, None))
    with pytest.raises(ConfigError, match="nothing to train"):
        apply(dense, FinetuneConfig(freeze=("dense",)))
    with pytest.raises(ConfigError, match="nothing to train"):
        apply(model_with(), FinetuneConfig.model_validate({"train_experts": {0: []}, "freeze": "router,dense"}))


def test_a_count_that_is_not_what_was_asked_is_told() -> None:
    """Experts that keep a parameter of all of them together: no formula of one expert's size holds."""
    model = model_with()
    for layer in model.moe_layers().values():
        layer.experts.register_parameter("temperature", nn.Parameter(torch.ones(4, 1)))
    assert isinstance(model.moe_layers()[0].experts, GatedExperts)
    with pytest.raises(CheckError, match="would be trained, where finetune asks for"):
        apply(model, FinetuneConfig(freeze=("router", "dense")))


def test_rows_are_put_back_whatever_an_optimizer_does() -> None:
    model = model_with()
    settings = FinetuneConfig.model_validate({"train_experts": [1]})
    apply(model, settings)

    class Wild(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.normal_()

    optimizer = Wild([parameter for parameter in model.parameters() if parameter.requires_grad])
    frozen = FrozenRows(model.moe_layers(), settings, optimizer)
    assert frozen.size == 6 * EXPERT
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    optimizer.step()
    for layer in (0, 1):
        assert all(rows == {1} for rows in rows_moved(before, dict(model.state_dict()), layer).values())

"""Revival of dead experts, with a trained model and its real optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.revival import _copy_of
from moectl.training.trainer import Trainer
from tests.training.test_trainer import Recorder, make_trainer

Make = Callable[..., ExperimentConfig]
DEAD, BUSIEST = 2, 1


def trained(experiment: Make, data: PackedDataset, folder: Path, router: Any = "topk", **moe: Any) -> Trainer:
    """Six real steps: weights, moments and biases are those of a run under way."""
    moe = {"router": router if isinstance(router, dict) else {"name": router}, "revive_dead": True, **moe}
    trainer = make_trainer(experiment(moe=moe, train={"steps": 6, "check_every": 100}), data, folder)
    trainer.train()
    return trainer


def counts(total: int = 800) -> Tensor:
    """Expert 2 got nothing of ``total`` assignments, expert 1 most."""
    return torch.tensor([total // 4, total // 2, 0, total // 4])


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    values = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        values |= {f"{name}/{key}": tensor.clone() for key, tensor in state.items()}
    return values


def parts(name: str, tensor: Tensor) -> Tensor:
    """By expert: the noise of noisy-topk counts them last."""
    return tensor.T if ".noise.weight" in name else tensor


@pytest.mark.parametrize("router", ["topk", "noisy-topk", "sigmoid"])
def test_the_dead_expert_becomes_a_noisy_copy_of_the_busiest_and_nobody_else_changes(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str
) -> None:
    trainer = trained(experiment, dataset, tmp_path, router, revive_noise=0.1)
    before = snapshot(trainer)
    (revived,) = trainer.revival.check({0: counts(), 1: torch.tensor([200, 200, 200, 200])}, step=6)
    after = snapshot(trainer)
    assert (revived.layer, revived.expert, revived.source) == (0, DEAD, BUSIEST)
    assert (revived.source_share, revived.expected) == (0.5, 200)
    assert str(revived) == (
        "layer 0: expert 2 got none of 200 expected assignments and starts anew from expert 1 (50.0% of the load)"
    )
    names = {"experts.gate_up_proj", "experts.down_proj", "router.weight"}
    names |= {"router.noise.weight"} if router == "noisy-topk" else set()
    mine = {f"layers.0.mlp.{name}" for name in names}
    bias = "layers.0.mlp.router.expert_bias"
    for name, old in before.items():
        parameter, _, state = name.partition("/")
        if parameter == bias:
            assert torch.equal(after[name][[0, 1, 3]], old[[0, 1, 3]])
            assert float(old.std()) > 0 and after[name][DEAD] == old.mean()
            continue
        if parameter not in mine or state == "step":
            assert torch.equal(after[name], old), name  # step counts the whole tensor
            continue
        new, old = parts(name, after[name]), parts(name, old)
        rest = [expert for expert in range(4) if expert != DEAD]
        assert torch.equal(new[rest], old[rest]), name
        if state:
            assert float(old[rest].abs().max()) > 0, name  # there was something to clear
            assert not new[DEAD].any(), name
            continue
        noise = (new[DEAD] - old[BUSIEST]).double()
        # 16 to 768 draws: the spread of the smallest is known to 1/sqrt(2·16) = 18 %; four times that.
        wanted = 0.1 * float(old[BUSIEST].double().std())
        assert float(noise.std()) == pytest.approx(wanted, rel=0.7), name
        assert abs(float(noise.mean())) < 4 * wanted / noise.numel() ** 0.5, name


def test_without_noise_it_is_an_exact_copy_and_computes_the_same(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = trained(experiment, dataset, tmp_path, revive_noise=0.0)
    trainer.revival.check({0: counts(), 1: counts()}, step=6)
    x_ND = torch.randn(9, 16)
    for layer in trainer.layers.values():
        assert torch.equal(layer.experts.one(DEAD, x_ND), layer.experts.one(BUSIEST, x_ND))
        out = layer.router.eval()(x_ND)
        assert torch.equal(out.router_logits[:, DEAD], out.router_logits[:, BUSIEST])


def test_several_dead_experts_differ_from_each_other(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = trained(experiment, dataset, tmp_path)
    revived = trainer.revival.check({0: torch.tensor([0, 800, 0, 0]), 1: counts(0)}, step=6)
    assert [(one.expert, one.source, one.source_share) for one in revived] == [(0, 1, 1.0), (2, 1, 1.0), (3, 1, 1.0)]
    weights = trainer.layers[0].experts.down_proj
    assert len({float(weights[expert].detach().sum()) for expert in range(4)}) == 4


@pytest.mark.parametrize(
    ("count", "wakes"),
    [
        (torch.tensor([200, 200, 0, 0]), True),  # 100 expected
        (torch.tensor([200, 199, 0, 0]), False),  # 99.75 expected: too few to call anyone dead
        (torch.tensor([400, 399, 1, 0]), True),
        (torch.tensor([400, 398, 1, 1]), False),  # one assignment is a life
        (torch.tensor([0, 0, 0, 0]), False),
    ],
)
def test_who_counts_as_dead(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, count: Tensor, wakes: bool
) -> None:
    trainer = trained(experiment, dataset, tmp_path)
    even = torch.tensor([200, 200, 200, 200])
    assert bool(trainer.revival.check({0: count, 1: even}, step=6)) is wakes


def test_idle_unless_asked_for(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = trained(experiment, dataset, tmp_path, revive_dead=False)
    before = snapshot(trainer)
    assert trainer.revival.check({0: counts(), 1: counts()}, step=6) == []
    after = snapshot(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_noise_follows_from_seed_step_and_layer_alone(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """So that a resumed run revives alike; and no other generator is disturbed."""
    drawn = {}
    for case, (step, salt) in {"first": (6, 1), "again": (6, 2), "later": (7, 1)}.items():
        trainer = trained(experiment, dataset, tmp_path / case)
        torch.manual_seed(salt)
        untouched = torch.get_rng_state()
        trainer.revival.check({0: counts(), 1: counts()}, step=step)
        assert torch.equal(torch.get_rng_state(), untouched)
        drawn[case] = [layer.experts.down_proj[DEAD].clone() for layer in trainer.layers.values()]
    assert all(torch.equal(*pair) for pair in zip(drawn["first"], drawn["again"], strict=True))
    assert not torch.equal(drawn["first"][0], drawn["later"][0])
    noise = [
        new - layer.experts.down_proj[BUSIEST]
        for new, layer in zip(drawn["later"], trainer.layers.values(), strict=True)
    ]
    shapes = [part / part.std() for part in noise]
    assert not torch.allclose(*shapes, atol=0.1)  # each layer's own


def test_thresholds_of_expert_choice_go_with_the_gate_row(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = trained(experiment, dataset, tmp_path, "expert-choice-threshold")
    router = trainer.layers[0].router
    before = router.threshold.clone()
    assert float(before.std()) > 0
    trainer.revival.check({0: counts(), 1: torch.tensor([200, 200, 200, 200])}, step=6)
    assert router.threshold[DEAD] == before[BUSIEST]
    assert torch.equal(router.threshold[[0, 1, 3]], before[[0, 1, 3]])


def test_a_revived_experts_next_updates_are_as_long_as_said(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """AdamW's step is the whole tensor's: with a constant gradient the moments alone say how far it goes."""
    trainer = trained(experiment, dataset, tmp_path)
    optimizer, weights = trainer.optimizer, trainer.layers[0].experts.down_proj
    for state in optimizer.state.values():
        state["step"].fill_(10_000)  # long under way: no bias correction is left
    trainer.revival.check({0: counts(), 1: counts()}, step=6)
    lengths = []
    for group in optimizer.param_groups:
        group.update(lr=1e-3, weight_decay=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        weights.grad = torch.ones_like(weights)
        before = weights[DEAD].detach().clone()
        optimizer.step()
        lengths.append(float((before - weights[DEAD].detach()).mean()) / 1e-3)
    expected = [(1 - 0.9**t) / (1 - 0.95**t) ** 0.5 for t in range(1, 31)]
    assert lengths == pytest.approx(expected, rel=2e-3)  # float32 weights of size 0.02, moved by 1e-3
    assert lengths[0] < 0.46 and 1.05 < max(lengths) < 1.15


def test_noise_of_what_has_no_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(_copy_of(torch.tensor([3.0]), 0.5, generator), torch.tensor([3.0]))
    assert torch.equal(_copy_of(torch.zeros(4), 0.5, generator), torch.zeros(4))
    copied = _copy_of(torch.randn(64, 64, generator=generator).bfloat16(), 0.5, generator)
    assert copied.dtype == torch.bfloat16 and bool(copied.isfinite().all())


def test_a_run_revives_a_dead_expert_and_it_gets_tokens(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """For real: an expert that no token can choose is dead at the first check, and lives after a revival or two."""
    recorder = Recorder()
    config = experiment(
        moe={"router": {"name": "top1", "noise_std": 0.0}, "revive_dead": True, "lb_coef": 0.0},
        train={"steps": 24, "check_every": 8, "checkpoint_every": 100, "batch_size": 8},
        optim={"router_lr": 1e-6},  # the gate stays where it is put
    )
    trainer = make_trainer(config, dataset, tmp_path, logger=recorder)
    with torch.no_grad():
        for layer in trainer.layers.values():
            layer.router.weight.normal_(std=0.5)
            # The mean of linear functions is nowhere above all of them: no token can prefer it.
            layer.router.weight[DEAD] = layer.router.weight[[0, 1, 3]].mean(0)
    trainer.train()
    dead = {}
    for step, payload in recorder.counts:
        for number, layer in payload["layers"].items():
            dead[step, number] = torch.tensor(layer["counts"]).sum(0)[DEAD] == 0
    assert dead[8, "0"] and dead[8, "1"]
    # Tokens prefer the copy or its source by the sign of one product: where all agree, it is the next check's turn.
    assert all(not (dead[16, number] and dead[24, number]) for number in ("0", "1"))
    events = [message for kind, message in recorder.events if kind == "revived"]
    assert [message[:42] for message in events[:2]] == [
        f"layer {number}: expert 2 got none of 240 expected" for number in (0, 1)
    ]

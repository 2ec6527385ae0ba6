"""Muon: against torch's own for single matrices, against a float64 reference for stacked experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moectl.config.schema import ExperimentConfig, OptimConfig
from moectl.corpus.loader import PackedDataset
from moectl.moe import GatedExperts
from moectl.training.muon import MuonAdamW, orthogonalised
from moectl.training.optim import build_optimizer, parameter_groups
from tests.training.test_trainer import make_trainer

Make = Callable[..., ExperimentConfig]


def reference(matrix: Tensor) -> Tensor:
    """Newton-Schulz on the singular values alone, in float64: ``U · p(p(...p(S / |S|)))  · Vᵀ``."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonalised_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Five steps of matrix products against the same steps on singular values: 1e-10, in float32 1e-4."""
    matrix = torch.randn(*shape, dtype=dtype)
    error = (orthogonalised(matrix).double() - reference(matrix)).abs().max()
    assert error < (1e-10 if dtype == torch.float64 else 1e-4)


def test_singular_values_come_near_to_one_and_a_stack_is_its_matrices() -> None:
    stack = torch.randn(4, 24, 32, dtype=torch.float64)
    made = orthogonalised(stack)
    for one, matrix in zip(made, stack, strict=True):
        assert torch.allclose(one, orthogonalised(matrix), atol=1e-12)
        values = torch.linalg.svdvals(one)
        assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_two_dimensional_matrices_move_as_with_torchs_muon() -> None:
    """torch multiplies in bfloat16: its direction differs by some per cent, the length of its step hardly."""
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        mine = MuonAdamW([{"params": [ours], "muon": True, "pieces": [[0, 1]], "lr": 0.02, "weight_decay": 0.1}])
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
        torchs = torch.optim.Muon([theirs], **options)
        for _ in range(5):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            mine.step()
            torchs.step()
        moved, expected = (p.detach() - 1 for p in (ours, theirs))
        assert float((moved - expected).norm() / expected.norm()) < 0.03
        assert torch.equal(mine.state[ours]["momentum"], torchs.state[theirs]["momentum_buffer"])


def test_experts_against_a_reference_expert_by_expert_gate_and_up_apart() -> None:
    torch.manual_seed(0)
    experts = GatedExperts(3, 6, 4).double()
    optim = OptimConfig(optimizer="muon", lr=0.01, expert_lr=0.02, weight_decay=0.1, muon_momentum=0.9)
    optimizer = build_optimizer(experts, optim)
    expected = {name: [m.detach().clone() for m in split(name, p)] for name, p in experts.named_parameters()}
    momenta = {name: [torch.zeros_like(m) for m in matrices] for name, matrices in expected.items()}
    for _ in range(4):
        for name, parameter in experts.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            for index, grad in enumerate(split(name, parameter.grad)):
                momenta[name][index] = 0.9 * momenta[name][index] + 0.1 * grad
                direction = reference(0.9 * momenta[name][index] + 0.1 * grad)
                step = 0.02 * 0.2 * math.sqrt(max(grad.shape))
                expected[name][index] = (1 - 0.02 * 0.1) * expected[name][index] - step * direction
        optimizer.step()
    for name, parameter in experts.named_parameters():
        for ours, theirs in zip(split(name, parameter), expected[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-10, rtol=0), name


def split(name: str, stacked: Tensor) -> list[Tensor]:
    """The matrices of a stacked parameter: of each expert, gate and up apart."""
    return [part for one in stacked for part in (one.chunk(2) if name == "gate_up_proj" else [one])]


def test_an_expert_without_a_token_stays_where_it_is() -> None:
    """But for weight decay: momentum made orthogonal has full length, however old it is."""
    weight = nn.Parameter(torch.ones(2, 4, 6))
    optimizer = MuonAdamW([{"params": [weight], "muon": True, "pieces": [[0, 1]], "lr": 0.1}])
    weight.grad = torch.randn(2, 4, 6)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.randn(2, 4, 6)
    weight.grad[1] = 0
    optimizer.step()
    assert torch.equal(weight[1], before[1]) and not torch.allclose(weight[0], before[0], atol=1e-2)


def test_groups_muon_has_the_matrices_of_layers_and_nothing_else(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(model={"tie_word_embeddings": False}, optim={"optimizer": "muon"}, moe={"layers": "1"})
    trainer = make_trainer(config, dataset, tmp_path)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = {g["name"]: g for g in parameter_groups(trainer.model, config.optim)}
    muon = {names[id(p)] for g in groups.values() if g.get("muon") for p in g["params"]}
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
    expected = {name for name in names.values() if any(kind in name for kind in kinds)}
    assert muon == expected and "layers.1.mlp.experts.down_proj" in muon
    assert [names[id(p)] for p in groups["head"]["params"]] == ["lm_head.weight"]
    assert groups["head"]["weight_decay"] == config.optim.weight_decay and not groups["head"].get("muon")
    assert {names[id(p)] for p in groups["router"]["params"]} == {"layers.1.mlp.router.weight"}
    pieces = dict(zip((names[id(p)] for p in groups["experts"]["params"]), groups["experts"]["pieces"], strict=True))
    assert pieces == {"layers.1.mlp.experts.gate_up_proj": [1, 2], "layers.1.mlp.experts.down_proj": [0, 1]}
    assert sum(len(g["params"]) for g in groups.values()) == len(names)


def test_gpt2s_query_key_and_value_are_three_matrices() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(12, 4)  # stored [in, 3 · out], as transformers' Conv1D has it

    block = Block().double()
    optimizer = build_optimizer(block, OptimConfig(optimizer="muon", lr=0.1, weight_decay=0.0))
    before, weight = block.c_attn.weight.detach().clone(), block.c_attn.weight
    for parameter in block.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    # Nesterov's first direction is the gradient's own.
    expected = torch.cat([reference(part) for part in weight.grad.chunk(3, 1)], 1) * 0.1 * 0.2 * 2.0
    assert torch.allclose(before - weight, expected, atol=1e-10)


def test_a_run_with_muon_learns(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(train={"steps": 40}, optim={"optimizer": "muon"}), dataset, tmp_path)
    assert trainer.train().status == "finished"
    rows = [values["train/lm_loss"] for _, values in trainer.logger.rows if "train/lm_loss" in values]  # type: ignore[attr-defined]
    assert rows[-1] < 0.85 * rows[0]


def test_adamw_without_muon_is_torchs(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """Groups that are not Muon's move as with torch's fused AdamW, to the last bit."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    mine = MuonAdamW([{"params": [ours], "lr": 0.1, "weight_decay": 0.1}])
    torchs = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _ in range(5):
        ours.grad = torch.randn(3, 5)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert torch.equal(ours, theirs)
    assert type(make_trainer(experiment(), dataset, tmp_path).optimizer) is torch.optim.AdamW

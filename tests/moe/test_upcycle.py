"""Stacking copies of a dense MLP's tensors."""

from __future__ import annotations

import pytest
import torch

from moectl.moe.upcycle import (
    group_rows,
    hidden_rows,
    redraw_neurons,
    split_neurons,
    stack_copies,
    stack_experts,
)


def dense(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "up_proj": (3.0 + 0.5 * torch.randn(200, 100, dtype=torch.float64)).to(dtype),
        "up_proj_bias": (2.0 * torch.randn(200, dtype=torch.float64)).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_noise_every_expert_is_the_dense_mlp_bit_for_bit(dtype: torch.dtype) -> None:
    source = dense(dtype)
    stacked = stack_copies(source, 3)
    assert stacked.keys() == source.keys()
    for name, tensor in source.items():
        assert stacked[name].shape == (3, *tensor.shape)
        assert stacked[name].dtype == dtype
        for expert in stacked[name]:
            assert torch.equal(expert, tensor)


def test_noise_is_measured_in_each_tensors_own_deviation() -> None:
    """40,000 and 400 draws: 3 % and 20 % are several standard errors. The mean of 3.0 must not enter the scale."""
    source = dense()
    stacked = stack_copies(source, 2, noise=0.1, generator=torch.Generator().manual_seed(1))
    for name, tolerance in (("up_proj", 0.03), ("up_proj_bias", 0.2)):
        added = stacked[name] - source[name]
        assert added.std().item() == pytest.approx(0.1 * source[name].std().item(), rel=tolerance)
        assert abs(added.mean().item()) < 5 * added.std().item() / added.numel() ** 0.5
        assert not torch.equal(added[0], added[1]), "experts that stay equal never specialise"


def test_noise_comes_from_the_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        return stack_copies(dense(), 2, noise=0.1, generator=torch.Generator().manual_seed(seed))["up_proj"]

    before = torch.get_rng_state()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    source = dense()
    after_dense = torch.get_rng_state()
    stack_copies(source, 2, noise=0.1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), after_dense)
    assert not torch.equal(state, after_dense)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.set_rng_state(before)


def test_copies_are_copies() -> None:
    source = dense()
    stacked = stack_copies(source, 2)
    stacked["up_proj"][0].zero_()
    assert source["up_proj"].any()
    assert torch.equal(stacked["up_proj"][1], source["up_proj"])


def test_parameters_are_detached_and_a_single_number_has_no_deviation() -> None:
    stacked = stack_copies({"scale": torch.nn.Parameter(torch.ones(1))}, 4, noise=0.5)
    assert not stacked["scale"].requires_grad
    assert stacked["scale"].tolist() == [[1.0]] * 4


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="init_noise must be >= 0"):
        stack_copies(dense(), 2, noise=-0.1)


# --- parts, redrawn neurons, several models


def mlp(gated: bool, neurons: int = 12, hidden: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if gated:
        return {"gate_up_proj": drawn(2 * neurons, hidden), "down_proj": drawn(hidden, neurons)}
    return {
        "up_proj": drawn(neurons, hidden), "up_proj_bias": drawn(neurons),
        "down_proj": drawn(hidden, neurons), "down_proj_bias": drawn(hidden),
    }  # fmt: skip


def computed(layout: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One MLP, by the matrices."""
    if "gate_up_proj" in layout:
        gate, up = layout["gate_up_proj"].chunk(2)
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ layout["down_proj"].T
    hidden = torch.nn.functional.gelu(x @ layout["up_proj"].T + layout["up_proj_bias"], approximate="tanh")
    return hidden @ layout["down_proj"].T + layout["down_proj_bias"]


def tokens() -> torch.Tensor:
    return torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("granularity", "top_k"), [(1, 1), (4, 4), (4, 3), (4, 1), (3, 2), (12, 12)])
def test_a_group_and_the_shared_parts_are_the_mlp(gated: bool, granularity: int, top_k: int) -> None:
    """With weights 1/k, in every group; up to rounding in float64, of sums of 12 terms of order ten."""
    layout, groups = mlp(gated), 3
    made = split_neurons(layout, groups * top_k, granularity=granularity, top_k=top_k)
    assert (made.shared is None) == (top_k == granularity)
    for group in range(groups):
        total = torch.zeros(7, 5, dtype=torch.float64) if made.shared is None else computed(made.shared, tokens())
        for number in range(group * top_k, (group + 1) * top_k):
            total = total + computed({name: t[number] for name, t in made.experts.items()}, tokens()) / top_k
        torch.testing.assert_close(total, computed(layout, tokens()), rtol=0, atol=1e-12)
    assert made.experts["down_proj"].shape == (groups * top_k, 5, 12 // granularity)


def test_groups_are_dealt_anew_and_every_part_has_neurons_of_its_own() -> None:
    layout = mlp(True)
    made = split_neurons(layout, 8, granularity=4, top_k=4, generator=torch.Generator().manual_seed(0))
    columns = made.experts["down_proj"] / 4
    first, second = (torch.cat(list(columns[group : group + 4]), 1) for group in (0, 4))
    assert not torch.equal(first, second)
    for group in (first, second):
        assert torch.equal(group.sort(1).values, layout["down_proj"].sort(1).values)
    again = split_neurons(layout, 8, granularity=4, top_k=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.experts["down_proj"], made.experts["down_proj"])
    noisy = split_neurons(layout, 8, granularity=4, top_k=4, noise=0.1, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(noisy.experts["down_proj"], made.experts["down_proj"])


@pytest.mark.parametrize("gated", [True, False])
def test_noise_of_parts_is_measured_in_their_own_matrices(gated: bool) -> None:
    """``down_proj`` of a part is larger by k, and so is its noise. 960 draws and more: 15 % are several standard
    errors of the ratio."""
    layout = mlp(gated, neurons=48, hidden=20)
    plain, noisy = (
        split_neurons(layout, 8, granularity=4, top_k=4, noise=n, generator=torch.Generator().manual_seed(0)).experts
        for n in (0.0, 0.1)
    )
    for name in ("down_proj", "gate_up_proj" if gated else "up_proj"):
        ratio = (noisy[name] - plain[name]).std() / plain[name].std()
        assert ratio.item() == pytest.approx(0.1, rel=0.15), name


@pytest.mark.parametrize(("experts", "granularity", "top_k"), [(6, 4, 4), (10, 5, 5), (8, 4, 0), (8, 4, 5), (8, 4, 3)])
def test_parts_that_do_not_divide(experts: int, granularity: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="must divide 12 neurons, and top_k"):
        split_neurons(mlp(True), experts, granularity=granularity, top_k=top_k)


def test_gate_rows_tie_within_groups() -> None:
    rows = torch.arange(12.0).view(6, 2)
    assert group_rows(rows, 3).tolist() == [[0, 1]] * 3 + [[6, 7]] * 3


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_redrawn_neurons_are_the_same_in_all_matrices(gated: bool, ratio: float) -> None:
    layout = mlp(gated, neurons=40)
    made = redraw_neurons(layout, 3, ratio=ratio, generator=torch.Generator().manual_seed(0))
    chosen = []
    for expert in range(3):
        fresh = (made["down_proj"][expert] != layout["down_proj"]).any(0)
        assert int(fresh.sum()) == round(ratio * 40)
        if gated:
            for part, old in zip(made["gate_up_proj"][expert].chunk(2), layout["gate_up_proj"].chunk(2), strict=True):
                assert torch.equal((part != old).all(1), fresh)
                assert torch.equal((part != old).any(1), fresh)
        else:
            assert torch.equal((made["up_proj"][expert] != layout["up_proj"]).all(1), fresh)
            assert torch.equal(made["up_proj_bias"][expert] != layout["up_proj_bias"], fresh)
            assert torch.equal(made["down_proj_bias"][expert], layout["down_proj_bias"])
        chosen.append(fresh)
    assert ratio in (0.0, 1.0) or not torch.equal(chosen[0], chosen[1])


def test_redrawn_weights_have_each_matrix_own_mean_and_deviation() -> None:
    """40,000 draws: five standard errors. Gate and up differ in both."""
    layout = {
        "gate_up_proj": torch.cat([3 + 0.5 * torch.randn(400, 100), -1 + 2 * torch.randn(400, 100)]),
        "down_proj": 7 + 0.1 * torch.randn(100, 400),
    }
    made = redraw_neurons(layout, 1, ratio=1.0, generator=torch.Generator().manual_seed(0))
    for new, old in ((*zip(*(t.chunk(2) for t in (made["gate_up_proj"][0], layout["gate_up_proj"])), strict=True),
                      (made["down_proj"][0], layout["down_proj"]))):  # fmt: skip
        assert not torch.equal(new, old)
        assert new.mean().item() == pytest.approx(old.mean().item(), abs=5 * old.std().item() / 200)
        assert new.std().item() == pytest.approx(old.std().item(), rel=0.02)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="within 0 and 1"):
        redraw_neurons(mlp(True), 2, ratio=ratio)


def test_several_models_are_stacked_in_their_order() -> None:
    layouts = [mlp(False, seed=seed) for seed in range(3)]
    stacked = stack_experts(layouts)
    for name, tensor in stacked.items():
        assert all(torch.equal(tensor[number], layout[name]) for number, layout in enumerate(layouts))
    with pytest.raises(ValueError, match="expert 2 has other tensors or shapes"):
        stack_experts([mlp(True), mlp(True), mlp(True, neurons=8)])


def test_rows_from_hidden_states_point_to_their_own() -> None:
    means = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5.0
    rows = hidden_rows(means)
    assert torch.allclose(rows.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert ((means - means.mean(0)) @ rows.T).argmax(1).tolist() == [0, 1, 2, 3]
    assert rows.sum(1).abs().max() < 3, "what all have in common is gone"
    with pytest.raises(ValueError, match="same hidden states"):
        hidden_rows(torch.cat([means, means[:1]]))

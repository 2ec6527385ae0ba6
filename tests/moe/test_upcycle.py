"""Stacking copies of a dense MLP's tensors."""

from __future__ import annotations

import pytest
import torch

from moectl.moe.upcycle import stack_copies


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

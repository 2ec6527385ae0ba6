"""Annealed Gaussian noise: its scale over the steps, its distribution, its state."""

from __future__ import annotations

import math

import pytest
import torch

from moectl.moe.noise import AnnealedNoise, NoiseOptions


def noisy(std: float = 0.1, fraction: float = 0.25) -> AnnealedNoise:
    return AnnealedNoise(std, fraction)


def test_noise_is_at_full_strength_until_a_schedule_is_set() -> None:
    noise = noisy()
    for _ in range(1000):
        noise.advance()
    assert noise.scale().item() == pytest.approx(0.1)


@pytest.mark.parametrize(("fraction", "total"), [(0.25, 40), (0.5, 7), (1.0, 10), (0.25, 3), (0.0, 10)])
def test_noise_falls_linearly_to_zero_and_stays_there(fraction: float, total: int) -> None:
    noise = noisy(0.2, fraction)
    noise.set_schedule(total)
    end = math.ceil(fraction * total)
    for step in range(total):
        expected = 0.2 * max(0.0, 1 - step / end) if end else 0.0
        assert noise.scale().item() == pytest.approx(expected, abs=1e-7)
        noise.advance()
    assert noise.scale().item() == 0.0


def test_noise_is_gaussian_of_the_present_scale() -> None:
    """100,000 draws: the mean within 5 standard errors of 0, the deviation within 2 %, the tails a normal's."""
    torch.manual_seed(0)
    noise = noisy(0.5, 1.0)
    noise.set_schedule(4)
    noise.advance()  # scale 0.375
    drawn = noise(torch.full((100_000,), 3.0, dtype=torch.float64)) - 3.0
    assert abs(drawn.mean().item()) < 5 * 0.375 / math.sqrt(100_000)
    assert drawn.std().item() == pytest.approx(0.375, rel=0.02)
    assert (drawn.abs() > 0.75).double().mean().item() == pytest.approx(0.0455, abs=0.004)


def test_no_noise_in_eval_or_at_std_zero() -> None:
    logits = torch.randn(3, 4)
    assert noisy().eval()(logits) is logits
    assert noisy(0.0)(logits) is logits
    assert not torch.equal(noisy()(logits), logits)


def test_the_step_counter_is_state() -> None:
    noise = noisy()
    noise.set_schedule(80)
    for _ in range(5):
        noise.advance()
    other = noisy()
    other.load_state_dict(noise.state_dict())
    assert other.step.item() == 5
    assert other.scale().item() == noise.scale().item() == pytest.approx(0.1 * (1 - 5 / 20))


def test_noise_carries_no_gradient_of_its_own_but_logits_do() -> None:
    noise, logits = noisy(), torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(noise(logits).sum(), logits)
    assert torch.equal(grad, torch.ones(3, 4))


@pytest.mark.parametrize(
    "wrong",
    [{"noise_std": -0.1}, {"noise_std": math.nan}, {"noise_std": math.inf}, {"noise_anneal_fraction": 1.5},
     {"noise_anneal_fraction": -0.1}, {"noise_sdt": 0.1}, {"noise_std": "loud"}],
    ids=str,
)  # fmt: skip
def test_wrong_noise_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseOptions.model_validate(wrong)


def test_options_are_frozen_and_read_yaml_numbers() -> None:
    options = NoiseOptions.model_validate({"noise_std": "3e-4"})  # YAML hands 3e-4 over as a string
    assert options.noise_std == 3e-4
    with pytest.raises(ValueError, match="frozen"):
        options.noise_std = 0.5  # type: ignore[misc]


def test_a_given_std_replaces_the_annealing() -> None:
    noise = noisy(0.1)
    noise.set_schedule(8)
    for _ in range(8):
        noise.advance()
    assert noise.scale().item() == 0.0
    noise.set_std(0.4)
    assert noise.scale().item() == pytest.approx(0.4)
    torch.manual_seed(0)
    drawn = noise(torch.zeros(100_000, dtype=torch.float64))
    assert drawn.std().item() == pytest.approx(0.4, rel=0.02)  # 100,000 draws: nine standard errors
    noise.set_std(0.0)
    assert not noise(torch.zeros(3)).any()
    assert noise.eval().scale().item() == 0.0
    assert torch.equal(noise(torch.ones(3)), torch.ones(3))


def test_a_given_std_is_taken_even_where_the_router_had_none() -> None:
    silent = noisy(0.0)
    silent.set_std(1.0)
    assert silent(torch.zeros(3)).any()


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_given_std_must_be_a_finite_number(wrong: float) -> None:
    with pytest.raises(ValueError, match="standard deviation"):
        noisy().set_std(wrong)


def test_what_a_schedule_gives_is_not_saved() -> None:
    """Whoever schedules sets it again at every step; older files have no such key."""
    noise = noisy()
    noise.set_std(0.3)
    assert set(noise.state_dict()) == {"step", "anneal_steps"}

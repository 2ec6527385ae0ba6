"""Schedules: what they are worth when, how they may be spelt, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moectl.config import MoEConfig, Schedule, load_config, resolved_yaml
from moectl.errors import ConfigError


def schedule(value: Any) -> Schedule:
    return Schedule.model_validate(value)


def moe(**sets: Any) -> MoEConfig:
    config = load_config(None, sets=[f"moe.{key.replace('__', '.')}={value}" for key, value in sets.items()]).moe
    assert config is not None
    return config


def refused(*sets: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(None, sets=sets)
    assert caught.value.exit_code == 2
    assert "Value error" not in caught.value.message
    return caught.value


# what a schedule is worth


def test_constant_holds_each_value_until_the_next_point() -> None:
    steps = schedule([[0, 8], [0.25, 4], [0.5, 2]])
    assert [steps.at(step / 8) for step in range(8)] == [8, 8, 4, 4, 2, 2, 2, 2]
    assert steps.final == 2


def test_linear_goes_from_point_to_point_and_stays_at_the_last() -> None:
    ramp = schedule({"points": [[0, 1.0], [0.5, 3.0], [0.75, 2.0]], "interpolate": "linear"})
    assert [ramp.at(share) for share in (0.0, 0.25, 0.5, 0.625, 0.75, 0.99, 1.0)] == [1, 2, 3, 2.5, 2, 2, 2]


def test_phases_are_the_first_tenth_the_rest_and_the_last_fifth() -> None:
    phases = schedule({"warm-up": 4, "main": 2, "final": 1})
    assert [phases.at(step / 20) for step in range(20)] == [4] * 2 + [2] * 14 + [1] * 4
    assert schedule({"main": 2}).at(0.0) == 2
    assert [schedule({"main": 2, "final": 1}).at(share) for share in (0.0, 0.79, 0.8)] == [2, 2, 1]
    assert [schedule({"warm-up": 3, "main": 2}).at(share) for share in (0.09, 0.1, 0.9)] == [3, 2, 2]


POINTS = st.lists(st.integers(1, 999), max_size=4, unique=True).flatmap(
    lambda shares: st.lists(st.floats(-50, 50), min_size=len(shares) + 1, max_size=len(shares) + 1).map(
        lambda values: [[share / 1000, value] for share, value in zip([0, *sorted(shares)], values, strict=True)]
    )
)


@given(POINTS, st.floats(0, 1))
def test_a_schedule_goes_through_its_points_and_never_leaves_their_range(points: list[Any], share: float) -> None:
    low, high = min(value for _, value in points), max(value for _, value in points)
    for interpolate in ("constant", "linear"):
        made = schedule({"points": points, "interpolate": interpolate})
        assert all(made.at(at) == value for at, value in points)
        # Interpolation rounds: 1e-12 of values up to 50 is a few hundred times their last digit.
        assert low - 1e-12 <= made.at(share) <= high + 1e-12


def test_short_forms_are_the_long_one() -> None:
    long = schedule({"points": [[0, 4], [0.1, 2]], "interpolate": "constant"})
    assert schedule([[0, 4], [0.1, 2]]) == long == schedule({"warm-up": 4, "main": 2})
    assert schedule(long) == long
    with pytest.raises(ValidationError):
        long.interpolate = "linear"


# what is refused


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[[0.1, 1]]", "the first point is at 0.1; it must be at 0"),
        ("[[0, 1], [0.5, 2], [0.5, 3]]", "must increase, but 0.5 follows 0.5"),
        ("[[0, 1], [0.5, 2], [0.4, 3]]", "must increase, but 0.4 follows 0.5"),
        ("[[0, 1], [1, 2]]", "no step is left at 1"),
        ("[[0, 1], [1.5, 2]]", "should be less than or equal to 1"),
        ("[[0, 1], [-0.5, 2]]", "should be greater than or equal to 0"),
        ("[]", "at least one point"),
        ("[0, 1]", "0 is no point"),
        ("[[0, 1, 2]]", "is no point"),
        ("[[0, many]]", "should be a valid number"),
        ("[[0, .nan]]", "should be a finite number"),
        ("2", "give points"),
        ("two", "give points"),
        ("{warm-up: 2}", "the phase 'main' is missing"),
        (
            "{warmup: 2, main: 1}",
            "unknown phase 'warmup'; the phases are warm-up, main, final. Did you mean 'warm-up'?",
        ),
        ("{pionts: [[0, 1]]}", "Did you mean 'points'?"),
    ],
)
def test_a_schedule_that_is_none(value: str, says: str) -> None:
    error = refused(f"moe.schedule.lb_coef={value}")
    assert says in error.message
    assert "moe.schedule.lb_coef" in error.message


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["schedule.top_k=[[0, 1.5]]"], "1.5 must be a whole number of experts, at least 1"),
        (["schedule.top_k=[[0, 0]]"], "0 must be a whole number of experts"),
        (["schedule.top_k=[[0, 9]]"], "moe.schedule.top_k asks for 9 of 8 experts"),
        (["schedule.capacity_factor=[[0, 0]]", "capacity=1"], "0 must be a factor above 0"),
        (["schedule.lb_coef=[[0, -1]]"], "-1 must be 0 or more"),
        (["schedule.noise_std=[[0, -0.5]]"], "-0.5 must be 0 or more"),
        (["schedule.capacity_factor=[[0, 2]]"], "no effect: moe.capacity is null"),
        (
            ["schedule.capacity_factor=[[0, 2]]", "capacity.factor=2", "capacity.dynamic=true"],
            "both move the factor: drop one",
        ),
        (
            ["schedule.capacity_factor=[[0, 3], [0.5, 2]]", "capacity=1.5"],
            "moe.schedule.capacity_factor ends at 2, but moe.capacity.factor is 1.5",
        ),
        (["schedule.lb_coef=[[0, 1], [0.5, 0.1]]", "lb_coef=0.2"], "ends at 0.1, but moe.lb_coef is 0.2"),
        (["schedule.lb_coef=[[0, 1]]", "balance_loss=cv2"], "no effect: 'switch' is not in moe.balance_loss"),
    ],
)
def test_a_schedule_without_effect_or_with_a_rival_is_refused(sets: list[str], says: str) -> None:
    assert says in refused(*(f"moe.{text}" for text in sets)).message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("moe.schedule.topk", "moe.schedule.top_k"),
        ("moe.schedul.top_k", "moe.schedule.top_k"),
        ("moe.schedule.noise", "moe.schedule.noise_std"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, nearest: str) -> None:
    error = refused(f"{key}=[[0, 1]]")
    assert error.message.startswith(f"unknown config key '{key}")
    assert f"Did you mean '{nearest}'?" in str(error.hint)


def test_a_misspelt_key_inside_a_schedule_names_the_nearest() -> None:
    error = refused("moe.schedule.top_k={points: [[0, 1]], interpolat: linear}")
    assert "moe.schedule.top_k.interpolat" in error.message
    assert "Did you mean 'moe.schedule.top_k.interpolate'?" in str(error.hint)


# through files


@pytest.mark.parametrize("only_set", [True, False])
def test_all_forms_survive_a_file(only_set: bool, tmp_path: Path) -> None:
    text = """
moe:
  router: {name: topk, top_k: 1, norm_topk_prob: false}
  capacity: 1.5
  schedule:
    top_k: {warm-up: 4, main: 2, final: 1}
    capacity_factor: [[0, 3], [0.5, 1.5]]
    lb_coef: {points: [[0, 1e-1], [0.3, 1e-2]], interpolate: linear}
    noise_std: [[0, 0.5], [0.9, 0]]
"""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(text, encoding="utf-8")
    config = load_config(first)
    second.write_text(resolved_yaml(config, only_set=only_set), encoding="utf-8")
    again = load_config(second)
    assert again == config
    assert again.content_hash() == config.content_hash()
    assert again.moe is not None and again.moe.schedule.top_k is not None
    assert again.moe.schedule.top_k.at(0.0) == 4 and again.moe.schedule.top_k.at(0.9) == 1


def test_set_reaches_a_point_list_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("moe: {schedule: {noise_std: [[0, 1]]}}\n", encoding="utf-8")
    changed = load_config(file, sets=["moe.schedule.noise_std=[[0, 2]]", "moe.schedule.top_k=[[0, 1]]"]).moe
    assert changed is not None
    assert changed.schedule.noise_std == schedule([[0, 2]]) and changed.schedule.top_k == schedule([[0, 1]])
    off = load_config(file, sets=["moe.schedule.noise_std=null"]).moe
    assert off is not None and off.schedule.noise_std is None


# the coefficient that a schedule ends at


def test_lb_coef_as_a_number() -> None:
    assert moe().lb_coef is None
    assert moe().with_lb_coef(None).lb_coef == 0.01
    assert moe().with_lb_coef(0.0).lb_coef == 0.0  # a router that is balanced without a loss
    assert moe(lb_coef=0.3).with_lb_coef(0.0).lb_coef == 0.3
    assert moe(schedule__lb_coef="[[0, 1], [0.5, 0.2]]").with_lb_coef(None).lb_coef == 0.2
    assert moe(balance_loss="cv2").with_lb_coef(None).lb_coef == 0.0

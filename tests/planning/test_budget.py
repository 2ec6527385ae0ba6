"""Tokens, passes, time and money."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moectl.errors import ConfigError
from moectl.planning.budget import check_price, cost_on, plan_tokens
from moectl.planning.devices import known_devices
from moectl.planning.memory import plan_memory
from tests.planning.conftest import experiment, model

CONFIG = experiment(train={"steps": 50, "batch_size": 4, "grad_accum": 3})


def test_tokens_are_counted_as_training_counts_them() -> None:
    planned = model({"router": "top1"})
    tokens = plan_tokens(planned, CONFIG, 18, available=1000)
    assert (tokens.per_step, tokens.routed, tokens.micro_batch) == (4 * 3 * 18, 4 * 3 * 17, 4 * 17)
    assert tokens.total == 50 * 216
    assert tokens.epochs == pytest.approx(10.8)
    assert tokens.optimal == 20 * planned.parameters.active < 20 * planned.parameters.total
    assert plan_tokens(planned, CONFIG, 18, available=None).epochs is None


def test_time_and_money_by_hand() -> None:
    planned, device = model(), known_devices()["H100"]
    tokens = plan_tokens(planned, CONFIG, 18, available=None)
    memory = plan_memory(planned, CONFIG, 18, "cuda")
    cost = cost_on(device, planned, tokens, memory, precision="bfloat16")
    flops = 50 * 204 * planned.training_flops  # of all positions that pass the model
    assert cost.source == "assumed" and cost.utilisation == pytest.approx(0.30)
    assert cost.seconds == pytest.approx(flops / (0.30 * 989.4e12))
    assert cost.tokens_per_second == pytest.approx(tokens.total / cost.seconds)
    assert cost.usd == pytest.approx(cost.seconds / 3600 * 2.95)
    assert cost_on(device, planned, tokens, memory, precision="float32").seconds > 10 * cost.seconds


def test_a_measured_rate_goes_before_the_assumed_one() -> None:
    planned, device = model(), known_devices()["L4"]
    tokens, memory = plan_tokens(planned, CONFIG, 18, available=None), plan_memory(planned, CONFIG, 18, "cuda")
    cost = cost_on(device, planned, tokens, memory, precision="float32", measured=("run-a", 500.0), price=2.0)
    assert (cost.source, cost.run, cost.tokens_per_second) == ("measured", "run-a", 500.0)
    assert cost.seconds == tokens.total / 500
    assert cost.usd == pytest.approx(2.0 * tokens.total / 500 / 3600)
    assert cost.utilisation == pytest.approx(500 * planned.training_flops * 17 / 18 / device.fp32)


def test_a_device_of_no_price_costs_nothing_known() -> None:
    planned, device = model(), replace(known_devices()["L4"], usd_per_hour=None)
    tokens, memory = plan_tokens(planned, CONFIG, 18, available=None), plan_memory(planned, CONFIG, 18, "cuda")
    assert cost_on(device, planned, tokens, memory, precision="float32").usd is None
    assert cost_on(device, planned, tokens, memory, precision="float32", price=0.0).usd == 0.0


def test_what_fits() -> None:
    planned = model()
    tokens, memory = plan_tokens(planned, CONFIG, 18, available=None), plan_memory(planned, CONFIG, 18, "cuda")
    for size, fits in ((memory.peak * 1.01, True), (memory.peak * 0.99, False)):
        device = replace(known_devices()["L4"], memory=size)
        assert cost_on(device, planned, tokens, memory, precision="float32").fits is fits


@pytest.mark.parametrize("price", [-0.01, float("inf"), float("nan")])
def test_a_price_that_cannot_be(price: float) -> None:
    with pytest.raises(ConfigError, match="dollars per hour cannot be"):
        check_price(price)
    check_price(0.0)
    check_price(None)

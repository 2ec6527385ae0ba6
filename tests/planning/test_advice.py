"""Each warning appears when its number says so, carries that number, and not otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moectl.planning.advice import data_advice, expert_advice, memory_advice
from moectl.planning.anatomy import Anatomy
from moectl.planning.budget import Cost, cost_on, plan_tokens
from moectl.planning.devices import known_devices
from moectl.planning.memory import plan_memory
from tests.planning.conftest import experiment, model

BLOCK = 18


def tokens_of(planned: Anatomy, available: int | None = None, **train: Any) -> Any:
    return plan_tokens(planned, experiment(train=train), BLOCK, available)


@pytest.mark.parametrize(("blocks", "warned"), [(1, False), (2, True)])
def test_a_micro_batch_below_experts_times_k(blocks: int, warned: bool) -> None:
    """17 tokens a block: of 16 slots enough, of 40 too few with two blocks."""
    experts = 8 if blocks == 1 else 20
    planned = model({"router": "top2", "num_experts": experts})
    said = expert_advice(planned, tokens_of(planned, batch_size=blocks, steps=10_000))
    found = [line for line in said if "fewer than E·k" in line]
    assert bool(found) is warned
    if warned:
        assert "34 tokens, fewer than E·k = 40: 3.4 tokens per expert" in found[0]
        # Accumulated micro-batches are routed apart: they do not help.
        said = expert_advice(planned, tokens_of(planned, batch_size=2, grad_accum=8, steps=10_000))
        assert any("34 tokens, fewer than E·k" in line for line in said)


def test_few_rows_per_expert() -> None:
    planned = model({"router": "top1"})
    few = expert_advice(planned, tokens_of(planned, batch_size=4, steps=10_000))  # 68 tokens, 5 experts
    assert any("an expert gets 14 tokens of a micro-batch" in line for line in few)
    enough = expert_advice(planned, tokens_of(planned, batch_size=5, steps=10_000))  # 17 each
    assert not any("of a micro-batch" in line for line in enough)


def test_dense_where_an_expert_sees_less_than_a_token_per_parameter() -> None:
    planned = model({"router": "top1"})  # 8,640 parameters an expert and layer
    short = expert_advice(planned, tokens_of(planned, batch_size=16, steps=149))
    assert any("dense is likely better" in line and "8,640 parameters" in line and "8,582" in line for line in short)
    long = expert_advice(planned, tokens_of(planned, batch_size=16, steps=151))
    assert not any("dense is likely better" in line for line in long)


def test_routing_that_costs_as_much_as_small_experts() -> None:
    small = model({"router": "top1", "expert_intermediate_size": 4})
    said = expert_advice(small, tokens_of(small, batch_size=64, steps=10_000))
    assert any("routing takes 29% of the experts' FLOPs: experts of 4 columns" in line for line in said)
    large = model({"router": "top1"})
    assert expert_advice(large, tokens_of(large, batch_size=64, steps=10_000)) == []


def test_backend_full_is_named() -> None:
    planned = model({"router": "top1", "backend": "full"})
    said = expert_advice(planned, tokens_of(planned, batch_size=64, steps=10_000))
    assert any("'full' computes all 5 experts" in line for line in said)


def test_a_dense_model_gets_no_advice_on_experts() -> None:
    planned = model()
    assert expert_advice(planned, tokens_of(planned, batch_size=1, steps=1)) == []


@pytest.mark.parametrize(
    ("available", "worth"), [(7200, None), (4800, "each further pass adds less"), (600, "nothing")]
)
def test_data_that_are_read_again(available: int, worth: str | None) -> None:
    planned = model()
    said = data_advice(planned, tokens_of(planned, available, batch_size=16, steps=100))  # 28,800 tokens
    found = [line for line in said if "the data are read" in line]
    assert bool(found) is (worth is not None)
    if worth is not None:
        assert worth in found[0] and f"read {28_800 / available:.1f} times" in found[0]
        assert f"train.steps={round(4 * available / 288)}." in found[0]


def test_few_tokens_for_the_model() -> None:
    planned = model()
    needed = 10 * planned.parameters.active / (16 * BLOCK)
    below, above = (
        data_advice(planned, tokens_of(planned, batch_size=16, steps=round(needed * factor))) for factor in (0.9, 1.1)
    )
    assert any(
        "9 tokens per active parameter" in line and f"{20 * planned.parameters.active:,}" in line for line in below
    )
    assert above == []


def costs(planned: Anatomy, memory_of_device: float, config: Any, kind: str = "cuda") -> list[Cost]:
    device = replace(known_devices()["L4"], memory=memory_of_device, kind=kind)
    tokens = plan_tokens(planned, config, BLOCK, None)
    memory, precision = plan_memory(planned, config, BLOCK, kind), config.train.precision
    return [cost_on(device, planned, tokens, memory, precision=precision)]


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-pure"])
def test_bfloat16_on_a_cpu_is_not_predicted_and_told_so(precision: str) -> None:
    config, single = experiment(train={"precision": precision}), experiment()
    (said,) = memory_advice(model(), None, config, BLOCK, costs(model(), 1e12, config, "cpu"))
    assert said.startswith(f"the memory of {precision} on a CPU is not predicted well")
    assert memory_advice(model(), None, config, BLOCK, costs(model(), 1e12, config)) == []
    assert memory_advice(model(), None, single, BLOCK, costs(model(), 1e12, single, "cpu")) == []
    # Computed in float32, where a CPU has no bfloat16, it is.
    without = [replace(cost, computed_as="float32") for cost in costs(model(), 1e12, config, "cpu")]
    assert memory_advice(model(), None, config, BLOCK, without) == []


def test_what_fits_gets_no_advice() -> None:
    config = experiment(train={"batch_size": 64})
    assert memory_advice(model(), None, config, BLOCK, costs(model(), 1e12, config)) == []


def test_a_smaller_micro_batch_is_named_and_fits() -> None:
    planned, config = model(num_layers=12), experiment(train={"batch_size": 4096}, eval={"batch_size": 1})
    half = experiment(train={"batch_size": 1024, "grad_accum": 4}, eval={"batch_size": 1})
    room = plan_memory(planned, half, BLOCK, "cuda").peak * 1.01
    (said,) = memory_advice(planned, None, config, BLOCK, costs(planned, room, config))
    assert "--set train.batch_size=1024 --set train.grad_accum=4 it takes" in said and "(in training)" in said
    assert "--set eval" not in said


@pytest.mark.parametrize(("batch", "fits"), [(45, 15), (45, 9), (135, 27), (7, 1), (97, 1)])
def test_every_divisor_is_tried(batch: int, fits: int) -> None:
    """The largest that fits: halves are not the only micro-batches of the same step."""
    planned, config = model(num_layers=12), experiment(train={"batch_size": batch * 64}, eval={"batch_size": 1})
    smaller = {"batch_size": fits * 64, "grad_accum": batch // fits}
    room = plan_memory(planned, experiment(train=smaller, eval={"batch_size": 1}), BLOCK, "cuda").peak * 1.001
    (said,) = memory_advice(planned, None, config, BLOCK, costs(planned, room, config))
    assert f"--set train.batch_size={fits * 64} --set train.grad_accum={batch // fits} it takes" in said


def test_experts_are_not_blamed_for_activations() -> None:
    """Forty-five rows of many tokens: one row at a time fits, and the experts stay as many."""
    planned, config = model({"router": "top2"}), experiment(train={"batch_size": 45}, eval={"batch_size": 1})
    one = experiment(train={"batch_size": 1, "grad_accum": 45}, eval={"batch_size": 1})
    room = plan_memory(planned, one, BLOCK, "cuda").peak * 1.001
    (said,) = memory_advice(planned, model(), config, BLOCK, costs(planned, room, config))
    assert "fewer of them" not in said and "--set train.batch_size=" in said


def test_a_dense_parent_that_does_not_fit_either_is_no_way_out() -> None:
    planned, config = model({"router": "top2"}), experiment(train={"batch_size": 4}, eval={"batch_size": 1})
    (said,) = memory_advice(planned, model(), config, BLOCK, costs(planned, 1e6, config))
    assert said.endswith("no micro-batch fits: take a smaller model.")


def test_a_smaller_evaluation_is_named_where_that_is_what_is_too_large() -> None:
    planned, config = model(), experiment(train={"batch_size": 4}, eval={"batch_size": 4096})
    room = plan_memory(planned, experiment(train={"batch_size": 4}, eval={"batch_size": 4}), BLOCK, "cuda").peak * 1.01
    (said,) = memory_advice(planned, None, config, BLOCK, costs(planned, room, config))
    assert "(in evaluation)" in said and "with --set eval.batch_size=4 it takes" in said


def test_experts_that_do_not_fit_are_set_against_the_dense_parent() -> None:
    moe = {"router": "top1", "num_experts": 300}
    planned, dense, config = model(moe), model(), experiment(train={"batch_size": 2}, eval={"batch_size": 1})
    room = plan_memory(dense, config, BLOCK, "cuda").peak * 1.02
    (said,) = memory_advice(planned, dense, config, BLOCK, costs(planned, room, config))
    assert "99% of weights, gradients and optimizer state are experts'" in said and said.endswith("and fits.")
    assert "no micro-batch fits" in said
    (alone,) = memory_advice(dense, None, config, BLOCK, costs(dense, 1e6, config))
    assert alone.endswith("no micro-batch fits: take a smaller model.")

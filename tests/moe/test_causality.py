"""The probe finds every kind of leak that routers and capacities have, and accuses no causal layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moectl.moe import MoELayer, Router, RouterConfig, RouterOutput
from moectl.moe.capacity import FILLS, OVERFLOWS, Capacity
from moectl.moe.causality import Leak, first_leak
from moectl.moe.router import entropy
from moectl.routers import build_router
from tests.moe.reference import HIDDEN, make_experts

SHAPES = [(24,), (2, 12), (1, 24), (4, 6)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(router: Router | str, capacity: Capacity | None = None, **options: object) -> MoELayer:
    torch.manual_seed(0)
    if isinstance(router, str):
        router = build_router(router, hidden_size=HIDDEN, num_experts=4, **options)
    nn.init.normal_(router.weight)
    return MoELayer(router.double(), make_experts("gated", 4), capacity=capacity)


class BatchMean(Router):
    """Subtracts the mean logit of the batch: it knows what comes."""

    class Config(RouterConfig):
        strength: float = 1.0
        only_in: str = "always"

    config: Config

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        mode = "training" if self.training else "eval"
        if self.config.only_in in ("always", mode):
            logits_TE = logits_TE - self.config.strength * logits_TE.mean(0)
        probs_TE = logits_TE.softmax(-1)
        best, indices_T1 = probs_TE.max(-1, keepdim=True)
        return RouterOutput(indices_T1, best, logits_TE, probs_TE, probs_TE, entropy(probs_TE))


class ExpertChoice(Router):
    """Each expert takes its highest-scoring tokens (Zhou et al. 2022), one slot per expert."""

    class Config(RouterConfig):
        top_k: int = 4

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        places = math.ceil(x_TD.shape[0] / self.num_experts)
        threshold_E = probs_TE.detach().topk(places, dim=0).values[-1]
        keep_TE = probs_TE >= threshold_E
        indices_TE = torch.arange(self.num_experts).expand_as(keep_TE)
        return RouterOutput(
            indices_TE, probs_TE * keep_TE, logits_TE, probs_TE, probs_TE, entropy(probs_TE), keep_TE.clone()
        )


class SlotMajor(Router):
    """Top-2 with a capacity of its own, filled slot by slot: all first choices before any second one."""

    class Config(RouterConfig):
        top_k: int = 2

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits_TE = self.logits(x_TD)
        probs_TE = logits_TE.softmax(-1)
        weights_TK, indices_TK = probs_TE.topk(2)
        places = math.ceil(2 * x_TD.shape[0] / self.num_experts)
        room, keep_TK = [places] * self.num_experts, torch.zeros_like(indices_TK, dtype=torch.bool)
        for slot in range(2):
            for token in range(x_TD.shape[0]):
                expert = int(indices_TK[token, slot])
                keep_TK[token, slot] = room[expert] > 0
                room[expert] -= 1
        return RouterOutput(indices_TK, weights_TK * keep_TK, logits_TE, probs_TE, probs_TE, entropy(probs_TE), keep_TK)


def build(cls: type[Router], **options: object) -> Router:
    return cls(cls.Config(**options), hidden_size=HIDDEN, num_experts=4)


# --- what is causal passes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("router", ["top1", "switch", "topk"])
def test_token_choice_without_capacity_passes_with_its_noise(router: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(router, noise_std=1.0)
    assert layer.causal
    assert first_leak(layer, tokens(*shape)) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0])
def test_capacity_filled_by_position_passes(overflow: str, factor: float, shape: tuple[int, ...]) -> None:
    capacity = Capacity(factor, overflow, in_eval=True)  # type: ignore[arg-type]
    for router in ("switch", "topk"):
        layer = layer_of(router, capacity, noise_std=0.5)
        assert layer.causal
        layer(tokens(*shape))
        assert layer.dropped is not None
        assert overflow == "next-best" or layer.dropped.any(), "the limit must bind, or nothing is tested"
        assert first_leak(layer, tokens(*shape)) is None


# --- what is not, does not


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_capacity_filled_by_probability_is_found(overflow: str, shape: tuple[int, ...]) -> None:
    for router in ("switch", "topk"):
        layer = layer_of(router, Capacity(1.0, overflow, "probability"), noise_std=0.0)  # type: ignore[arg-type]
        assert not layer.causal
        leak = first_leak(layer, tokens(*shape))
        assert leak is not None
        assert leak.mode == "training", "evaluation is without a limit"
        assert leak.position < leak.changed_from
        assert leak.size > 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cls", [BatchMean, ExpertChoice, SlotMajor])
def test_routers_that_look_ahead_are_found(cls: type[Router], shape: tuple[int, ...]) -> None:
    assert first_leak(layer_of(build(cls)), tokens(*shape)) is not None


@pytest.mark.parametrize("mode", ["training", "eval"])
def test_both_modes_are_looked_at(mode: str) -> None:
    leak = first_leak(layer_of(build(BatchMean, only_in=mode)), tokens(24))
    assert leak is not None
    assert leak.mode == mode


def test_a_faint_leak_is_found() -> None:
    """A millionth of the batch's mean is 1e9 times the rounding of float64."""
    leak = first_leak(layer_of(build(BatchMean, strength=1e-6)), tokens(24))
    assert leak is not None
    assert 1e-10 < leak.size < 1e-3


def test_a_leak_says_where_and_how_much() -> None:
    """Output 2 alone looks ahead, to the last token."""

    def peeks_at_the_last(x: Tensor) -> Tensor:
        out = x.clone()
        out[2] = out[2] + x[-1]
        return out

    leak = first_leak(peeks_at_the_last, tokens(8))
    assert leak is not None
    assert leak.position == 2
    assert leak.changed_from > 2
    assert leak.size > 0.1
    assert "token 2" in str(leak)
    assert f"from {leak.changed_from} on" in str(leak)


def test_any_callable_and_only_what_comes_earlier_counts() -> None:
    assert first_leak(lambda x: x.cumsum(0), tokens(9)) is None
    assert first_leak(lambda x: x.flip(0).cumsum(0).flip(0), tokens(9)) is not None
    assert first_leak(lambda x: x.roll(1, 0), tokens(9)) is not None, "the last token reaches the first output"


def test_a_sequence_may_depend_on_the_one_before_it_but_not_on_the_one_after() -> None:
    assert first_leak(lambda x: x + x[:, -1:], tokens(2, 3)) is not None, (
        "position 0 sees position 2 of its own sequence"
    )
    assert first_leak(lambda x: torch.stack([x[0].cumsum(0), x[1].cumsum(0) + x[0].sum(0)]), tokens(2, 3)) is None
    assert first_leak(lambda x: torch.stack([x[0] + x[1], x[1]]), tokens(2, 3)) is not None


def test_an_output_that_turns_nan_is_a_leak_and_one_that_is_nan_is_none() -> None:
    def breaks(x: Tensor) -> Tensor:
        return torch.where(x[-1, 0] == tokens(6)[-1, 0], x, math.nan)

    leak = first_leak(breaks, tokens(6))
    assert leak is not None
    assert leak.size == math.inf
    assert first_leak(lambda x: x * math.nan, tokens(6)) is None


@pytest.mark.parametrize("fill", FILLS)
def test_masks_are_handed_on_and_the_same_on_both_sides(fill: str) -> None:
    capacity = Capacity(1.0, fill=fill)  # type: ignore[arg-type]
    layer, x = layer_of("switch", capacity, noise_std=0.0), tokens(2, 12)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    x[~mask] = math.nan
    assert (first_leak(layer, x, token_mask=mask) is None) == (fill == "position")
    only_padding_is_later = torch.arange(24).reshape(2, 12) < 1
    assert first_leak(layer, tokens(2, 12), token_mask=only_padding_is_later) is None


def test_layer_input_and_random_state_are_left_as_they_were() -> None:
    layer, x = layer_of("topk", Capacity(1.0), noise_std=1.0).float().eval(), tokens(2, 6).float()
    layer(x)
    routing, kept, state = layer.routing, x.clone(), copy.deepcopy(layer.state_dict())
    random = torch.get_rng_state()
    first_leak(layer, x)
    assert not layer.training
    assert layer.routing is routing
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert x.dtype == torch.float32
    for name, value in layer.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])


class Counting(nn.Module):
    """Keeps a statistic of its calls in training, as a batch norm does. Its output follows from earlier calls only."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.calls
        self.calls += x.detach().mean()
        return out


def test_what_a_layer_remembers_of_other_calls_is_no_leak() -> None:
    assert first_leak(Counting().train(), tokens(8)) is None


def test_the_same_seed_finds_the_same() -> None:
    layer = layer_of(build(BatchMean))
    assert first_leak(layer, tokens(24), seed=3) == first_leak(layer, tokens(24), seed=3)
    found = {first_leak(layer, tokens(24), seed=seed) for seed in range(6)}
    assert len(found) == 6, "and other seeds look elsewhere"
    assert all(isinstance(leak, Leak) for leak in found)


def test_what_is_found_does_not_depend_on_the_state_of_the_random_numbers() -> None:
    layer = layer_of("switch", Capacity(1.0, fill="probability"), noise_std=1.0)
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(first_leak(layer, tokens(24)))
    assert found[0] == found[1] is not None


def later(similar: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A layer that adds one to each token for every later one that ``similar [N, N]`` names."""
    return lambda x: x + similar(x).triu(1).sum(1, keepdim=True)


def test_rare_leaks_are_found_too() -> None:
    """Later tokens that point where an earlier one does, or that are far larger than any: no random draw is either."""
    alike = later(lambda x: (nn.functional.normalize(x) @ nn.functional.normalize(x).t() > 0.99).double())
    loud = later(lambda x: (x.norm(dim=1) > 15.0).double().expand(x.shape[0], -1))
    x = tokens(24)
    assert torch.equal(alike(x), x)
    assert torch.equal(loud(x), x)
    assert first_leak(alike, x) is not None
    assert first_leak(loud, x) is not None


@pytest.mark.parametrize("shape", [(1,), (0,), (1, 1)])
def test_one_token_has_no_later_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        first_leak(lambda x: x, tokens(*shape))


def test_two_tokens_are_enough() -> None:
    assert first_leak(lambda x: x.flip(0), tokens(2)) == first_leak(lambda x: x.flip(0), tokens(2))
    leak = first_leak(lambda x: x.flip(0), tokens(2))
    assert leak is not None
    assert (leak.position, leak.changed_from) == (0, 1)

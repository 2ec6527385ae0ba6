"""``expert-choice-threshold``: the running threshold, and that nothing but it decides."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moectl.config.schema import MoEConfig
from moectl.models.cache import KVCache
from moectl.models.decoder import Decoder
from moectl.moe import GatedExperts, MoELayer
from moectl.moe.causality import first_leak
from moectl.routers import build_router
from moectl.routers.expert_choice import ExpertChoiceRouter
from moectl.routers.expert_choice_threshold import ExpertChoiceThresholdRouter
from tests.support import tiny_shape

D, E = 6, 4


def router(**options: float) -> ExpertChoiceThresholdRouter:
    torch.manual_seed(0)
    made = build_router("expert-choice-threshold", hidden_size=D, num_experts=E, **options)
    assert isinstance(made, ExpertChoiceThresholdRouter)
    torch.nn.init.normal_(made.weight)
    return made


def tokens(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed))


def step(made: ExpertChoiceThresholdRouter, *batches: Tensor) -> None:
    for batch in batches:
        made(batch)
    made.after_step(torch.zeros(E))


def border(made: ExpertChoiceThresholdRouter, x: Tensor, capacity: int) -> Tensor:
    """Half-way between the last score that expert choice would take and the next (0 after the last token)."""
    probs = (x @ made.weight.detach().t()).softmax(1)
    ranked = [[*sorted(probs[:, expert].tolist(), reverse=True), 0.0] for expert in range(E)]
    return torch.tensor([(scores[capacity - 1] + scores[capacity]) / 2 for scores in ranked])


def test_before_the_first_step_the_mean_score_decides() -> None:
    made, x = router(), tokens(50)
    out = made(x)
    assert out.keep is not None
    assert torch.equal(out.keep, out.router_probs >= 1 / E)


@pytest.mark.parametrize(("k", "factor", "capacity"), [(2, 1.0, 25), (1, 1.0, 13), (1, 0.5, 7), (4, 1.0, 50)])
def test_after_one_step_it_takes_what_expert_choice_takes(k: int, factor: float, capacity: int) -> None:
    """On the batch that it was calibrated on, in training and in eval alike."""
    made, x = router(top_k=k, capacity_factor=factor), tokens(50)
    step(made, x)
    torch.testing.assert_close(made.threshold, border(made, x, capacity), rtol=0, atol=1e-6)
    chooser = ExpertChoiceRouter(
        ExpertChoiceRouter.Config(top_k=k, capacity_factor=factor), hidden_size=D, num_experts=E
    )
    chooser.weight = made.weight
    for training in (True, False):
        out, expected = made.train(training)(x), chooser(x)
        assert torch.equal(out.keep, expected.keep)
        assert torch.equal(out.topk_weights, expected.topk_weights)


def test_threshold_is_a_plain_mean_first_and_an_exponential_one_later() -> None:
    """With decay 0.75: the mean of up to four steps, then a quarter of the way each step."""
    made, expected = router(threshold_decay=0.75), torch.zeros(E)
    for number in range(1, 9):
        x = tokens(40, seed=number)
        step(made, x)
        expected += (border(made, x, 20) - expected) * max(1 / number, 0.25)
        torch.testing.assert_close(made.threshold, expected, rtol=0, atol=1e-6)
    assert made.steps.item() == 8


def test_micro_batches_count_by_their_real_tokens() -> None:
    made, first, second = router(), tokens(30), tokens(10, seed=2)
    mask = torch.arange(10) < 6
    made(first)
    made(second, mask)
    made.after_step(torch.zeros(E))
    expected = (30 * border(made, first, 15) + 6 * border(made, second[:6], 3)) / 36
    torch.testing.assert_close(made.threshold, expected, rtol=0, atol=1e-6)
    assert made.steps.item() == 1, "once per optimizer step"


def test_padding_is_not_among_the_scores() -> None:
    made, alone, x = router(), router(), tokens(20)
    padded = torch.cat([x, 100 * tokens(20, seed=3)])
    made(padded, torch.arange(40) < 20)
    made.after_step(torch.zeros(E))
    step(alone, x)
    assert torch.equal(made.threshold, alone.threshold)


def test_a_step_without_training_forwards_moves_nothing() -> None:
    made = router()
    before = copy.deepcopy(made.state_dict())
    made.eval()(tokens(20))
    with torch.no_grad():
        made.train()(tokens(20))  # a probe
    made(tokens(0))
    made(tokens(5), torch.zeros(5, dtype=torch.bool))
    made.after_step(torch.zeros(E))
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_recomputation_under_checkpointing_leaves_the_threshold_alone() -> None:
    plain, replayed = router(), router()
    for x in (tokens(30), tokens(10, seed=2)):
        plain(x)
        out = checkpoint(replayed, x, use_reentrant=False, early_stop=False)
        out.topk_weights.square().sum().backward()
    for made in (plain, replayed):
        made.after_step(torch.zeros(E))
    torch.testing.assert_close(plain.threshold, replayed.threshold, rtol=0, atol=1e-7)
    assert plain.steps.item() == replayed.steps.item() == 1


def test_no_token_asks_what_the_others_score() -> None:
    """Token by token, as decoding does: bit for bit the choices and weights of the whole, in training and in eval."""
    made, x = router(), tokens(40).double()
    step(made, tokens(60, seed=5))
    for training in (True, False):
        whole = made.train(training)(x)
        single = [made(x[token : token + 1]) for token in range(40)]
        assert whole.keep is not None
        assert 0 < whole.keep.sum() < 40 * E
        assert torch.equal(torch.cat([out.keep for out in single]), whole.keep)  # type: ignore[misc]
        # A product of one row may add in another order than one of forty.
        torch.testing.assert_close(
            torch.cat([out.topk_weights for out in single]), whole.topk_weights, rtol=0, atol=1e-14
        )


def test_the_probe_finds_no_leak_and_finds_expert_choices() -> None:
    made = router()
    step(made, tokens(60, seed=5))
    chooser = build_router("expert-choice", hidden_size=D, num_experts=E)
    x = tokens(16).reshape(2, 8, D)
    assert first_leak(MoELayer(made, GatedExperts(E, D, 5)), x) is None
    assert first_leak(MoELayer(chooser, GatedExperts(E, D, 5)), x) is not None
    assert made.causal
    assert not chooser.causal


def test_load_is_even_on_average_over_batches_that_it_has_not_seen() -> None:
    """300 fresh batches under a lopsided gate; a share's standard error is 0.004."""
    made = router(top_k=1)
    with torch.no_grad():
        made.weight[0] += 0.8
    for number in range(30):
        step(made, tokens(100, seed=number) + 0.5)
    made.eval()
    load = torch.zeros(E)
    for number in range(100, 400):
        keep = made(tokens(100, seed=number) + 0.5).keep
        assert keep is not None
        load += keep.sum(0)
    torch.testing.assert_close(load / 30_000, torch.full((E,), 1 / E), rtol=0, atol=0.03)


def test_a_model_trains_with_it_and_decodes_as_the_full_pass_computes() -> None:
    """40 steps on a Markov chain; then cached decoding, token by token, against the whole (float64)."""
    torch.manual_seed(0)
    moe = MoEConfig(router={"name": "expert-choice-threshold"}, num_experts=E, layers="all")
    model = Decoder(tiny_shape(16, moe)).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    following = torch.randint(0, 16, (16, 2))
    losses, loads = [], []
    for _ in range(40):
        ids = torch.randint(0, 16, (8, 1))
        for _ in range(32):
            ids = torch.cat([ids, following[ids[:, -1], torch.randint(0, 2, (8,))][:, None]], dim=1)
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for layer in model.moe_layers().values():
            assert layer.routing is not None and layer.routing.keep is not None
            loads.append(layer.routing.keep.sum() / 256)
            layer.router.after_step(layer.routing.keep.sum(0))
    assert losses[-1] < losses[0] - 0.5
    assert 1.5 < torch.stack(loads[-20:]).mean() < 2.5, "two experts per token, on average"

    model.eval()
    cache = KVCache(model.config.num_layers)
    with torch.no_grad():
        whole = model(ids)
        single = torch.cat([model(ids[:, place : place + 1], cache=cache) for place in range(33)], dim=1)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-12)
    assert torch.equal(model.generate(ids[:2, :5], 8)[:, :5], ids[:2, :5])


def test_calibrating_is_one_training_step_on_the_batch() -> None:
    made, trained, x = router().eval(), router(), tokens(30)
    with torch.no_grad():
        made.calibrate(x)
    step(trained, x)
    assert torch.equal(made.threshold, trained.threshold)
    assert not made.training


def test_threshold_is_saved_in_float32() -> None:
    made = router().to(torch.bfloat16)
    step(made, tokens(30).to(torch.bfloat16))
    assert made.threshold.dtype == torch.float32
    assert set(made.state_dict()) == {"weight", "threshold", "steps"}
    other = router().to(torch.bfloat16)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.threshold, made.threshold)


def test_balanced_without_a_loss_by_default() -> None:
    assert ExpertChoiceThresholdRouter.default_lb_coef == 0.0
    assert router().training_problem() is None

"""Balance over one optimizer step: scopes, cuts, padding, noise, and the numbers that are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.config.schema import CollapseConfig, ExperimentConfig, MoEConfig
from moectl.corpus.loader import PackedDataset
from moectl.models.decoder import Decoder
from moectl.moe import GatedExperts, MoELayer
from moectl.moe.capacity import Capacity
from moectl.moe.losses import BALANCE_LOSSES, cv_squared_loss, entropy_loss, load_balancing_loss, router_z_loss
from moectl.routers import build_router
from moectl.training.monitor import RoutingMonitor
from moectl.training.rehearsal import rehearsal
from moectl.training.routing import StepRouting
from moectl.training.routing_metrics import REFERENCES, step_metrics
from tests.support import tiny_shape
from tests.training.test_trainer import make_trainer

Make = Callable[..., ExperimentConfig]
ALL = ("switch", "cv2", "entropy")
ROWS, LENGTH, EXPERTS, VOCABULARY = 8, 7, 4, 23
#: Ways to cut eight rows into micro-batches.
CUTS = ([8], [4, 4], [2, 2, 2, 2], [1, 5, 2])


def small_model(dtype: torch.dtype = torch.float64, **moe: Any) -> tuple[Decoder, MoEConfig]:
    """Two MoE layers whose gates are decided, so that loads differ; in training mode, without noise."""
    router = {"name": "topk", "top_k": 2, "noise_std": 0.0, **moe.pop("router", {})}
    config = MoEConfig(router=router, num_experts=EXPERTS, layers="all", **moe)
    torch.manual_seed(0)
    model = Decoder(tiny_shape(VOCABULARY, config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train(), config


def ids_and_mask(padded: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    ids[: ROWS // 2] %= 5  # the first rows hold few words: another load than that of the others
    lengths = torch.tensor([7, 1, 3, 7, 5, 0, 2, 6])
    return ids, torch.arange(LENGTH) < lengths[:, None] if padded else None


class OneStep(StepRouting):
    """A step whose losses, by name, are summed over its micro-batches."""

    seen: dict[str, float]


def step_of(model: Decoder, moe: MoEConfig, cut: Sequence[int], padded: bool = False) -> OneStep:
    """One optimizer step's forward and backward passes in micro-batches of these many rows; no update."""
    ids, mask = ids_and_mask(padded)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    tokens = int(real.sum())
    routing = OneStep(model.moe_layers(), moe, 2, tokens=tokens)
    labels = ids.roll(-1, 1).masked_fill(~real, -100).split(list(cut))
    masks = [None] * len(cut) if mask is None else mask.split(list(cut))
    model.zero_grad()
    if routing.two_passes:
        with rehearsal(model):
            for part, part_mask in zip(ids.split(list(cut)), masks, strict=True):
                model.hidden_states(part, token_mask=part_mask)
                routing.count()
    routing.seen = {}
    for part, label, part_mask in zip(ids.split(list(cut)), labels, masks, strict=True):
        lm = model.lm_loss_sum(part, label, token_mask=part_mask)
        auxiliary, losses = routing.losses(torch.zeros(len(part), dtype=torch.int64))
        (lm / tokens + auxiliary).backward()
        for name, value in losses.items():
            routing.seen[name] = routing.seen.get(name, 0.0) + value.item()
    return routing


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- however the step is cut


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("losses", [("switch",), ("cv2",), ALL], ids="+".join)
def test_exact_balance_does_not_depend_on_the_cut(losses: tuple[str, ...], dtype: torch.dtype, padded: bool) -> None:
    """Losses and every gradient, 1 to 4 micro-batches and an uneven cut. Coefficients large enough to be seen.

    Sums in another order: 1e-12 in float64; in float32 1e-6 of gradients of order one.
    """
    coefficients = {"switch": "lb_coef", "cv2": "cv2_coef", "entropy": "entropy_coef"}
    model, moe = small_model(
        dtype, balance_loss=losses, balance_exact=True, z_coef=0.5, **{coefficients[name]: 0.5 for name in losses}
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    whole = step_of(model, moe, CUTS[0], padded)
    expected, metrics = gradients(model), step_metrics(whole)
    assert max(expected[f"layers.{n}.mlp.router.weight"].abs().max() for n in (0, 1)) > 0.01
    for cut in CUTS[1:]:
        step = step_of(model, moe, cut, padded)
        assert step.seen == pytest.approx(whole.seen, abs=tolerance)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=tolerance, msg=f"{name}, cut {cut}")
        assert step_metrics(step) == pytest.approx(metrics, abs=max(tolerance, 1e-7))


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_the_whole_step_at_once_is_what_the_public_losses_say(padded: bool) -> None:
    """Every cut was equal to this one: here it is compared with the losses themselves, masks and all."""
    model, moe = small_model(balance_loss=ALL, balance_exact=True)
    step = step_of(model, moe, [8], padded)
    _, mask = ids_and_mask(padded)
    flat = None if mask is None else mask.reshape(-1)
    expected: dict[str, list[float]] = {"lb": [], "cv2": [], "entropy": [], "z": []}
    for layer in model.moe_layers().values():
        routing = layer.routing
        assert routing is not None
        arguments = (routing.router_probs, routing.topk_indices, EXPERTS, flat)
        expected["lb"].append(load_balancing_loss(*arguments).item())
        expected["cv2"].append(cv_squared_loss(*arguments).item())
        expected["entropy"].append(entropy_loss(routing.router_probs_clean, flat).item())
        expected["z"].append(router_z_loss(routing.router_logits, flat).item())
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    assert step.seen == pytest.approx(means, abs=1e-12)
    metrics = step_metrics(step)
    for number in (0, 1):
        assert metrics[f"balance/layer.{number}"] == pytest.approx(expected["lb"][number], abs=1e-12)
        assert metrics[f"cv2/layer.{number}"] == pytest.approx(expected["cv2"][number], abs=1e-12)
        assert metrics[f"entropy/layer.{number}"] == pytest.approx(-expected["entropy"][number], abs=1e-12)


def test_running_counts_depend_on_the_cut_and_say_by_how_much() -> None:
    """The deviation is that of the trained value from the whole step's, in the worst layer; 0 for one micro-batch."""
    model, moe = small_model(balance_loss=("switch", "cv2"), lb_coef=0.5, cv2_coef=0.5)
    whole = step_of(model, moe, [8])
    at_once = gradients(model)
    assert step_metrics(whole)["balance/running_deviation"] == pytest.approx(0.0, abs=1e-15)
    cut = step_of(model, moe, [2, 2, 2, 2])
    metrics = step_metrics(cut)
    for kind, name in (("balance", "switch"), ("cv2", "cv2")):
        by_layer = [abs(float(step.trained[name]) - step.value(name)) for step in cut.steps.values()]
        assert metrics[f"{kind}/running_deviation"] == pytest.approx(max(by_layer), abs=1e-15)
        assert metrics[f"{kind}/running_deviation"] > 1e-3
        for number in (0, 1):  # what is logged is the whole step's, however it was trained
            assert metrics[f"{kind}/layer.{number}"] == pytest.approx(step_metrics(whole)[f"{kind}/layer.{number}"])
    gate = "layers.1.mlp.router.weight"
    assert (gradients(model)[gate] - at_once[gate]).abs().max() > 1e-4


def test_running_counts_are_those_of_the_step_so_far() -> None:
    """By hand: the second of two micro-batches is judged by the counts of both, the first by its own."""
    model, moe = small_model(balance_loss=("switch", "cv2"))
    routing = StepRouting(model.moe_layers(), moe, 2, tokens=ROWS * LENGTH)
    counts, probs = [], []
    for part in ids_and_mask(False)[0].split([6, 2]):
        model.hidden_states(part)
        _, losses = routing.losses(torch.zeros(len(part), dtype=torch.int64))
        share = len(part) / ROWS
        layers = [layer.routing for layer in model.moe_layers().values()]
        counts.append([torch.bincount(r.topk_indices.flatten(), minlength=EXPERTS) for r in layers])  # type: ignore[union-attr]
        probs.append([r.router_probs.mean(0) for r in layers])  # type: ignore[union-attr]
        so_far = [sum(each) for each in zip(*counts, strict=True)]
        values = [
            load_balancing_loss(r.router_probs, r.topk_indices, EXPERTS, counts=c)  # type: ignore[union-attr]
            for r, c in zip(layers, so_far, strict=True)
        ]
        assert losses["lb"].item() == pytest.approx(share * sum(values).item() / 2, abs=1e-14)  # type: ignore[union-attr]
        weights = torch.tensor([6.0, 2.0][: len(probs)], dtype=torch.float64)
        running = [(torch.stack(p) * weights[:, None]).sum(0) / weights.sum() for p in zip(*probs, strict=True)]
        variation = [_cv_squared(p) + _cv_squared(c.double() / c.sum()) for p, c in zip(running, so_far, strict=True)]
        assert losses["cv2"].item() == pytest.approx(share * sum(variation) / 2, abs=1e-13)


def _cv_squared(values: Tensor) -> float:
    return float(values.detach().var(correction=0) / values.detach().mean() ** 2)


def test_with_noise_the_second_pass_replays_the_first(experiment: Make, dataset: PackedDataset, tmp_path: Any) -> None:
    """Noise, expert dropout, random experts: all drawn alike again, and as a run without a first pass draws them."""
    router = {"name": "topk", "noise_std": 1.0, "expert_dropout": 0.3, "random_routing": 0.3}
    chosen: dict[bool, list[Tensor]] = {}
    rest, losses = {}, {}
    for exact in (True, False):
        config = experiment(moe={"router": router, "balance_exact": exact}, train={"grad_accum": 3})
        trainer = make_trainer(config, dataset, tmp_path / str(exact))
        seen = chosen[exact] = []
        torch.manual_seed(5)
        trainer.layers[1].router.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.topk_indices))
        metrics, _ = trainer.optimizer_step()
        rest[exact], losses[exact] = torch.rand(3), metrics["train/lm_loss"]
    assert len(chosen[True]) == 6 and len(chosen[False]) == 3
    first, second = chosen[True][:3], chosen[True][3:]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(second, chosen[False], strict=True))
    assert torch.equal(rest[True], rest[False]) and losses[True] == losses[False]
    assert not torch.equal(first[0], first[1]), "three micro-batches of different tokens"


def test_a_rehearsal_leaves_no_trace() -> None:
    """Generators, buffers, modes and gradients are as before, also when what ran within has failed."""
    model, _ = small_model(router={"noise_std": 1.0})
    buffer = model.moe_layers()[0].router.noise.step  # type: ignore[union-attr, operator]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="on purpose"), rehearsal(model):
        assert model.training and not torch.is_grad_enabled()
        model.hidden_states(ids_and_mask(False)[0])
        buffer += 7
        raise RuntimeError("on purpose")
    assert torch.equal(torch.rand(4), expected) and int(buffer) == 0
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


# --- scopes


def separating_layer() -> MoELayer:
    """Two experts; a token goes where its first two numbers say, and is sure of it."""
    layer = MoELayer(
        build_router("switch", hidden_size=4, num_experts=2, noise_std=0.0), GatedExperts(2, 4, 3)
    ).double()
    with torch.no_grad():
        layer.router.weight.copy_(40.0 * torch.eye(2, 4))
    return layer.train()


def test_only_micro_scope_punishes_a_router_that_separates_domains() -> None:
    """Each micro-batch one domain on its own expert: 2.0 (collapse) in each, 1.0 (balance) over the step.

    What the log calls ``balance`` is the whole step's in either scope, and what was trained stands beside it.
    """
    layer, domain = separating_layer(), torch.eye(2, 4, dtype=torch.float64)
    for scope, expected in (("micro", 2.0), ("sequence", 2.0), ("global", 1.0)):
        moe = MoEConfig(router="switch", num_experts=2, balance_scope=scope, balance_exact=scope == "global")
        step = StepRouting({3: layer}, moe, 2, tokens=12)
        if step.two_passes:
            for part in (0, 1):
                layer(domain[part].expand(2, 3, 4))
                step.count()
        total = 0.0
        for part in (0, 1):
            layer(domain[part].expand(2, 3, 4))
            total += step.losses(torch.tensor([part, part]))[1]["lb"].item()
        metrics = step_metrics(step)
        assert total == pytest.approx(expected, abs=1e-12)
        assert metrics["balance/layer.3"] == pytest.approx(1.0, abs=1e-12)
        assert step.steps[3].counts_NE.tolist() == [[6, 0], [0, 6]]
        if scope != "global":
            assert metrics[f"balance_{scope}/layer.3"] == pytest.approx(2.0, abs=1e-12)
            assert metrics[f"balance_{scope}/collapse_value"] == 2.0
            assert "balance/running_deviation" not in metrics


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_sequence_scope_is_each_row_on_its_own(padded: bool) -> None:
    """f and P within each row, weighted by its real tokens: against a loop over rows, however the step is cut."""
    model, moe = small_model(balance_loss=ALL, balance_scope="sequence", lb_coef=0.5, cv2_coef=0.5)
    whole = step_of(model, moe, [8], padded)
    _, mask = ids_and_mask(padded)
    real = torch.ones(ROWS, LENGTH, dtype=torch.bool) if mask is None else mask
    expected = {"lb": 0.0, "cv2": 0.0}
    for layer in model.moe_layers().values():
        assert layer.routing is not None
        probs, chosen = layer.routing.router_probs, layer.routing.topk_indices
        for row, keep in enumerate(real):
            part = slice(row * LENGTH, (row + 1) * LENGTH)
            weight = int(keep.sum()) / int(real.sum()) / 2
            expected["lb"] += weight * load_balancing_loss(probs[part], chosen[part], EXPERTS, keep).item()
            expected["cv2"] += weight * cv_squared_loss(probs[part], chosen[part], EXPERTS, keep).item()
    assert {name: whole.seen[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    grads = gradients(model)
    for cut in CUTS[1:]:
        assert step_of(model, moe, cut, padded).seen == pytest.approx(whole.seen, abs=1e-12)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, grads[name], rtol=0, atol=1e-12, msg=name)


def test_micro_scope_is_each_micro_batch_on_its_own() -> None:
    model, moe = small_model(balance_loss=("switch",), balance_scope="micro")
    step = step_of(model, moe, [3, 5])
    expected = 0.0
    for part in ids_and_mask(False)[0].split([3, 5]):
        model.hidden_states(part)
        for layer in model.moe_layers().values():
            routing = layer.routing
            assert routing is not None
            value = load_balancing_loss(routing.router_probs, routing.topk_indices, EXPERTS).item()
            expected += len(part) / ROWS * value / 2
    assert step.seen["lb"] == pytest.approx(expected, abs=1e-12)


# --- what the losses amount to


def test_coefficients_reach_the_gradient_and_not_the_parts() -> None:
    given: dict[str, float] = {"lb_coef": 0.3, "cv2_coef": 0.7, "entropy_coef": 0.2}
    model, moe = small_model(balance_loss=ALL, z_coef=0.05, **given)
    routing = StepRouting(model.moe_layers(), moe, 1, tokens=ROWS * LENGTH)
    model.hidden_states(ids_and_mask(False)[0])
    total, parts = routing.losses(torch.zeros(ROWS, dtype=torch.int64))
    by_hand = 0.3 * parts["lb"] + 0.7 * parts["cv2"] + 0.2 * parts["entropy"] + 0.05 * parts["z"]
    assert total.item() == pytest.approx(by_hand.item(), abs=1e-14)
    scheduled = StepRouting(model.moe_layers(), moe, 1, tokens=ROWS * LENGTH, lb_coef=0.9)
    model.hidden_states(ids_and_mask(False)[0])
    more, _ = scheduled.losses(torch.zeros(ROWS, dtype=torch.int64))
    assert (more - total).item() == pytest.approx(0.6 * parts["lb"].item(), abs=1e-14)


def test_no_balance_loss_leaves_the_z_loss_and_the_numbers() -> None:
    model, moe = small_model(balance_loss="none")
    step = step_of(model, moe, [4, 4])
    assert step.seen.keys() == {"z"} and not step.two_passes
    metrics = step_metrics(step)
    assert {"balance/layer.0", "balance/worst", "balance/collapse_value"} <= metrics.keys()
    assert "balance/running_deviation" not in metrics and "cv2/worst" not in metrics


def test_routers_that_balance_without_a_loss_get_none() -> None:
    """``lb_coef`` that is not given is the router's own wish."""
    for name, expected in (("sigmoid", 0.0), ("expert-choice", 0.0), ("topk", 0.01)):
        layer = MoELayer(build_router(name, hidden_size=4, num_experts=3), GatedExperts(3, 4, 3))
        assert StepRouting({0: layer}, MoEConfig(router=name), 1, tokens=1).coefficients["switch"] == expected
        assert StepRouting({0: layer}, MoEConfig(router=name, lb_coef=0.2), 1, tokens=1).coefficients["switch"] == 0.2


# --- nothing hides


def collapsed_layers(pairs: Sequence[tuple[int, int]]) -> dict[int, MoELayer]:
    """Layers of eight experts, top-2, whose every token goes to that layer's pair."""
    layers = {}
    for number, pair in enumerate(pairs):
        router = build_router("topk", hidden_size=4, num_experts=8, top_k=2, noise_std=0.0)
        with torch.no_grad():
            router.weight.zero_()
            router.weight[list(pair), 0] = 40.0
        layers[number] = MoELayer(router, GatedExperts(8, 4, 3)).train()
    return layers


def test_four_layers_collapsed_on_four_pairs_are_four_collapses() -> None:
    """Pooled over layers their tokens are spread evenly over all eight experts, and the pooled value is 1."""
    layers = collapsed_layers([(0, 1), (2, 3), (4, 5), (6, 7)])
    x = torch.randn(6, 50, 4)
    x[..., 0] = 1.0
    step = StepRouting(layers, MoEConfig(router="topk"), 1, tokens=300)
    for layer in layers.values():
        layer(x)
    step.losses(torch.zeros(6, dtype=torch.int64))
    routings = [layer.routing for layer in layers.values()]
    pooled = load_balancing_loss(
        torch.cat([r.router_probs for r in routings]),  # type: ignore[union-attr]
        torch.cat([r.topk_indices for r in routings]),  # type: ignore[union-attr]
        8,
    )
    assert pooled.item() == pytest.approx(1.0, abs=1e-6)

    metrics = step_metrics(step)
    for number in range(4):
        assert metrics[f"balance/layer.{number}"] == pytest.approx(4.0, rel=1e-6)
        assert metrics[f"max_share/layer.{number}"] == metrics["max_share/collapse_value"] == 0.5
        assert metrics[f"load_cv/layer.{number}"] == pytest.approx(metrics["load_cv/collapse_value"])
    assert metrics["balance/worst"] == pytest.approx(metrics["balance/collapse_value"]) == 4.0
    monitor = RoutingMonitor(layers, ["text"], CollapseConfig())
    monitor.add(step, 300)
    assert {(finding.layer, finding.kind) for finding in monitor.check().findings} == {
        (number, "dominance") for number in range(4)
    }


def test_the_worst_layer_comes_first_and_by_its_number() -> None:
    torch.manual_seed(0)
    layers = collapsed_layers([(0, 1)]) | {
        5: MoELayer(build_router("topk", hidden_size=4, num_experts=8), GatedExperts(8, 4, 3))
    }
    step = StepRouting(layers, MoEConfig(router="topk", balance_loss=ALL), 1, tokens=300)
    x = torch.randn(6, 50, 4)
    x[..., 0] = 1.0
    for layer in layers.values():
        layer(x)
    step.losses(torch.zeros(6, dtype=torch.int64))
    metrics = step_metrics(step)
    for kind in ("balance", "cv2", "max_share", "load_cv", "entropy", "logit_abs"):
        mine = [name for name in metrics if name.startswith(f"{kind}/")]
        assert mine[:2] == [f"{kind}/worst", f"{kind}/worst_layer"]
        layers_in_order = [name for name in mine if "/layer." in name]
        assert layers_in_order == [f"{kind}/layer.0", f"{kind}/layer.5"], "the collapsed layer before the other"
        assert metrics[f"{kind}/worst"] == metrics[f"{kind}/layer.0"]
        assert metrics[f"{kind}/worst_layer"] == 0.0
    assert not [name for name in metrics if "mean" in name]


@pytest.mark.parametrize("scope", ["global", "micro", "sequence"])
def test_every_balance_number_stands_beside_balanced_and_collapsed(scope: str) -> None:
    model, moe = small_model(balance_loss=ALL, balance_scope=scope)
    metrics = step_metrics(step_of(model, moe, [4, 4]))
    kinds = {name.split("/")[0] for name in metrics if "/layer." in name} - {"logit_abs"}
    assert kinds == {"balance", "cv2", "max_share", "load_cv", "entropy"} | (
        set() if scope == "global" else {f"balance_{scope}", f"cv2_{scope}"}
    )
    for kind in kinds:
        balanced, collapse = REFERENCES[kind.removesuffix(f"_{scope}")]
        assert metrics[f"{kind}/balanced_value"] == balanced(EXPERTS, 2)
        assert metrics[f"{kind}/collapse_value"] == collapse(EXPERTS, 2)
    values = {
        "balance": (1.0, 2.0), "cv2": (0.0, 2.0), "max_share": (0.25, 0.5), "load_cv": (0.0, 1.0),
        "entropy": (math.log(4), math.log(2)),
    }  # fmt: skip
    for kind, (balanced, collapse) in values.items():
        assert metrics[f"{kind}/balanced_value"] == pytest.approx(balanced)
        assert metrics[f"{kind}/collapse_value"] == pytest.approx(collapse)


def test_collapse_values_are_those_of_the_steps_own_k() -> None:
    model, moe = small_model()
    for layer in model.moe_layers().values():
        layer.router.set_top_k(4)
    assert step_metrics(step_of(model, moe, [8]))["balance/collapse_value"] == 1.0
    assert set(BALANCE_LOSSES) == set(ALL)


# --- dropped assignments, and logits


def test_dropped_is_the_share_of_assignments_without_room() -> None:
    """300 tokens, 2 of 8 experts each, all on one pair, room for ceil(2·300/8·1) = 75: 450 of 600 are lost."""
    layers = collapsed_layers([(0, 1), (2, 7)])
    layers[1].capacity = Capacity(1.0)
    step = StepRouting(layers, MoEConfig(router="topk"), 1, tokens=300)
    x = torch.randn(300, 4)
    x[:, 0] = 1.0
    for part in x.split([100, 200]):  # room for 25 and for 50
        for layer in layers.values():
            layer(part)
        step.losses(torch.tensor([0]))
    metrics = step_metrics(step)
    assert metrics["dropped/layer.1"] == metrics["dropped/worst"] == 0.75
    assert "dropped/layer.0" not in metrics, "dropless"
    assert metrics["balance/layer.1"] == pytest.approx(4.0, rel=1e-6), "shares are taken before capacity"
    monitor = RoutingMonitor(layers, ["text"], CollapseConfig())
    monitor.add(step, 300)
    records = monitor.check().payload["layers"]
    assert [records[n]["dropped"] for n in "01"] == [None, 450]
    assert records["1"]["counts"] == [[0, 0, 300, 0, 0, 0, 0, 300]]


def test_large_logits_are_said_once_per_layer_with_what_to_do() -> None:
    """Two of eight logits are 40 for every token: a mean of exactly 10 is not above it, that of another gate is."""
    layers = collapsed_layers([(0, 1), (2, 3)])
    with torch.no_grad():
        layers[1].router.weight[4, 0] = -16.0  # large below zero is large too
    monitor, x = RoutingMonitor(layers, ["text"], CollapseConfig()), torch.eye(1, 4).expand(1, 40, 4)
    said = []
    for _ in range(2):
        for _ in range(2):
            step = StepRouting(layers, MoEConfig(router="topk"), 1, tokens=40)
            for layer in layers.values():
                layer(x)
            step.losses(torch.zeros(1, dtype=torch.int64))
            monitor.add(step, 40)
        assert step_metrics(step)["logit_abs/layer.1"] == pytest.approx(12.0)
        check = monitor.check()
        assert check.payload["layers"]["0"]["logit_abs"] == pytest.approx(10.0)
        said.append(check.large_logits)
    ((warning,), nothing) = said
    assert nothing == [] and warning.layer == 1 and warning.logit_abs == pytest.approx(12.0)
    for needed in ("layer 1", "12.0", "moe.z_coef", "moe.router.logit_clamp"):
        assert needed in str(warning)
    resumed = RoutingMonitor(layers, ["text"], CollapseConfig())
    resumed.load(monitor.state_dict(), monitor.tensors())
    monitor.add(step, 40)
    resumed.add(step, 40)
    ours, theirs = monitor.check(), resumed.check()
    assert (ours.findings, ours.large_logits, ours.payload) == (theirs.findings, theirs.large_logits, theirs.payload)
    assert ours.findings[0].in_a_row == 3


def test_padding_counts_in_no_number() -> None:
    """The numbers of a padded step are those of its real tokens, whatever stands in the padding."""
    model, moe = small_model(balance_loss=ALL)
    ids, mask = ids_and_mask(True)
    assert mask is not None
    metrics = []
    for filler in (0, 7):
        routing = StepRouting(model.moe_layers(), moe, 1, tokens=int(mask.sum()))
        model.hidden_states(ids.masked_fill(~mask, filler), token_mask=mask)
        routing.losses(torch.zeros(ROWS, dtype=torch.int64))
        metrics.append(step_metrics(routing))
        assert all(int(step.counts_E.sum()) == 2 * int(mask.sum()) for step in routing.steps.values())
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-12)


def test_domains_are_those_of_the_rows() -> None:
    model, moe = small_model()
    routing = StepRouting(model.moe_layers(), moe, 3, tokens=ROWS * LENGTH)
    domains = [0, 2, 2, 0, 0, 2, 2, 2]
    model.hidden_states(ids_and_mask(False)[0])
    routing.losses(torch.tensor(domains))
    for number, layer in model.moe_layers().items():
        assert layer.routing is not None
        rows = layer.routing.topk_indices.reshape(ROWS, -1)
        expected = torch.zeros(3, EXPERTS, dtype=torch.int64)
        for row, domain in enumerate(domains):
            expected[domain] += torch.bincount(rows[row], minlength=EXPERTS)
        assert torch.equal(routing.steps[number].counts_NE, expected)

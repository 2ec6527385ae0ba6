"""What ``inspect routing`` reports, from a real model on a real dataset; and the verdict over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError
from moectl.inspection.collect import collect
from moectl.inspection.routing import InspectSettings, RoutingReport, inspect_routing
from moectl.inspection.seeds import over_seeds
from moectl.inspection.specialization import normalized_mutual_information, permutation_test
from moectl.models.decoder import Decoder
from moectl.moe.losses import load_balancing_loss

Build = Callable[..., Decoder]
QUICK = InspectSettings(permutations=50, gates=20, bootstrap=50, batch_size=5)


@pytest.fixture
def report(dataset: PackedDataset, build: Build) -> RoutingReport:
    return inspect_routing(build(1), dataset, step0=build(0), settings=QUICK)


def collapsed(model: Decoder, layer: int) -> Decoder:
    """Every logit of ``layer`` is equal, and ties go to expert 0: all tokens take it."""
    with torch.no_grad():
        model.moe_layers()[layer].router.weight.zero_()
    return model


def test_numbers_agree_with_the_trace(dataset: PackedDataset, build: Build, report: RoutingReport) -> None:
    trace = collect(build(1), dataset)
    for layer in report.layers:
        recorded = trace.layers[layer.layer]
        grouped = trace.group_counts(layer.layer)
        assert layer.nmi.value == pytest.approx(normalized_mutual_information(grouped.by_domain()))
        test = permutation_test(recorded.topk_indices, trace.token_domains, trace.token_groups, 4, draws=50, seed=0)
        assert layer.nmi.null_permutation.p_value == pytest.approx(test.p_value)
        expected = float(load_balancing_loss(recorded.probs.double(), recorded.topk_indices, 4))
        assert layer.balance == pytest.approx(expected, rel=1e-6)
        assert layer.load.entropy == pytest.approx(float(recorded.entropy.double().mean()))
        assert layer.load.tokens == report.tokens == sum(load.tokens for load in layer.domains.values())
        assert layer.load.counts.sum() == report.tokens
        for index, name in enumerate(dataset.domains):
            member = recorded.topk_indices[trace.token_domains == index]
            assert layer.domains[name].shares == pytest.approx(
                [(member == expert).double().mean().item() for expert in range(4)]
            )


def test_value_at_step_0_is_that_models_value(dataset: PackedDataset, build: Build, report: RoutingReport) -> None:
    start = collect(build(0), dataset)
    for layer in report.layers:
        assert layer.nmi.step0 is not None
        expected = normalized_mutual_information(start.group_counts(layer.layer).by_domain())
        assert layer.nmi.step0.value == pytest.approx(expected)


def test_json_has_its_public_names_and_survives_json(report: RoutingReport) -> None:
    document = json.loads(json.dumps(report.to_dict()))
    for layer in document["layers"]:
        nmi = layer["nmi"]
        assert {"value", "interval", "mutual_information", "null_permutation", "null_random_router", "step0"} <= set(
            nmi
        )
        assert {"mean", "p95", "max", "draws", "p_value", "exceeded"} <= set(nmi["null_random_router"])
        assert {"mean", "p95", "p_value", "exceeded"} <= set(nmi["null_permutation"])
        assert {"value", "margin", "exceeded"} <= set(nmi["step0"])
        assert layer["balance"]["balanced"] == 1.0
        assert layer["balance"]["collapse"] == 4.0
        assert layer["entropy_uniform"] == pytest.approx(math.log(4))
        assert sum(layer["shares"]) == pytest.approx(1.0)
        assert layer["dropped"] is None and layer["dropped_fraction"] is None, "evaluation is dropless"


@pytest.mark.parametrize("bad", [0, 1])
def test_a_collapsed_layer_comes_first_and_is_not_averaged_away(dataset: PackedDataset, build: Build, bad: int) -> None:
    report = inspect_routing(collapsed(build(1), bad), dataset, step0=build(0), settings=QUICK)
    worst = report.layers[0]
    assert worst.layer == bad == report.to_dict()["worst_layer"]
    assert worst.load.dead_experts == [1, 2, 3] and worst.load.max_share == 1.0
    assert worst.load.load_cv == pytest.approx(math.sqrt(3))
    assert worst.nmi.value == 0.0 and not worst.nmi.exceeds_all
    assert worst.balance == pytest.approx(1.0), "equal probabilities hide the collapse from the balance value"
    assert [layer.layer for layer in report.by_depth()] == [0, 1]


def test_balance_reaches_its_collapse_value(dataset: PackedDataset, build: Build) -> None:
    model = build(1)
    layer = model.layers[0]
    with torch.no_grad():  # a constant input to the gate, and a gate that answers to it
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: torch.ones_like(out))
        model.moe_layers()[0].router.weight.zero_()[2] = 5.0
    report = inspect_routing(model, dataset, settings=QUICK)
    assert report.layers[0].layer == 0
    assert report.layers[0].balance == pytest.approx(report.layers[0].collapse_value, rel=1e-6) == 4.0


def test_an_untrained_model_is_within_the_random_gates(dataset: PackedDataset, build: Build) -> None:
    """A model before training is one more random gate: over layers and seeds it does not stand out."""
    settings = replace(QUICK, gates=100)
    layers = [
        layer.nmi for seed in range(4) for layer in inspect_routing(build(seed), dataset, settings=settings).layers
    ]
    assert sum(nmi.null_random_router.exceeded for nmi in layers) <= 2
    assert not any(nmi.exceeds_all for nmi in layers)


def test_notes_say_what_limits_the_numbers(dataset: PackedDataset, build: Build, report: RoutingReport) -> None:
    assert report.groups == {"fish": 2, "sums": 2}
    assert any("Fewer than 10 held-out groups" in note for note in report.notes)
    assert any("20 random gates" in note for note in report.notes)
    assert not any("step 0" in note for note in report.notes)
    assert any("step 0" in note for note in inspect_routing(build(1), dataset, settings=QUICK).notes)


def test_the_same_call_gives_the_same_numbers(dataset: PackedDataset, build: Build, report: RoutingReport) -> None:
    again = inspect_routing(build(1), dataset, step0=build(0), settings=QUICK)
    assert again.to_dict() == report.to_dict()


def with_margin(report: RoutingReport, margin: float, *, exceeded: bool = True) -> RoutingReport:
    """The report as if every layer had stood ``margin`` above its strongest reference.

    ``exceeded``: whether the run's own interval by group is above the random gates; the others are exceeded.
    """
    layers = []
    for layer in report.layers:
        nmi = layer.nmi
        changed = replace(
            nmi,
            value=nmi.references[nmi.strongest].value + margin,
            null_permutation=replace(nmi.null_permutation, exceeded=True),
            null_random_router=replace(nmi.null_random_router, exceeded=exceeded),
            step0=None if nmi.step0 is None else replace(nmi.step0, exceeded=True),
        )
        layers.append(replace(layer, nmi=changed))
    return replace(report, layers=tuple(layers))


def test_three_seeds_above_everything_have_emerged(report: RoutingReport) -> None:
    verdicts = over_seeds([with_margin(report, margin) for margin in (0.05, 0.06, 0.07)])
    assert [verdict.layer for verdict in verdicts] == [0, 1]
    for verdict in verdicts:
        half = 4.3027 * 0.01 / math.sqrt(3)
        assert verdict.mean == pytest.approx(0.06)
        assert verdict.interval == pytest.approx((0.06 - half, 0.06 + half), abs=1e-6)
        assert verdict.emerged is True and verdict.above_all == 3 and verdict.unknown is None
        assert verdict.to_dict()["seeds_above_all"] == verdict.to_dict()["seeds"] == 3


def test_one_seed_that_is_not_above_all_three_denies_it(report: RoutingReport) -> None:
    """The interval over seeds alone is not enough: 2 of 3 runs above all three references have not emerged."""
    reports = [with_margin(report, margin, exceeded=margin < 0.07) for margin in (0.05, 0.06, 0.07)]
    for verdict in over_seeds(reports):
        assert verdict.interval is not None and verdict.interval.low > 0
        assert (verdict.above_all, verdict.emerged) == (2, False)


def test_scattered_seeds_have_not(report: RoutingReport) -> None:
    (verdict, _) = over_seeds([with_margin(report, margin) for margin in (0.01, 0.10, 0.02)])
    assert verdict.mean > 0 and verdict.emerged is False


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_cannot_say(report: RoutingReport, seeds: int) -> None:
    (verdict, _) = over_seeds([with_margin(report, 0.5)] * seeds)
    assert verdict.emerged is None and (verdict.interval is None) == (seeds == 1)
    assert verdict.unknown == f"not from {seeds} seed{'s' if seeds > 1 else ''}"


def test_without_step_0_seeds_cannot_say(dataset: PackedDataset, build: Build) -> None:
    report = inspect_routing(build(1), dataset, settings=QUICK)
    for verdict in over_seeds([with_margin(report, 0.5)] * 3):
        assert (verdict.emerged, verdict.above_all, verdict.unknown) == (None, 0, "no step 0")


def test_one_domain_has_nothing_to_specialise_on(build: Build, one_domain: PackedDataset) -> None:
    reports = [inspect_routing(build(seed), one_domain, step0=build(0), settings=QUICK) for seed in (1, 2, 3)]
    assert any("One domain: there is nothing to specialise on" in note for note in reports[0].notes)
    assert all(layer.nmi.value == 0.0 and not layer.nmi.exceeds_all for layer in reports[0].layers)
    assert [(v.emerged, v.unknown) for v in over_seeds(reports)] == [(None, "one domain")] * 2


def test_runs_with_other_layers_are_refused(dataset: PackedDataset, build: Build, report: RoutingReport) -> None:
    other = inspect_routing(build(1, layers="last:1"), dataset, settings=QUICK)
    with pytest.raises(ConfigError, match="different places"):
        over_seeds([report, other])


# capacity in evaluation, and experts that choose


def test_dropped_assignments_are_those_of_the_layers(dataset: PackedDataset, build: Build) -> None:
    """Counted from the trace: what the router chose, and what ceil(k·T/E·factor) of each batch leaves of it."""
    model = build(1, router={"name": "top2"}, capacity={"factor": 0.5, "in_eval": True})
    report = inspect_routing(model, dataset, settings=QUICK)
    trace = collect(model, dataset, batch_size=QUICK.batch_size)
    for layer in report.layers:
        dropped = torch.zeros(4, dtype=torch.int64)
        for batch in trace.layers[layer.layer].topk_indices.split(QUICK.batch_size * 16):
            room = math.ceil(0.5 * 2 * len(batch) / 4)
            dropped += (torch.bincount(batch.flatten(), minlength=4) - room).clamp(min=0)
        assert layer.dropped == tuple(dropped.tolist()) and sum(layer.dropped) > 0
        assert layer.dropped_fraction == pytest.approx(int(dropped.sum()) / (2 * report.tokens))
        assert layer.load.counts.sum() == 2 * report.tokens, "the load is what the router chose"
        document = layer.to_dict()
        assert document["dropped"] == list(layer.dropped)
        assert document["dropped_fraction"] == layer.dropped_fraction
    assert report.marks == ()


def test_a_capacity_of_training_alone_drops_nothing_here(dataset: PackedDataset, build: Build) -> None:
    options = {"router": {"name": "top2"}}
    limited = inspect_routing(build(1, capacity=0.25, **options), dataset, settings=QUICK)
    free = inspect_routing(build(1, **options), dataset, settings=QUICK)
    assert all(layer.dropped is None for layer in limited.layers)
    assert limited.to_dict() == free.to_dict()


@pytest.mark.parametrize(("router", "marks"), [("expert-choice", ("non-causal",)), ("expert-choice-threshold", ())])
def test_experts_that_choose(dataset: PackedDataset, build: Build, router: str, marks: tuple[str, ...]) -> None:
    """As many slots as experts, some of them unused: counts, balance and all three nulls hold all the same."""
    model = build(1, router={"name": router}, layers="all")
    trace = collect(model, dataset, batch_size=QUICK.batch_size)
    report = inspect_routing(model, dataset, step0=build(0, router={"name": router}), settings=QUICK)
    assert report.marks == marks and report.to_dict()["marks"] == list(marks)
    for layer in report.layers:
        recorded = trace.layers[layer.layer]
        assert recorded.topk_indices.shape == (report.tokens, 4)
        used = recorded.topk_indices != -1
        assert 0 < int(used.sum()) < used.numel()
        counts = torch.bincount(recorded.topk_indices[used], minlength=4)
        assert layer.load.counts.tolist() == counts.tolist()
        assert layer.nmi.value == pytest.approx(
            normalized_mutual_information(trace.group_counts(layer.layer).by_domain())
        )
        assert layer.nmi.step0 is not None and layer.nmi.null_random_router.draws == QUICK.gates
        assert 0 < layer.nmi.null_random_router.maximum < 1  # type: ignore[operator]
        if router == "expert-choice":
            # Every batch of B blocks gives each expert ceil(2·16·B/4) tokens.
            sizes = [len(part) for part in recorded.topk_indices.split(QUICK.batch_size * 16)]
            assert counts.tolist() == [sum(math.ceil(2 * size / 4) for size in sizes)] * 4

"""Two experts that are one: chosen together, or grown alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moectl.config.guards import CollapseConfig
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.moe import GatedExperts, MLPExperts, MoELayer, RouterOutput
from moectl.routers import build_router
from moectl.training.collapse import CollapseDetector
from moectl.training.pairs import Pair, PairWatch, chosen_together, expert_cosines
from moectl.training.state import newest_checkpoint
from tests.training.test_trainer import Recorder, make_trainer

Make = Callable[..., ExperimentConfig]


def layer_of(experts: int = 4, kind: type = GatedExperts) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(build_router("top2", hidden_size=8, num_experts=experts), kind(experts, 8, 6))


def routing(rows: list[list[int]], keep: list[list[bool]] | None = None) -> RouterOutput:
    indices = torch.tensor(rows)
    some = torch.zeros(len(rows), 5)
    kept = None if keep is None else torch.tensor(keep)
    return RouterOutput(indices, torch.ones(indices.shape), some, some, some, some[:, 0], kept)


def test_tokens_are_counted_once_and_only_where_they_count() -> None:
    rows = [[0, 1], [1, 0], [2, 3], [4, 4], [0, 2], [3, 1]]
    keep = [[True, True]] * 4 + [[True, False]] + [[True, True]]
    mask = torch.tensor([True] * 5 + [False])
    expected = torch.zeros(5, 5, dtype=torch.int64)
    for (a, b), (keep_a, keep_b), real in zip(rows, keep, mask.tolist(), strict=True):
        chosen = {expert for expert, kept in ((a, keep_a), (b, keep_b)) if kept and real}
        for first in chosen:
            for second in chosen:
                expected[first, second] += 1
    assert torch.equal(chosen_together(routing(rows, keep), 5, mask), expected)
    assert expected[4, 4] == 1 and expected[0, 2] == 0 and expected[3, 1] == 0


@pytest.mark.parametrize("kind", [GatedExperts, MLPExperts])
def test_cosines_are_those_of_all_weights_of_an_expert(kind: type) -> None:
    """Float32 products against float64 ones: 1e-6."""
    layer = layer_of(kind=kind)
    whole = torch.stack([torch.cat([p[e].detach().flatten() for p in layer.experts.parameters()]) for e in range(4)])
    expected = torch.nn.functional.cosine_similarity(whole.double()[:, None], whole.double()[None], dim=-1)
    torch.testing.assert_close(expert_cosines(layer), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[2] = 3 * parameter[0]
    assert float(expert_cosines(layer)[0, 2]) == pytest.approx(1.0, abs=1e-6)


def together(*pairs: tuple[int, int], tokens: int = 200, experts: int = 4) -> Tensor:
    return chosen_together(routing([list(pair) for pair in pairs] * (tokens // len(pairs))), experts)


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ([(0, 1), (2, 3)], (0, 1)),
        ([(0, 1), (0, 2), (1, 3), (2, 3)], None),
        ([(2, 3)] * 19 + [(2, 0)], (2, 3)),  # 95 %
        ([(2, 3)] * 17 + [(2, 0)] * 3, None),  # 85 %
    ],
)
def test_always_chosen_together(pairs: list[tuple[int, int]], found: tuple[int, int] | None) -> None:
    watch = PairWatch(CollapseConfig(), {0: layer_of()})
    pair = watch.check(0, together(*pairs))
    assert (pair and pair[:2]) == found
    assert pair is None or (pair.why == "together" and pair.value > 0.9)


def test_too_few_tokens_and_k_close_to_the_number_of_experts_say_nothing() -> None:
    watch = PairWatch(CollapseConfig(), {0: layer_of(), 1: layer_of(2), 2: layer_of(8)})
    assert watch.check(0, together((0, 1), (2, 3), tokens=180)) is None, "90 tokens an expert"
    assert watch.check(1, together((0, 1), experts=2)) is None, "two of two experts"
    seven_of_eight = [[e for e in range(8) if e != left] for left in range(8)] * 100
    assert watch.check(2, chosen_together(routing(seven_of_eight), 8)) is None


def test_small_steps_add_up_over_checks() -> None:
    """64 tokens an expert and step: the second check has enough, and every further one, which forgets by halves."""
    watch = PairWatch(CollapseConfig(), {0: layer_of(8)})
    fixed = together((0, 1), (2, 3), (4, 5), (6, 7), tokens=256, experts=8)
    assert [watch.check(0, fixed) is not None for _ in range(4)] == [False, True, True, True]
    assert int(watch.chosen[0][0, 0]) == (128 // 2 + 64) // 2 + 64
    saved = {name: tensor.clone() for name, tensor in watch.tensors().items()}
    assert torch.equal(saved["together.0"], watch.chosen[0])
    mixed = together(*((first, second) for first in range(8) for second in range(first)), tokens=280, experts=8)
    found = [watch.check(0, mixed) is not None for _ in range(6)]
    assert found == [False] * 6, "what was counted before weighs too little by now"
    watch.forget(0, [1])
    assert int(watch.chosen[0][1].sum()) == int(watch.chosen[0][:, 1].sum()) == 0
    large = together((0, 1), (2, 3), (4, 5), (6, 7), tokens=800, experts=8)
    assert watch.check(0, large) is not None and torch.equal(watch.chosen[0], large), "one step is enough by itself"


def test_copies_that_grow_apart_to_and_fro_about_the_bound_are_not_called_alike() -> None:
    layer = layer_of(2)
    base = [parameter[0].detach().clone() for parameter in layer.experts.parameters()]
    other = [torch.randn_like(each) for each in base]
    dot, norm = (sum(float((x * y).sum()) for x, y in zip(base, each, strict=True)) for each in (other, base))
    other = [y - dot / norm * x for x, y in zip(base, other, strict=True)]
    scale = (norm / sum(float((y * y).sum()) for y in other)) ** 0.5
    watch = PairWatch(CollapseConfig(), {0: layer})

    def found(cosine: float) -> bool:
        with torch.no_grad():
            for parameter, x, y in zip(layer.experts.parameters(), base, other, strict=True):
                parameter[0], parameter[1] = x, cosine * x + (1 - cosine**2) ** 0.5 * scale * y
        return watch.check(0, None) is not None

    assert not any(found(cosine) for cosine in (0.995, 0.991, 0.98995, 0.9901, 0.9902, 0.981, 0.9901))
    assert not found(0.979) and not found(0.9899) and found(0.9901), "well below the bound, and above it again"


def test_weights_that_are_not_finite_hide_no_other_pair() -> None:
    layer = layer_of()
    watch = PairWatch(CollapseConfig(), {0: layer})
    assert watch.check(0, None) is None
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[1], parameter[2] = parameter[0], float("nan")
    found = watch.check(0, None)
    assert found is not None and (found.first, found.second) == (0, 1)


def test_grown_alike_is_above_the_bound_after_having_been_below() -> None:
    layer = layer_of()
    watch = PairWatch(CollapseConfig(max_cosine=0.9), {3: layer})
    copies = [parameter.detach().clone() for parameter in layer.experts.parameters()]
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[1] = parameter[0]
    assert watch.check(3, None) is None, "copies of one MLP have never been apart"
    with torch.no_grad():
        for parameter, other in zip(layer.experts.parameters(), copies, strict=True):
            parameter.copy_(other)
    assert watch.check(3, None) is None
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[1] = parameter[0]
    found = watch.check(3, None)
    assert found is not None and (found.first, found.second, found.why) == (0, 1, "alike") and found.value > 0.999
    watch.forget(3, [1])
    assert watch.check(3, None) is None, "a revived expert begins as a copy"
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[2] = parameter[3]
    found = watch.check(3, None)
    assert found is not None and (found.first, found.second) == (2, 3)


def test_a_pair_counts_towards_a_collapse_like_any_trouble_and_after_the_load() -> None:
    detector = CollapseDetector(CollapseConfig(patience=2))
    even, skewed = {5: torch.tensor([250] * 4)}, {5: torch.tensor([900, 40, 30, 30])}
    alike, both = Pair(1, 3, "alike", 0.995), Pair(0, 2, "together", 0.93)
    (first,) = detector.check(even, 1000, pairs={5: alike})
    assert (first.kind, first.expert, first.other, first.collapsed) == ("alike", 1, 3, False)
    assert str(first) == (
        "layer 5 warning: experts 1 and 3 have grown alike, weight cosine 0.9950 (bound 0.99; 1 check)"
    )
    (second,) = detector.check(even, 1000, pairs={5: both})
    assert second.collapsed and str(second) == (
        "layer 5 collapsed: experts 0 and 2 share 93.0% of the tokens of either (bound 90%; 2 checks in a row)"
    )
    (third,) = detector.check(skewed, 1000, pairs={5: both})
    assert (third.kind, third.in_a_row) == ("dominance", 3)
    assert detector.check(even, 1000) == [] and detector.in_a_row[5] == 0


def test_a_run_with_twins_is_told_and_a_checkpoint_knows_who_has_been_apart(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Experts 0 and 1 get one gate row, and a bias that makes them everybody's choice: always together, from top-2."""
    config = experiment(
        moe={"router": {"name": "sigmoid", "top_k": 2, "bias_update_rate": 0.0}},
        optim={"router_lr": 1e-12},
        train={"check_every": 2, "early_stop": True, "collapse": {"max_share": 1.0, "min_share_of_uniform": 0.0}},
    )
    trainer = make_trainer(config, dataset, tmp_path)
    with torch.no_grad():
        router = trainer.layers[1].router
        router.weight[1] = router.weight[0]
        router.weight[3] = router.weight[2]
    config_of = trainer.monitor.pairs.config
    object.__setattr__(trainer.monitor.pairs, "config", config_of.model_copy(update={"min_expected_count": 10.0}))
    result = trainer.train()
    assert isinstance(trainer.logger, Recorder)
    events = [text for kind, text in trainer.logger.events if kind in ("imbalance", "collapse")]
    assert all("layer 1" in text and "share" in text for text in events), events
    assert (result.status, result.step) == ("collapsed", 6) and len(events) == 3
    saved = newest_checkpoint(tmp_path)[0].tensors["routing"]["apart.1"]
    assert saved.dtype == torch.bool and torch.equal(saved, ~torch.eye(4, dtype=torch.bool))


def test_a_revived_expert_is_not_called_its_source_s_twin(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """A zero gate ties every token to experts 0 and 1; 2 and 3 are dead at every check and begin anew as copies."""
    moe = {"router": {"name": "topk", "top_k": 2, "noise_std": 0.0}, "revive_dead": True, "revive_noise": 1e-3}
    config = experiment(moe=moe, train={"steps": 12, "collapse": {"min_expected_count": 10, "max_share": 1.0}})
    trainer = make_trainer(config, dataset, tmp_path)
    with torch.no_grad():
        trainer.layers[0].router.weight.zero_()
    trainer.layers[0].router.weight.requires_grad_(False)
    trainer.train()
    assert isinstance(trainer.logger, Recorder)
    revived = [text for kind, text in trainer.logger.events if kind == "revived" and "layer 0" in text]
    assert len(revived) >= 4
    assert float(expert_cosines(trainer.layers[0])[0, 2]) > 0.99, "alike they are"
    said = [text for kind, text in trainer.logger.events if kind in ("imbalance", "collapse") and "layer 0" in text]
    assert said and not any("alike" in text for text in said)
    assert not trainer.monitor.pairs.apart[0][2, 0] and trainer.monitor.pairs.apart[0][0, 1]

"""Matched comparison: when one may be called better, and when not, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from moectl.cli.output import to_jsonable
from moectl.errors import ConfigError, MoectlError
from moectl.runs import RunDir
from moectl.runs.compare import Comparison, compare

MakeRun = Callable[..., RunDir]


def compared(*runs: RunDir) -> Comparison:
    result = compare([run.path for run in runs])
    json.dumps(to_jsonable(result.to_dict()), allow_nan=False)
    return result


def test_one_seed_is_one_seed(make_run: MakeRun) -> None:
    result = compared(make_run("dense", router=None, losses=[3.0, 2.5, 2.2]), make_run("moe", losses=[3.0, 2.4, 2.0]))
    (verdict,) = result.verdicts
    assert result.matched and result.at_tokens == 300_000
    assert (verdict.baseline, verdict.other, verdict.better) == ("dense", "top1", None)
    assert verdict.difference is not None and verdict.difference.mean == pytest.approx(-0.2)
    assert "one seed is one seed" in verdict.text and "-0.2000" in verdict.text
    assert result.configurations[1].domains == {"code": pytest.approx(1.5)}


def test_pure_lm_loss_is_compared_and_not_the_total(make_run: MakeRun) -> None:
    one = make_run("a", losses=[2.0], close=False)
    one.log(100, 100_000, {"train/loss": 99.0, "eval/loss": 77.0})
    one.release()
    result = compared(one, make_run("b", router=None, losses=[2.5]))
    assert [row["eval_lm_loss"] for row in result.runs] == [2.0, 2.5]


def test_several_seeds_paired(make_run: MakeRun) -> None:
    # Seeds vary by 0.2, the difference by 0.01: only pairing sees it.
    runs = [make_run(f"d{seed}", router=None, seed=seed, losses=[2.0 + 0.2 * seed]) for seed in range(3)]
    runs += [make_run(f"m{seed}", seed=seed, losses=[1.9 + 0.2 * seed + 0.01 * (seed % 2)]) for seed in range(3)]
    result = compared(*runs)
    (verdict,) = result.verdicts
    assert (verdict.method, verdict.seeds, verdict.better) == ("paired by seed", [0, 1, 2], "top1")
    difference = verdict.difference
    assert difference is not None and difference.mean == pytest.approx(-0.29 / 3)
    # s = 0.01/sqrt(3), n = 3: half width 4.302653 · 0.01 / 3.
    assert difference.high == pytest.approx(-0.29 / 3 + 0.0143422, abs=1e-6)
    dense = result.configurations[0].loss
    assert dense is not None and dense.mean == pytest.approx(2.2) and dense.low is not None and dense.low < 2.0


def test_several_seeds_without_a_difference(make_run: MakeRun) -> None:
    runs = [make_run(f"d{seed}", router=None, seed=seed, losses=[2.0 + 0.1 * seed]) for seed in range(3)]
    runs += [make_run(f"m{seed}", seed=seed, losses=[2.2 - 0.1 * seed]) for seed in range(3)]
    (verdict,) = compared(*runs).verdicts
    assert verdict.better is None and "the interval holds zero" in verdict.text


def test_other_seeds_are_compared_unpaired(make_run: MakeRun) -> None:
    runs = [make_run(f"d{seed}", router=None, seed=seed, losses=[3.0 + 0.01 * seed]) for seed in range(3)]
    runs += [make_run(f"m{seed}", seed=seed, losses=[2.0 + 0.01 * seed]) for seed in range(3, 6)]
    (verdict,) = compared(*runs).verdicts
    assert (verdict.method, verdict.seeds, verdict.better) == ("unpaired", [], "top1")


def test_one_seed_against_several_has_no_verdict(make_run: MakeRun) -> None:
    runs = [make_run(f"d{seed}", router=None, seed=seed, losses=[3.0]) for seed in range(3)]
    (verdict,) = compared(*runs, make_run("m", seed=0, losses=[1.0])).verdicts
    assert verdict.better is None and verdict.difference is not None and verdict.difference.mean == -2.0
    assert "too few seeds" in verdict.text


def test_the_same_seed_twice_is_one_sample(make_run: MakeRun) -> None:
    runs = [make_run("d0", router=None, losses=[3.0]), make_run("d0-again", router=None, losses=[3.0])]
    runs += [make_run("m0", losses=[2.0]), make_run("m0-again", losses=[2.0])]
    result = compared(*runs)
    assert result.verdicts[0].better is None and result.verdicts[0].method == "one seed"
    assert any("not separate samples" in note for note in result.notes)


@pytest.mark.parametrize(
    ("condition", "change"),
    [
        ("tokens", {"steps": 600, "losses": [3.0, 2.5, 2.0, 1.9, 1.8, 1.7]}),
        ("data", {"data": {"id": "f" * 12, "sha256": "e" * 64}}),
        ("eval set", {"data": {"id": "d" * 12, "sha256": "0" * 64}}),
        ("loss definition", {"marks": ["noncausal"]}),
        ("loss definition", {"loss_definition": "byte-level"}),
    ],
)
def test_what_is_not_matched_is_not_judged(make_run: MakeRun, condition: str, change: dict[str, object]) -> None:
    runs = [make_run(f"d{seed}", router=None, seed=seed) for seed in range(2)]
    runs += [make_run(f"m{seed}", seed=seed, **{"losses": [1.0, 0.9, 0.8], **change}) for seed in range(2)]
    result = compared(*runs)
    assert not result.matched and condition in result.mismatches
    assert set(result.mismatches[condition]) == {"d0", "d1", "m0", "m1"}
    (verdict,) = result.verdicts
    assert verdict.better is None and condition in verdict.text and "no verdict" in verdict.text
    assert verdict.difference is not None  # shown all the same


def test_an_early_stopped_run_is_compared_at_its_tokens(make_run: MakeRun) -> None:
    full = make_run("dense", router=None, losses=[3.0, 2.5, 2.0], max_blocks=48)
    stopped = make_run("no-lb", losses=[2.9, 2.6], final_loss=2.4, status="collapsed", early_stop=True, max_blocks=48)
    result = compared(full, stopped)
    assert result.matched and result.at_tokens == 200_000
    # Its last evaluation read the whole split, the other run's read 48 blocks there: those 48 are compared.
    assert result.eval_set == "48 blocks of the held-out split"
    assert [row["eval_lm_loss"] for row in result.runs] == [2.5, 2.6]
    (note,) = [note for note in result.notes if "no-lb" in note]
    assert "(collapsed) reached 200,000 of 300,000 tokens; all are compared at 200,000" in note


def test_a_whole_split_is_not_set_against_a_part_of_it(make_run: MakeRun) -> None:
    # Its only evaluation there is the last, which read it all.
    stopped = make_run("stopped", losses=[2.9, 2.6], status="collapsed", max_blocks=48)
    result = compared(make_run("dense", router=None, max_blocks=48), stopped)
    assert (result.matched, result.at_tokens) == (True, 100_000)


def test_periodic_evaluations_on_other_blocks(make_run: MakeRun) -> None:
    ended = compared(make_run("a", router=None, max_blocks=48), make_run("b", max_blocks=4))
    assert ended.matched and ended.eval_set == "the whole held-out split"
    stopped = make_run("c", max_blocks=4, losses=[2.9, 2.6], status="interrupted")
    result = compared(make_run("d", router=None, max_blocks=48), stopped)
    assert list(result.mismatches) == ["eval set"]
    assert result.mismatches["eval set"]["c"] == "4 blocks of the held-out split"


def test_whole_splits_on_the_way_are_compared_as_such(make_run: MakeRun) -> None:
    # A bound that no split reaches: every evaluation is whole, and so is one of a run that was interrupted.
    runs = [make_run("a", router=None), make_run("b", losses=[2.9, 2.6], status="interrupted")]
    result = compared(*runs)
    assert (result.at_tokens, result.eval_set) == (200_000, "the whole held-out split")
    assert [row["eval_lm_loss"] for row in result.runs] == [2.5, 2.6]


def test_a_later_evaluation_of_the_whole_split_counts(make_run: MakeRun) -> None:
    run = make_run("a", router=None)
    run.update(metrics={"eval/lm_loss": 1.9})
    result = compared(run, make_run("b"))
    assert [row["eval_lm_loss"] for row in result.runs] == [1.9, 2.0]
    assert result.configurations[0].domains == {"code": 1.5}


def test_a_lost_run_reached_what_it_logged(make_run: MakeRun) -> None:
    lost = make_run("lost", status="running", losses=[3.0], close=False)
    lost.log(150, 150_000, {"train/lm_loss": 2.9})
    lost.release()
    result = compared(make_run("a", router=None), lost)
    assert result.at_tokens == 100_000
    assert any("lost (lost) reached 150,000 of 300,000 tokens" in note for note in result.notes)


def test_no_shared_evaluation_is_a_mismatch(make_run: MakeRun) -> None:
    odd = make_run("odd", losses=[], status="failed", close=False)
    odd.log(50, 50_000, {"eval/lm_loss": 3.5})
    odd.release()
    result = compared(make_run("a", router=None), odd)
    assert not result.matched and "tokens" in result.mismatches and result.at_tokens is None


def test_nan_loss_supports_nothing(make_run: MakeRun) -> None:
    (verdict,) = compared(make_run("a", router=None), make_run("b", losses=[3.0, 2.5, math.nan])).verdicts
    assert verdict.better is None and "not a number" in verdict.text


def test_what_differs_is_shown(make_run: MakeRun) -> None:
    result = compared(make_run("a", lr=1e-3), make_run("b", lr=2e-3, commit="b" * 40, dirty=True))
    assert result.config_differences == {"optim.lr": {"top1 (a)": 1e-3, "top1 (b)": 2e-3}}
    dense = compared(make_run("c", router=None), make_run("d"))
    assert dense.config_differences == {"moe": {"dense": None, "top1": {"router.name": "top1"}}}
    assert any("different commits" in note for note in result.notes)
    assert any("uncommitted changes" in note for note in result.notes)


def test_seeds_of_one_configuration_alone(make_run: MakeRun) -> None:
    result = compared(*(make_run(f"m{seed}", seed=seed, losses=[2.0 + seed]) for seed in range(3)))
    assert result.verdicts == [] and result.configurations[0].seeds == [0, 1, 2]


def test_what_cannot_be_compared_at_all(make_run: MakeRun) -> None:
    run = make_run("a")
    with pytest.raises(ConfigError, match="two different runs"):
        compare([run.path, run.path])
    with pytest.raises(MoectlError, match="no eval/lm_loss yet"):
        compare([run.path, make_run("empty", losses=[]).path])


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "is missing"), ("a: [1,", "is broken: line 1"), ("", "no table"), ("- 1\n", "no table")],
)
def test_a_config_that_cannot_be_read_is_named(make_run: MakeRun, text: str | None, problem: str) -> None:
    run, path = make_run("a"), make_run("b").path / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(MoectlError, match=problem) as caught:
        compare([run.path, path.parent])
    assert str(path) in caught.value.message and "Restore" in (caught.value.hint or "") and caught.value.exit_code == 1


def test_a_config_that_is_no_experiment_is_named_too(make_run: MakeRun) -> None:
    from moectl.walk.loading import run_config

    path = make_run("a").path / "config.yaml"
    path.write_text("train: {steps: -1}\n")
    with pytest.raises(MoectlError, match="train.steps: Input should be greater than 0") as caught:
        run_config(path.parent)
    assert str(path) in caught.value.message and caught.value.exit_code == 1
    path.unlink()
    with pytest.raises(MoectlError, match="config.yaml is missing"):
        run_config(path.parent)


def of(variant: str, **more: object) -> dict[str, object]:
    return {"group": {"name": "g", "variant": variant}, **more}


def three(make_run: MakeRun, **third: object) -> list[RunDir]:
    """Two seeds each of dense and moe that finished, and of no-lb."""
    runs = [make_run(f"d{s}", router=None, seed=s, losses=[3.0, 2.5, 2.0 + 0.1 * s], **of("dense")) for s in range(2)]
    runs += [make_run(f"m{s}", seed=s, losses=[3.0, 2.4, 1.9 + 0.1 * s], **of("moe")) for s in range(2)]
    return runs + [make_run(f"n{s}", seed=s, lr=1e-4, **{**of("no-lb"), **third}) for s in range(2)]


def test_one_that_stopped_early_does_not_hold_the_others_back(make_run: MakeRun) -> None:
    result = compared(*three(make_run, losses=[2.9, 2.6], status="collapsed"))
    assert [group.label for group in result.configurations] == ["dense", "moe", "no-lb"]
    assert [group.at_tokens for group in result.configurations] == [300_000, 300_000, 200_000]
    moe, no_lb = result.verdicts
    assert (moe.at_tokens, moe.baseline_loss, moe.other_loss) == (300_000, pytest.approx(2.05), pytest.approx(1.95))
    # At the tokens that it reached, against the baseline's own evaluation there, and not against its last.
    assert (no_lb.at_tokens, no_lb.baseline_loss, no_lb.other_loss) == (200_000, 2.5, 2.6)
    assert no_lb.difference.mean == pytest.approx(0.1) and no_lb.method == "paired by seed"
    assert no_lb.text.startswith("no-lb − dense at 200,000 tokens = +0.1000 nats") and no_lb.text.endswith(" there.")
    assert moe.text.startswith("moe − dense = -0.1000 nats")
    assert result.configurations[2].stopped_early == ["n0", "n1"] and result.configurations[0].stopped_early == []
    told = [(early.run, early.at_tokens, early.loss, early.baseline, early.baseline_loss) for early in result.early]
    assert told == [
        ("n0", 200_000, 2.6, "d0", 2.5), ("n1", 200_000, 2.6, "d1", 2.5),
    ]  # fmt: skip
    (note, _) = [note for note in result.notes if "collapsed" in note]
    assert note == (
        "n0 (collapsed) reached 200,000 of 300,000 tokens. At 200,000, the last evaluation that both have, its LM loss"
        " is 2.6000, that of d0 2.5000 (+0.1000)."
    )


def test_a_run_that_can_go_on_is_left_out_where_other_seeds_are_there(make_run: MakeRun) -> None:
    runs = three(make_run, losses=[2.9, 2.6, 2.3])
    stopped = make_run("m2", seed=2, losses=[3.1], status="interrupted", **of("moe"))
    result = compared(*runs, stopped, make_run("d2", router=None, seed=2, losses=[3.0, 2.5, 2.1], **of("dense")))
    dense, moe, _ = result.configurations
    assert (moe.at_tokens, moe.left_out, moe.loss.n) == (300_000, ["m2"], 2)
    assert (dense.left_out, dense.loss.n) == ([], 3)
    assert result.verdicts[0].seeds == [0, 1]
    (row,) = [row for row in result.runs if not row["counted"]]
    assert (row["id"], row["at_tokens"], row["eval_lm_loss"]) == ("m2", 100_000, 3.1)
    (early,) = result.early
    assert (early.run, early.reached, early.at_tokens, early.loss) == ("m2", 100_000, 100_000, 3.1)
    assert (early.baseline, early.baseline_loss) == ("d2", 3.0)


def test_where_all_seeds_only_stopped_they_are_compared_at_what_they_reached(make_run: MakeRun) -> None:
    result = compared(*three(make_run, losses=[2.9, 2.6], status="interrupted"))
    no_lb = result.configurations[2]
    assert (no_lb.at_tokens, no_lb.left_out, result.verdicts[1].at_tokens) == (200_000, [], 200_000)


def test_one_that_stopped_before_any_evaluation_is_judged_by_none(make_run: MakeRun) -> None:
    runs = three(make_run, losses=[], status="collapsed", close=False)
    for run in runs[-2:]:
        run.log(0, 0, {"eval/lm_loss": 5.0})
        run.log(40, 40_000, {"train/lm_loss": 4.0})
        run.release()
    result = compared(*runs)
    moe, no_lb = result.verdicts
    assert result.matched and moe.at_tokens == 300_000
    assert (no_lb.at_tokens, no_lb.better) == (None, None) and "not matched (tokens): no verdict" in no_lb.text
    assert any("compared with none" in note for note in result.notes)


def test_time_and_money_are_added_up_and_marked_where_unknown(make_run: MakeRun) -> None:
    paid = {"duration_s": 60.0, "cost": 0.5, "train_seconds": 10.0, "train_tokens": 1000}
    runs = [make_run(f"d{s}", router=None, seed=s, **of("dense", **paid)) for s in range(2)]
    runs += [make_run("m0", **of("moe", **paid)), make_run("m1", seed=1, **of("moe", duration_s=30.0))]
    dense, moe = compared(*runs).configurations
    assert (dense.duration_s, dense.cost, dense.tokens_per_second) == (120.0, 1.0, 100.0)
    assert (moe.duration_s, moe.cost) == (90.0, None)


def test_variants_of_a_group_bear_their_own_names(make_run: MakeRun) -> None:
    runs = [make_run(f"x{s}", seed=s, **of("plain")) for s in range(2)]
    runs += [make_run(f"y{s}", seed=s, lr=1e-4, **of("slow")) for s in range(2)]
    assert [group.label for group in compared(*runs).configurations] == ["plain", "slow"]

"""Variants of an ablation: what they are called, what they come to, and that they are equal where they must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.config.loading import load_config, shipped_configs
from moectl.config.presets import PRESETS
from moectl.config.variants import configs_of, group_name, seeds_of, unequal, variants_of
from moectl.errors import ConfigError

SHIPPED = sorted(shipped_configs())


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("0,1,2", (0, 1, 2)), ("7,", (7,)), (" 4, 2 ", (4, 2))]
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["", ",", "0", "-1", "1001", "1,1", "1,-2", "two", "1.5", "1e3", "0x1"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_of(text)


def test_names_in_the_order_asked_for() -> None:
    assert [variant.name for variant in variants_of(None)] == ["dense", "moe", "no-lb", "top2"]
    mixed = variants_of("moe,dense", "sigmoid,./mine.py:Mine", ["low:optim.lr=1e-3"])
    assert [variant.name for variant in mixed] == ["moe", "dense", "moe-sigmoid", "moe-Mine", "low"]
    assert [variant.preset for variant in mixed] == ["moe", "dense", "moe", "moe", None]


def test_own_variants_take_lists() -> None:
    (variant,) = variants_of(None, None, ["low:optim.lr=1e-3,moe.layers=[0,1],train.precision=float64"])
    assert variant.sets == ("optim.lr=1e-3", "moe.layers=[0,1]", "train.precision=float64")
    config = configs_of(None, [variant])["low"]
    assert config.moe is not None
    assert (config.optim.lr, config.moe.layers, config.train.precision) == (1e-3, "0,1", "float64")


@pytest.mark.parametrize(
    ("presets", "routers", "own", "said"),
    [
        ("dense,dense", None, [], "named twice"),
        ("dense,", None, [], "empty name"),
        ("mo", None, [], "unknown preset 'mo'"),
        ("moe", "top1", [], "named twice"),
        (None, None, ["moe.layers=all"], "NAME:KEY=VALUE"),
        (None, None, ["a:b"], "key=value"),
        (None, None, ["a/b:optim.lr=1"], "usable name"),
        (None, None, ["a:train.seed=3"], "train.seed"),
        (None, None, ["a:name=x"], "name"),
    ],
)
def test_variants_that_cannot_be(presets: str | None, routers: str | None, own: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        variants_of(presets, routers, own)


@pytest.mark.parametrize("shipped", SHIPPED)
def test_presets_over_every_shipped_config_are_equal_where_they_must_be(shipped: str) -> None:
    configs = configs_of(shipped, variants_of(None))
    assert list(configs) == list(PRESETS) and unequal(configs) == {}
    dense, moe, no_lb, top2 = configs.values()
    for config in configs.values():
        # Held apart from the code under test: these five make the tokens, the schedule and the data order.
        ours, theirs = (
            (c.data, c.train.steps, c.train.batch_size, c.train.grad_accum, c.train.seed, c.eval, c.optim)
            for c in (config, dense)
        )
        assert ours == theirs
    assert dense.moe is None and moe.moe is not None and no_lb.moe is not None and top2.moe is not None
    assert (no_lb.moe.lb_coef, no_lb.moe.router_options["noise_std"], no_lb.train.early_stop) == (0.0, 0.0, True)
    assert no_lb.moe.schedule.noise_std is None and no_lb.moe.schedule.lb_coef is None
    assert top2.moe.router_name == "top2" and top2.moe.schedule.top_k is None
    # Beyond what makes a preset what it is, nothing moved.
    assert no_lb.moe.num_experts == moe.moe.num_experts == top2.moe.num_experts
    assert no_lb.moe.layers == moe.moe.layers == top2.moe.layers


def test_no_lb_has_no_balance_loss_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "moe:\n  balance_loss: switch+cv2+entropy\n  schedule:\n    lb_coef: [[0, 0.1], [0.5, 0.01]]\n"
        "    noise_std: [[0, 0.2], [0.5, 0]]\n"
    )
    moe = load_config(file, preset="no-lb").moe
    assert moe is not None and (moe.balance_loss, moe.lb_coef) == (("switch",), 0.0)
    assert (moe.schedule.noise_std, moe.schedule.lb_coef) == (None, None)


def test_top2_leaves_the_options_of_the_files_router_behind(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("moe: {router: {name: topk, top_k: 4, noise_std: 0.3}}\n")
    moe = load_config(file, preset="top2").moe
    assert moe is not None and moe.router == {"name": "top2"}
    kept = load_config(file, preset="no-lb").moe
    assert kept is not None and kept.router == {"name": "topk", "top_k": 4, "noise_std": 0.0}


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=700", "train.batch_size=8", "train.grad_accum=2", "optim.warmup_steps=10",
        "optim.schedule=constant", "optim.min_lr_ratio=0.5", "train.eval_every=50", "eval.max_blocks=3",
        "data.seed=1", "data.block_size=64",
    ],
)  # fmt: skip
def test_variants_that_could_not_be_compared_are_refused(change: str) -> None:
    with pytest.raises(
        ConfigError, match=change.split("=")[0].replace("data.seed", "data").replace("data.block_size", "data")
    ):
        configs_of(None, variants_of("moe", None, [f"other:{change}"]))


def test_the_same_tokens_cut_otherwise_are_equal() -> None:
    cut = variants_of("moe", None, ["cut:train.batch_size=8,train.grad_accum=2"])
    assert list(configs_of(None, cut)) == ["moe", "cut"]


def test_what_is_for_experts_passes_the_dense_variant_by() -> None:
    configs = configs_of(None, variants_of("dense,moe"), sets=["moe.num_experts=4"], overrides={"optim.lr": 1e-3})
    assert configs["dense"].moe is None and configs["moe"].moe is not None and configs["moe"].moe.num_experts == 4
    assert configs["dense"].optim.lr == configs["moe"].optim.lr == 1e-3
    with pytest.raises(ConfigError, match="dense"):  # with nobody to take it, it is a mistake
        configs_of(None, variants_of("dense"), sets=["moe.num_experts=4"])


def test_twins_are_refused() -> None:
    with pytest.raises(ConfigError, match="'moe' and 'again' are the same configuration"):
        configs_of(None, variants_of("moe", None, ["again:moe.num_experts=8"]))
    with pytest.raises(ConfigError, match="train.seed is not for an ablation"):
        configs_of(None, variants_of("moe"), sets=["train.seed=3"])


def test_a_group_is_named_after_what_is_asked() -> None:
    name = group_name("moe", ["optim.lr=1e-3", "train.steps=9"], {"model.base": "mini"}, None)
    assert name == group_name("moe", ["train.steps=9", "optim.lr=1e-3"], {"model.base": "mini"}, None)
    assert name.startswith("moe-") and len(name) == len("moe-") + 8
    others = {
        group_name("moe", ["optim.lr=1e-3"], {"model.base": "mini"}, None),
        group_name("dense", ["optim.lr=1e-3", "train.steps=9"], {"model.base": "mini"}, None),
        group_name("moe", ["optim.lr=1e-3", "train.steps=9"], {}, None),
        group_name("moe", ["optim.lr=1e-3", "train.steps=9"], {"model.base": "mini"}, "abc"),
    }
    assert name not in others and len(others) == 4

"""One config from presets, YAML, flags and ``--set``: precedence, strictness, and words that help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl.config import ExperimentConfig, load_config, resolved_yaml
from moectl.config.loading import parse_set, read_yaml, shipped_configs
from moectl.config.presets import PRESETS, kind_of
from moectl.errors import ConfigError, NotFoundError

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def refused(path: Path | None = None, **arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, **arguments)
    assert caught.value.exit_code == 2
    return caught.value


def test_nothing_given_is_the_schema() -> None:
    assert load_config(None) == ExperimentConfig()


def test_precedence_from_defaults_to_set(write: Write) -> None:
    file = write("preset: no-lb\nmoe:\n  lb_coef: 0.5\ntrain:\n  steps: 100\n  seed: 1\n  batch_size: 2\n")
    config = load_config(file, overrides={"train.seed": 2, "train.batch_size": 3}, sets=["train.batch_size=4"])
    assert config.train.steps == 100  # the file, over the default
    assert config.train.seed == 2  # a flag, over the file
    assert config.train.batch_size == 4  # --set, over the flag
    assert config.moe is not None
    assert config.moe.lb_coef == 0.5  # the file, over its own preset
    assert config.train.early_stop is True  # the preset, over the default
    assert config.moe.num_experts == 8  # the default


def test_last_set_wins() -> None:
    assert load_config(None, sets=["train.seed=1", "train.seed=2"]).train.seed == 2


def test_flags_that_were_not_given_change_nothing() -> None:
    assert load_config(None, overrides={"train.steps": None, "name": None}) == ExperimentConfig()


def test_only_given_sections_count_as_set() -> None:
    """`train` prepares the config's own data only when the config speaks of data."""
    assert "data" not in load_config(None, sets=["train.seed=1"]).model_fields_set
    assert "data" in load_config(None, sets=["data.seed=1"]).model_fields_set


# presets


def test_presets_are_what_they_are_called() -> None:
    dense, moe, no_lb, top2 = (load_config(None, preset=name) for name in PRESETS)
    assert dense.moe is None
    assert moe.moe is not None and no_lb.moe is not None and top2.moe is not None
    assert (moe.moe.num_experts, moe.moe.router_name, moe.moe.layers) == (8, "top1", "last:4")
    assert (no_lb.moe.lb_coef, no_lb.moe.router_options["noise_std"]) == (0.0, 0.0)
    assert no_lb.train.early_stop is True
    assert top2.moe.router_name == "top2"
    assert [config.preset for config in (dense, moe, no_lb, top2)] == ["dense", "moe", "no-lb", "top2"]


@pytest.mark.parametrize("section", ["data", "model", "optim", "eval"])
def test_presets_differ_in_nothing_that_a_comparison_needs_equal(section: str) -> None:
    configs = [load_config(None, preset=name) for name in PRESETS]
    assert len({getattr(config, section).content_hash() for config in configs}) == 1
    trains = {config.train.model_copy(update={"early_stop": False}).content_hash() for config in configs}
    assert len(trains) == 1


def test_preset_on_the_command_line_is_what_it_is_called_whatever_the_file_says(write: Write) -> None:
    file = write("moe: {router: {name: topk, noise_std: 0.3}, num_experts: 4, layers: all, lb_coef: 0.02}\n")
    assert load_config(file, preset="dense").moe is None
    no_lb = load_config(file, preset="no-lb").moe
    assert no_lb is not None
    assert (no_lb.lb_coef, no_lb.router_options["noise_std"]) == (0.0, 0.0)
    assert (no_lb.router_name, no_lb.num_experts, no_lb.layers) == ("topk", 4, "all")
    moe = load_config(file, preset="moe").moe
    assert moe is not None
    assert (moe.router_name, moe.num_experts, moe.layers) == ("topk", 4, "all")
    assert load_config(write("moe: null\n"), preset="moe").moe is not None


def test_preset_by_flag_replaces_the_files_own(write: Write) -> None:
    config = load_config(write("preset: no-lb\n"), preset="top2")
    assert config.preset == "top2"
    assert config.train.early_stop is False
    assert load_config(write("preset: no-lb\n"), sets=["preset=dense"]).moe is None


def test_set_still_stands_above_a_preset() -> None:
    assert load_config(None, preset="no-lb", sets=["train.early_stop=false"]).train.early_stop is False


def test_unknown_preset_names_the_nearest(write: Write) -> None:
    for error in (refused(preset="no_lb"), refused(write("preset: no_lb\n"))):
        assert "no_lb" in error.message
        assert "'no-lb'" in str(error.hint)


def test_dense_with_experts_is_a_contradiction(write: Write) -> None:
    assert "dense" in refused(write("preset: dense\nmoe: {num_experts: 4}\n")).message
    assert "moe.num_experts" in refused(preset="dense", sets=["moe.num_experts=4"]).message
    assert "dense" in refused(overrides={"moe.router.name": "top1"}, preset="dense").message


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.steps=300", ("train.steps", 300)),
        ("optim.lr=3e-4", ("optim.lr", "3e-4")),
        ("moe=null", ("moe", None)),
        ("data.domains=[code, prose]", ("data.domains", ["code", "prose"])),
        ("moe.router={name: top2}", ("moe.router", {"name": "top2"})),
        ("name=a=b", ("name", "a=b")),
        ("name=", ("name", None)),
    ],
)
def test_set_values_are_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_set(text) == expected


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", "name=[1"])
def test_set_that_cannot_be_read(text: str) -> None:
    assert "--set" in refused(sets=[text]).message


def test_numbers_in_scientific_notation_reach_the_schema_as_numbers(write: Write) -> None:
    assert load_config(write("optim: {lr: 3e-4}\n")).optim.lr == 3e-4
    assert load_config(None, sets=["optim.lr=3e-4"]).optim.lr == 3e-4


def test_set_reaches_into_the_routers_own_options() -> None:
    moe = load_config(None, sets=["moe.router.noise_std=0.2"]).moe
    assert moe is not None
    assert moe.router == {"name": "top1", "noise_std": 0.2}


def test_set_makes_it_dense_and_router_may_be_a_bare_name(write: Write) -> None:
    assert load_config(None, sets=["moe=null"]).moe is None
    for config in (load_config(write("moe: {router: top2}\n")), load_config(None, sets=["moe.router=top2"])):
        assert config.moe is not None
        assert config.moe.router == {"name": "top2"}


def test_set_below_a_value_is_refused(write: Write) -> None:
    assert "train.steps is 9, not a section" in refused(write("train: {steps: 9}\n"), sets=["train.steps.x=1"]).message


# unknown keys and wrong types


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.stepz", "train.steps"),
        ("trian.steps", "train.steps"),
        ("steps", "train.steps"),
        ("train.lr", "optim.lr"),
        ("moe.num_expert", "moe.num_experts"),
        ("train.collapse.max_shar", "train.collapse.max_share"),
        ("lb_coeff", "moe.lb_coef"),
    ],
)
def test_unknown_key_is_named_in_full_with_the_nearest(key: str, nearest: str, write: Write) -> None:
    error = refused(sets=[f"{key}=1"])
    assert error.message == f"unknown config key '{key}' (--set)"
    assert f"Did you mean '{nearest}'?" in str(error.hint)
    assert f"'{key}' (a flag)" in refused(overrides={key: 1}).message
    *sections, leaf = key.split(".")
    text = (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(sections))
        + f"{'  ' * len(sections)}{leaf}: 1\n"
    )
    file = write(text)
    assert f"'{key}' ({file}, line {len(sections) + 1})" in refused(file).message


def test_several_mistakes_are_all_named(write: Write) -> None:
    error = refused(write("train:\n  stepz: 1\nmoe:\n  nmu_experts: 2\n"))
    assert "train.stepz" in error.message
    assert "moe.nmu_experts" in error.message
    assert "train.steps" in str(error.hint)
    assert "moe.num_experts" in str(error.hint)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("train.steps=many", "train.steps = 'many' (--set): should be a valid integer"),
        ("train.steps=-1", "train.steps = -1 (--set): should be greater than 0"),
        ("train.precision=fp8", "should be 'float32', 'bfloat16', 'bfloat16-pure', 'float16' or 'float64'"),
        ("optim.lr=.nan", "optim.lr = nan (--set): should be a finite number"),
        ("train=3", "train = 3 (--set): this is a section"),
        ("moe.layers=lasst", "none of: all, last:4"),
        ("name=../up", "not a usable name"),
        ("data.domains=[]", "at least one domain"),
        ("optim.warmup_steps=600", "optim.warmup_steps (600) must be below train.steps (600)"),
    ],
)
def test_wrong_value_says_what_was_given_and_what_is_allowed(assignment: str, says: str) -> None:
    error = refused(sets=[assignment])
    assert says in error.message
    assert error.hint


# files


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        load_config(tmp_path / "none.yaml")
    assert caught.value.exit_code == 4
    assert "is a folder" in refused(tmp_path).message


def test_shipped_config_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("dense").moe is None
    with pytest.raises(NotFoundError) as caught:
        load_config("desne")
    assert "'dense'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1\nb: 2\n", 2), ("train:\n\tsteps: 1\n", 2), ("train: {steps: 1\n", 2), ("a: b: c\n", 1)]
)
def test_broken_yaml_names_file_and_line(text: str, line: int, write: Write) -> None:
    file = write(text)
    assert refused(file).message.startswith(f"{file}, line {line}, column ")


def test_key_given_twice_is_refused(write: Write) -> None:
    assert (
        "line 4: 'train.steps' is given twice (first in line 2)"
        in refused(write("train:\n  steps: 1\n  seed: 3\n  steps: 2\n")).message
    )


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "3"])
def test_file_that_is_no_mapping(text: str, write: Write) -> None:
    assert "not a mapping" in refused(write(text)).message


def test_binary_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    assert "not UTF-8" in refused(file).message


def test_empty_file_is_the_defaults(write: Write) -> None:
    assert load_config(write("")) == ExperimentConfig()
    assert read_yaml(write("# only a comment\n")) == ({}, {})


def test_yaml_cannot_run_code(write: Write) -> None:
    assert "not valid YAML" in refused(write("name: !!python/object/apply:os.getcwd []\n")).message


# what comes out again


@pytest.mark.parametrize("name", [*PRESETS, None])
@pytest.mark.parametrize("only_set", [True, False])
def test_resolved_yaml_loads_back_to_the_same_config(name: str | None, only_set: bool, write: Write) -> None:
    config = load_config(None, preset=name, sets=["optim.lr=3e-4", "name=run-1"])
    again = load_config(write(resolved_yaml(config, only_set=only_set)))
    assert again == config
    assert again.content_hash() == config.content_hash()


SHIPPED = shipped_configs()


def test_the_presets_ship_as_files() -> None:
    assert set(PRESETS) <= set(SHIPPED)
    assert all(load_config(SHIPPED[name]).preset == name for name in PRESETS)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_parses_and_its_router_takes_its_options(name: str) -> None:
    from moectl.routers import resolve_router

    config = resolve_router(load_config(SHIPPED[name]))
    assert (config.moe is None) == (config.preset == "dense")


def test_shipped_pairs_are_comparable() -> None:
    for names in (("dense", "moe", "no-lb", "top2"), ("tiny-dense", "tiny-moe")):
        configs = [load_config(SHIPPED[name]) for name in names]
        for section in ("data", "model", "optim", "eval"):
            assert len({getattr(config, section).content_hash() for config in configs}) == 1
        assert len({(config.train.steps, config.train.seed, config.train.batch_size) for config in configs}) == 1


def test_a_router_flag_brings_its_own_options(tmp_path: Path) -> None:
    """The options in a file belong to the router that the file names; those without a name belong to any."""
    file = tmp_path / "a.yaml"
    file.write_text("moe: {router: {name: topk, top_k: 4, noise_std: 0.3}, num_experts: 16}\n", encoding="utf-8")
    other = load_config(file, overrides={"moe.router.name": "top2"}).moe
    assert other is not None and other.router == {"name": "top2"} and other.num_experts == 16
    same = load_config(file, overrides={"moe.router.name": "topk"}).moe
    assert same is not None and same.router == {"name": "topk", "top_k": 4, "noise_std": 0.3}
    quiet = load_config(None, preset="no-lb", overrides={"moe.router.name": "switch"}).moe
    assert quiet is not None and quiet.router == {"name": "switch", "noise_std": 0.0}


@pytest.mark.parametrize(
    ("preset", "router", "kind"),
    [
        ("dense", None, "dense"),
        ("moe", "top1", "moe"),
        ("moe", "sigmoid", "moe-sigmoid"),
        ("no-lb", "top1", "no-lb"),
        ("no-lb", "a/mine.py:Mine", "no-lb-Mine"),
        ("top2", "top2", "top2"),
        ("top2", "top1", "top2-top1"),
        ("dense", "top1", "dense-top1"),
        (None, "a/mine.py:Mine", "Mine"),
        (None, None, "dense"),
    ],
)
def test_a_run_is_called_by_its_preset_and_by_a_router_that_is_not_the_presets_own(
    preset: str | None, router: str | None, kind: str
) -> None:
    assert kind_of(preset, router) == kind

"""Any router by name, its options checked by its own ``Config``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moectl.config import load_config
from moectl.errors import ConfigError, NotFoundError
from moectl.plugins import BUILT_IN
from moectl.routers import RouterOptionError, build_router, describe_router, resolve_router

torch.set_num_threads(1)
CUSTOM = '''
from moectl.moe.router import RouterConfig
from moectl.routers.top1 import Top1Router


class Lucky(Top1Router):
    """Routes as top1 does, and has an option."""

    class Config(Top1Router.Config):
        luck: int = 7


class NotARouter:
    pass
'''


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_router_routes(name: str) -> None:
    router = build_router(name, hidden_size=16, num_experts=4)
    out = router(torch.randn(6, 16))
    assert router.weight.shape == (4, 16)
    assert out.topk_indices.shape == out.topk_weights.shape == (6, router.slots)
    assert router.top_k == (1 if name in ("top1", "switch") else 2)
    assert router.label == f"router '{name}'"


def test_top_k_is_taken_where_it_can_be_chosen() -> None:
    assert build_router("topk", hidden_size=16, num_experts=4, top_k=3).top_k == 3
    assert build_router("top1", hidden_size=16, num_experts=4, top_k=1).top_k == 1
    with pytest.raises(RouterOptionError, match="does not let top_k be chosen"):
        build_router("top1", hidden_size=16, num_experts=4, top_k=2)
    with pytest.raises(RouterOptionError):
        build_router("top2", hidden_size=16, num_experts=4, top_k=3)


def test_options_reach_the_router() -> None:
    router = build_router("topk", hidden_size=16, num_experts=4, norm_topk_prob=False, noise_std=0.3)
    assert router.config.model_dump()["norm_topk_prob"] is False
    assert router.config.model_dump()["noise_std"] == 0.3


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(RouterOptionError) as caught:
        build_router("topk", hidden_size=16, num_experts=4, norm_topk=False)
    assert "router 'topk': unknown option 'norm_topk'" in caught.value.message
    assert "Did you mean 'norm_topk_prob'?" in str(caught.value.hint)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "option", "owners"),
    [
        ("topk", "n_group", "router 'sigmoid'."),
        ("sigmoid", "noise_std", "routers 'top1', 'topk', 'top2', 'switch'."),
        ("top1", "threshold_decay", "router 'expert-choice-threshold'."),
        ("expert-choice", "expert_dropout", "routers 'top1', 'topk', 'top2', 'switch', 'noisy-topk', 'sigmoid'."),
    ],
)
def test_an_option_of_another_router_says_whose_it_is(name: str, option: str, owners: str) -> None:
    with pytest.raises(RouterOptionError) as caught:
        build_router(name, hidden_size=16, num_experts=4, **{option: 1})
    assert caught.value.message == f"router '{name}': unknown option '{option}'"
    assert caught.value.hint == f"'{option}' is an option of the {owners}"


def test_an_option_of_another_router_in_a_config() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_router(load_config(None, sets=["moe.router={name: topk, bias_update_rate: 0.01}"]))
    assert "'moe.router.bias_update_rate'" in caught.value.message
    assert caught.value.hint == "'bias_update_rate' is an option of the router 'sigmoid'."


def test_unknown_option_in_a_config_is_named_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_router(load_config(None, sets=["moe.router.noise=1"]))
    assert "'moe.router.noise'" in caught.value.message
    assert "'moe.router.noise_std'" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"noise_std": "loud"}, "noise_std = 'loud'"), ({"noise_std": -1.0}, "noise_std"), ({"top_k": 0}, "top_k = 0")],
)
def test_wrong_option_value(options: dict[str, object], says: str) -> None:
    with pytest.raises(RouterOptionError) as caught:
        build_router("topk", hidden_size=16, num_experts=4, **options)  # type: ignore[arg-type]
    assert says in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["topk", "noisy-topk", "sigmoid", "expert-choice", "expert-choice-threshold"])
def test_more_experts_per_token_than_experts(name: str) -> None:
    with pytest.raises(RouterOptionError, match=f"router '{name}': top_k is 5, but there are 4 experts"):
        build_router(name, hidden_size=16, num_experts=4, top_k=5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_expert_routes_but_is_not_trained(name: str) -> None:
    if name == "top2":
        with pytest.raises(RouterOptionError, match="there is 1 expert:"):
            build_router(name, hidden_size=16, num_experts=1)
        return
    options = {"top_k": 1} if "top_k" in describe_options(name) else {}
    router = build_router(name, hidden_size=16, num_experts=1, **options)
    assert not router.eval()(torch.randn(3, 16)).topk_indices.any()
    assert router.training_problem()


def describe_options(name: str) -> set[str]:
    return {option["name"] for option in describe_router(name)["options"]}


@pytest.mark.parametrize("name", BUILT_IN)
def test_balance_coefficient_is_the_routers_where_the_config_is_silent(name: str) -> None:
    """Those that balance without a loss say 0."""
    sets = [f"moe.router={name}"]
    config = resolve_router(load_config(None, sets=sets))
    silent = name in ("sigmoid", "expert-choice", "expert-choice-threshold")
    assert config.moe is not None
    assert config.moe.lb_coef == (0.0 if silent else 0.01)
    given = resolve_router(load_config(None, sets=[*sets, "moe.lb_coef=0.5"]))
    assert given.moe is not None
    assert given.moe.lb_coef == 0.5


def test_dense_config_has_no_router_to_resolve() -> None:
    dense = load_config(None, preset="dense")
    assert resolve_router(dense) is dense


def test_resolving_keeps_what_was_set() -> None:
    config = load_config(None, sets=["train.seed=1"])
    assert "data" not in resolve_router(config).model_fields_set
    assert resolve_router(resolve_router(config)) == resolve_router(config)


def test_router_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lucky.py"
    file.write_text(CUSTOM)
    router = build_router(f"{file}:Lucky", hidden_size=16, num_experts=4, luck=3)
    assert router(torch.randn(2, 3, 16)).topk_indices.shape == (6, 1)
    described = describe_router(f"{file}:Lucky")
    assert described["doc"] == "Routes as top1 does, and has an option."
    luck = next(option for option in described["options"] if option["name"] == "luck")
    assert (luck["type"], luck["default"]) == ("int", 7)
    with pytest.raises(ConfigError, match=r"not a subclass of moectl\.moe\.Router"):
        build_router(f"{file}:NotARouter", hidden_size=16, num_experts=4)


def test_unknown_router_and_file() -> None:
    with pytest.raises(ConfigError, match="unknown router 'top9'"):
        build_router("top9", hidden_size=16, num_experts=4)
    with pytest.raises(NotFoundError):
        build_router("nowhere.py:Mine", hidden_size=16, num_experts=4)


def test_abstract_router_is_refused_with_words(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text("from moectl.moe import Router\n\n\nclass Half(Router):\n    pass\n")
    with pytest.raises(RouterOptionError, match="route"):
        build_router(f"{file}:Half", hidden_size=16, num_experts=4)


def test_what_a_routers_own_code_gets_wrong_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    broken = """
class Raises(Lucky):
    def __init__(self, config, *, hidden_size, num_experts):
        raise KeyError("oops")


class Loose(Lucky):
    Config = dict
"""
    file.write_text(CUSTOM + broken)
    with pytest.raises(ConfigError, match=r"mine\.py:Raises' cannot be built: KeyError: 'oops'"):
        build_router(f"{file}:Raises", hidden_size=8, num_experts=4)
    with pytest.raises(ConfigError, match="Config of the router .* not a subclass of moectl.moe.RouterConfig"):
        build_router(f"{file}:Loose", hidden_size=8, num_experts=4)


def test_a_path_that_is_no_file_of_python_is_told_the_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_router(str(tmp_path), hidden_size=8, num_experts=4)
    assert "path/to/file.py:ClassName" in str(caught.value.hint)

"""A route() that returns what it must not is named, with the field, before anything else goes wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moectl.moe import Router, RouterOutput
from moectl.moe.contract import FORM, RouterError
from moectl.moe.router import entropy, stable_topk

D, E, T = 4, 3, 5
Spoil = Callable[[RouterOutput], object]


class Spoiled(Router):
    """A correct top-1 router, whose output a test then spoils."""

    spoil: Spoil = staticmethod(lambda out: out)

    def route(self, x_TD: Tensor, mask_T: Tensor | None) -> RouterOutput:
        logits = self.logits(x_TD)
        probs = logits.softmax(-1)
        chosen = stable_topk(logits, 1)
        out = RouterOutput(chosen, probs.gather(1, chosen), logits, probs, probs.clone(), entropy(probs))
        return self.spoil(out)  # type: ignore[return-value]


def spoiled(spoil: Spoil) -> Spoiled:
    torch.manual_seed(0)
    router = Spoiled(Spoiled.Config(), hidden_size=D, num_experts=E)
    router.spoil = spoil  # type: ignore[method-assign]
    router.label = "layer 3's router 'mine'"
    return router


def replacing(**fields: object) -> Spoil:
    """Fields replaced: by a value, or by what a function makes of them."""
    return lambda out: out._replace(**{k: v(getattr(out, k)) if callable(v) else v for k, v in fields.items()})


def message_of(spoil: Spoil, x: Tensor | None = None) -> str:
    with pytest.raises(RouterError) as caught:
        spoiled(spoil)(torch.randn(T, D) if x is None else x)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)
    return caught.value.message


def test_a_correct_output_passes_and_every_field_has_a_form() -> None:
    assert spoiled(lambda out: out)(torch.randn(T, D)).topk_indices.shape == (T, 1)
    assert set(FORM) == set(RouterOutput._fields)


@pytest.mark.parametrize("wrong", [None, torch.zeros(T, 1), "a tuple"], ids=lambda wrong: type(wrong).__name__)
def test_not_a_router_output(wrong: object) -> None:
    returned = ("a", "tuple") if wrong == "a tuple" else wrong
    assert message_of(lambda out: returned) == (
        f"layer 3's router 'mine': route() returned {type(returned).__name__}, not a RouterOutput"
    )


@pytest.mark.parametrize("field", [name for name in FORM if name != "keep"])
def test_wrong_shape_missing_tensor_and_wrong_dtype_name_the_field(field: str) -> None:
    cut = message_of(replacing(**{field: lambda value: value[:-1]}))
    assert f"'mine': route() returned {field} of shape ({T - 1}" in cut
    assert f"not ({T}," in cut
    assert f"T = {T}" in cut
    assert message_of(replacing(**{field: None})).endswith(f"route() returned {field} as NoneType, not a tensor")
    low = torch.int32 if field == "topk_indices" else torch.bfloat16
    wanted = "int64" if field == "topk_indices" else "float32 or float64"
    assert message_of(replacing(**{field: lambda value: value.to(low)})).endswith(f"{field} as {low}, not {wanted}")


def test_another_number_of_slots_is_explained() -> None:
    with pytest.raises(RouterError) as caught:
        spoiled(replacing(topk_indices=lambda chosen: chosen.expand(T, 2)))(torch.randn(T, D))
    assert "(5, 2), not (5, 1) (T = 5, K = 1)" in caught.value.message
    assert "Router.slots" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (torch.ones(T, 2, dtype=torch.bool), "keep of shape (5, 2), not (5, 1)"),
        (torch.ones(T, 1), "keep as torch.float32, not bool"),
        (True, "keep as bool, not a tensor"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_keep(keep: object, says: str) -> None:
    assert says in message_of(replacing(keep=keep))


@pytest.mark.parametrize("index", [-1, E, 1000])
def test_indices_out_of_range_padding_included(index: int) -> None:
    def last_out(chosen: Tensor) -> Tensor:
        return chosen.index_fill(0, torch.tensor([T - 1]), index)

    assert "topk_indices outside [0, 3)" in message_of(replacing(topk_indices=last_out))
    router = spoiled(replacing(topk_indices=last_out))
    with pytest.raises(RouterError, match="topk_indices"):
        router(torch.randn(T, D), torch.arange(T) < T - 1)


@pytest.mark.parametrize(
    ("field", "bad"),
    [("topk_weights", float("nan")), ("topk_weights", float("inf"))]
    + [(name, float("nan")) for name in ("router_logits", "router_probs", "router_probs_clean", "entropy")],
)
def test_values_that_are_not_numbers_name_the_field(field: str, bad: float) -> None:
    def spoil(value: Tensor) -> Tensor:
        value = value.clone()
        value.view(-1)[2] = bad
        return value

    assert f"'mine': route() returned {field} " in message_of(replacing(**{field: spoil}))


def test_minus_infinity_in_logits_is_a_router_s_right() -> None:
    """A router may close an expert with it."""
    router = spoiled(replacing(router_logits=lambda logits: logits.index_fill(1, torch.tensor([0]), -torch.inf)))
    assert router(torch.randn(T, D)).router_logits.isinf().any()


def test_an_unused_slot_carries_weight_zero_whatever_was_in_it() -> None:
    keep = torch.tensor([True, False, True, True, False])[:, None]
    weights = torch.tensor([0.5, float("nan"), 0.5, 0.5, 0.7])[:, None]
    router = spoiled(replacing(keep=keep, topk_weights=weights))
    assert router(torch.randn(T, D)).topk_weights[:, 0].tolist() == [0.5, 0.0, 0.5, 0.5, 0.0]


def test_a_nan_that_came_in_is_not_the_routers_doing() -> None:
    x = torch.randn(T, D)
    x[1] = float("nan")
    assert spoiled(lambda out: out)(x).topk_weights[1].isnan().all()
    router = spoiled(lambda out: out)
    with torch.no_grad():
        router.weight[1] = float("nan")
    assert router(torch.randn(T, D)).topk_weights.isnan().any()


def test_values_are_looked_at_once_in_training_and_once_in_eval_and_not_in_an_empty_batch() -> None:
    """The first step finds what only training does; afterwards nothing waits for the device."""
    nan = replacing(topk_weights=lambda weights: weights * float("nan"))
    router = spoiled(lambda out: out)
    router.eval()(torch.randn(T, D))
    router.spoil = nan  # type: ignore[method-assign]
    router(torch.randn(T, D))
    router.train()(torch.randn(0, D))
    with pytest.raises(RouterError):
        router(torch.randn(T, D))

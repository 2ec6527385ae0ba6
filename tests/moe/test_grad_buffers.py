"""Gradients into lasting buffers, in the hands of people who do with gradients what people do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.moe import Experts, GatedExperts
from moectl.moe.dispatch import Dispatch, dispatch
from tests.moe.reference import EXPERTS, HIDDEN, by_hand, make_experts

CHOSEN = torch.tensor([[0, 2], [2, 0], [2, 3], [3, 0], [0, 3]])  # expert 1 gets nothing


def plan(dtype: torch.dtype = torch.float64) -> Dispatch:
    return dispatch(by_hand(CHOSEN, torch.linspace(0.1, 0.9, 10, dtype=dtype).view(5, 2), 4))


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(kind: str = "gated", change: Callable[[Experts], Any] = lambda experts: None) -> list[Experts]:
    """The same experts twice: gradients through autograd, and into buffers."""
    both = [make_experts(kind, 4), make_experts(kind, 4)]
    for experts in both:
        change(experts)
    both[1].accumulate_gradients_in_place()
    return both


def same_gradients(one: nn.Module, other: nn.Module) -> None:
    """Adding to a product rounds once where adding the product rounds twice: 1e-13 of values of order one to ten."""
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(
                mine.grad, theirs.grad, rtol=0, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("kind", EXPERTS)
def test_backward_twice_through_one_graph(kind: str) -> None:
    both = pair(kind)
    for experts in both:
        out = experts(tokens(), plan())
        out.sum().backward(retain_graph=True)
        out.square().sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()
    same_gradients(*both)


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda grad: grad,
    "a view of it": lambda grad: grad[2:].flatten(),
    "what shares its memory": lambda grad: grad.detach(),
    "an array": lambda grad: grad.numpy(),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_a_gradient_that_someone_holds_is_not_overwritten(hold: str) -> None:
    experts = pair()[1]
    experts(tokens(), plan()).sum().backward()
    assert experts.down_proj.grad is not None
    place = experts.down_proj.grad.data_ptr()
    held = HOLDS[hold](experts.down_proj.grad)
    before = torch.as_tensor(held).clone()
    for _ in range(2):
        experts.zero_grad(set_to_none=True)
        experts(tokens(1), plan()).sum().backward()
        assert experts.down_proj.grad is not None and experts.down_proj.grad.data_ptr() != place
    assert torch.equal(torch.as_tensor(held), before)
    ordinary = pair()[0]
    ordinary(tokens(1), plan()).sum().backward()
    same_gradients(ordinary, experts)


def test_a_gradient_that_nobody_holds_is_overwritten() -> None:
    experts = pair("mlp")[1]
    places = []
    for seed in range(4):
        experts.zero_grad(set_to_none=True)
        experts(tokens(seed), plan()).sum().backward()
        places.append([parameter.grad.data_ptr() for parameter in experts.parameters() if parameter.grad is not None])
    assert places == [places[0]] * 4 and len(set(places[0])) == 4


@pytest.mark.parametrize(
    ("kind", "lonely"),
    [("gated", "gate_up_proj"), ("gated", "down_proj"), ("mlp", "down_proj"), ("mlp", "up_proj_bias")],
)
def test_only_one_parameter_learns_or_only_one_lost_its_gradient(kind: str, lonely: str) -> None:
    def freeze(experts: Experts) -> None:
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(name == lonely)

    both = pair(kind, freeze)
    for experts in both:
        experts(tokens(), plan()).sum().backward()
    same_gradients(*both)
    for experts in both:
        experts.requires_grad_(True)  # thawed half-way
        experts(tokens(1), plan()).sum().backward()
        getattr(experts, lonely).grad = None
        experts(tokens(2), plan()).sum().backward()
    same_gradients(*both)
    for experts in both:
        getattr(experts, lonely).requires_grad_(False)
        experts(tokens(3), plan()).sum().backward()
    same_gradients(*both)


@pytest.mark.parametrize("thaw", [False, True])
def test_a_parameter_must_require_its_gradient_in_the_forward_and_in_the_backward(thaw: bool) -> None:
    both = pair()
    for experts in both:
        experts.down_proj.requires_grad_(not thaw)
        out = experts(tokens(), plan())
        experts.down_proj.requires_grad_(thaw)
        out.sum().backward()
    same_gradients(*both)
    assert both[1].down_proj.grad is None and both[1].gate_up_proj.grad is not None


def test_a_gradient_may_have_any_strides() -> None:
    both = pair()
    for experts in both:
        experts.down_proj.grad = torch.ones(HIDDEN, 4, 5, dtype=torch.float64).transpose(0, 1)
        experts(tokens(), plan()).sum().backward()
        assert not experts.down_proj.grad.is_contiguous()
    same_gradients(*both)


@pytest.mark.parametrize("kind", EXPERTS)
def test_tensors_may_have_any_strides(kind: str) -> None:
    def scatter(experts: Experts) -> None:
        for parameter in experts.parameters():
            parameter.data = parameter.data.transpose(0, -1).contiguous().transpose(0, -1)
            assert not parameter.is_contiguous()

    straight, (through_autograd, buffered) = make_experts(kind, 4), pair(kind, scatter)
    x = tokens().t().contiguous().t()
    for experts in (straight, through_autograd, buffered):
        slope = torch.linspace(-1, 1, 5 * HIDDEN, dtype=torch.float64).view(HIDDEN, 5).t()
        experts(x, plan()).backward(slope)
    same_gradients(straight, buffered)
    same_gradients(straight, through_autograd)


class TwoLayers(nn.Module):
    """Two layers that share their parameters, or one of them."""

    def __init__(self, shared: tuple[str, ...], in_place: bool) -> None:
        super().__init__()
        self.first, self.second = make_experts("gated", 4, 0), make_experts("gated", 4, 1)
        for name in shared:
            setattr(self.second, name, getattr(self.first, name))
        for experts in (self.first, self.second):
            experts.accumulate_gradients_in_place(in_place)

    def forward(self, x: Tensor, order: int) -> Tensor:
        layers = [self.first, self.second][:: 1 - 2 * order]
        return layers[1](layers[0](x, plan()).tanh(), plan())


@pytest.mark.parametrize("shared", [(), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_layers_that_share_parameters(shared: tuple[str, ...]) -> None:
    """In one backward, whichever layer comes first; with a third use that goes through autograd."""
    both = [TwoLayers(shared, in_place) for in_place in (False, True)]
    for step in range(4):
        for model in both:
            model.zero_grad(set_to_none=True)
            penalty = model.first.down_proj.square().sum()
            (model(tokens(step), order=step % 2).square().sum() + penalty).backward()
        same_gradients(*both)


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"foreach": False}, {"foreach": True, "maximize": True, "amsgrad": True}],
    ids=str,
)
@pytest.mark.parametrize("set_to_none", [False, True])
def test_optimizers_and_a_loss_scale(options: dict[str, bool], set_to_none: bool) -> None:
    """Six steps of two micro-batches, the loss scaled up and gradients scaled down in place, clipped."""
    both = pair("mlp")
    for experts in both:
        optimizer = torch.optim.AdamW(experts.parameters(), lr=0.01, **options)
        for step in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            for micro in range(2):
                (1024.0 * experts(tokens(2 * step + micro), plan()).square().sum()).backward()
            for parameter in experts.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1 / 1024.0)
            torch.nn.utils.clip_grad_norm_(experts.parameters(), 1.0)
            optimizer.step()
    for one, other in zip(*(experts.parameters() for experts in both), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_gradients_of_another_dtype_than_the_activations() -> None:
    """float32 parameters under autocast: their gradients are float32, and go into the buffers."""
    both = [experts.float() for experts in pair()]
    for experts in both:
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = experts(tokens().float(), plan(torch.float32))
            assert out.dtype == torch.bfloat16
            out.float().sum().backward()
        experts.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            experts(tokens().float(), plan(torch.float32)).float().sum().backward()
        assert experts.down_proj.grad is not None and experts.down_proj.grad.dtype == torch.float32
    same_gradients(*both)
    buffers = both[1].grad_buffers
    assert buffers is not None and set(buffers._buffers) == {"up", "down"}


def through_pickle(experts: Experts) -> Experts:
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, GatedExperts)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, lambda experts: experts.share_memory()])
def test_copies_go_on_training_with_buffers_of_their_own(copied: Callable[[Experts], Experts]) -> None:
    ordinary, experts = pair()
    experts(tokens(), plan()).sum().backward()
    other = copied(experts)
    assert other.grad_buffers is not None
    assert other is experts or not other.grad_buffers._buffers
    other.zero_grad(set_to_none=True)
    kept = [parameter.grad.clone() for parameter in experts.parameters() if parameter.grad is not None]
    for model in (ordinary, other):
        model(tokens(1), plan()).sum().backward()
    same_gradients(ordinary, other)
    if other is not experts:
        assert all(
            torch.equal(before, parameter.grad)
            for before, parameter in zip(kept, experts.parameters(), strict=True)
            if parameter.grad is not None
        )


def test_a_saved_module_does_not_hold_its_gradients() -> None:
    sizes = []
    for experts in pair():
        experts(tokens(), plan()).sum().backward()
        file = io.BytesIO()
        torch.save(experts, file)
        sizes.append(file.tell())
    assert sizes[1] < sizes[0] + 1000

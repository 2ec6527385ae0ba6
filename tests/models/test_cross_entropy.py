"""The chunked loss against ``F.cross_entropy`` on whole logits, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moectl.models import cross_entropy
from moectl.models.cross_entropy import IGNORED, linear_cross_entropy

FLOAT64 = 1e-12  # sums of a few dozen terms of order one, added chunk by chunk instead of at once


def whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.t(), labels, ignore_index=IGNORED, reduction="sum")


def problem(
    rows: int, vocabulary: int, hidden: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


@given(
    ignored=st.lists(st.booleans(), max_size=70),
    vocabulary=st.integers(1, 40),
    chunk=st.sampled_from([1, 100, 1 << 19]),
)
def test_equals_cross_entropy(ignored: list[bool], vocabulary: int, chunk: int) -> None:
    """From no row to several chunks of at least 16 with a ragged last one, any rows not scored."""
    x, weight, labels = problem(len(ignored), vocabulary)
    labels[torch.tensor(ignored, dtype=torch.bool)] = IGNORED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
        mine = linear_cross_entropy(x, weight, labels)
        grads = torch.autograd.grad(3.0 * mine, (x, weight))
    reference = whole(x, weight, labels)
    torch.testing.assert_close(mine, reference, rtol=FLOAT64, atol=FLOAT64)
    for one, other in zip(grads, torch.autograd.grad(3.0 * reference, (x, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64)
    assert not grads[0][torch.tensor(ignored, dtype=torch.bool)].any()


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_scored_is_zero_with_zero_gradients(rows: int) -> None:
    x, weight, labels = problem(rows, 7)
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORED))
    assert loss.item() == 0.0
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert not grad.any()


def test_gradcheck() -> None:
    x, weight, labels = problem(6, 4)
    labels[2] = IGNORED
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), (x, weight))


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    """A frozen embedding, or hidden states that are data."""
    x, weight, labels = problem(9, 4)
    leaves = (x, weight)
    leaves[1 - wanted].requires_grad_(False)
    (mine,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), leaves[wanted])
    (theirs,) = torch.autograd.grad(whole(x, weight, labels), leaves[wanted])
    torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64)


def test_backward_twice_over_a_kept_graph() -> None:
    x, weight, labels = problem(5, 4)
    loss = linear_cross_entropy(x, weight, labels)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_tied_weight_gets_both_gradients() -> None:
    """The output embedding is the input embedding: what both uses ask of it is added."""
    _, weight, labels = problem(6, 4)
    ids = torch.tensor([0, 1, 2, 3, 0, 1])
    (mine,) = torch.autograd.grad(linear_cross_entropy(weight[ids], weight, labels), weight)
    (theirs,) = torch.autograd.grad(whole(weight[ids], weight, labels), weight)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64)


def test_float32_agrees_to_rounding() -> None:
    """2⁻²⁴ per operation over 300 rows of 500 logits: a relative 1e-5 (of the largest gradient entry) is rounding."""
    x, weight, labels = problem(300, 500, hidden=16, dtype=torch.float32)
    mine, reference = linear_cross_entropy(x, weight, labels), whole(x, weight, labels)
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=0)
    for one, other in zip(
        torch.autograd.grad(mine, (x, weight)), torch.autograd.grad(reference, (x, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_autocast_projects_in_bfloat16_and_scores_in_float32() -> None:
    """Equal to the same rounding written out: bfloat16 logits, float32 softmax. Gradients round to 8 bits: 2 %."""
    x, weight, labels = problem(40, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = linear_cross_entropy(x, weight, labels)
        reference = F.cross_entropy((x @ weight.t()).float(), labels, reduction="sum")
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, reference, rtol=1e-6, atol=0)
    for one, other in zip(
        torch.autograd.grad(mine, (x, weight)), torch.autograd.grad(reference, (x, weight)), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())


def test_autocast_spares_float64() -> None:
    x, weight, labels = problem(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = linear_cross_entropy(x, weight, labels)
    assert mine.dtype == torch.float64
    torch.testing.assert_close(mine, whole(x, weight, labels), rtol=FLOAT64, atol=0)


def test_a_bfloat16_model_sums_in_float32() -> None:
    """1,000 rows of about ln 2 each: a bfloat16 sum would stop growing at 256."""
    x = torch.zeros(1000, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.zeros(1000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(693.147, rel=1e-5)
    for grad, leaf in zip(torch.autograd.grad(loss, (x, weight)), (x, weight), strict=True):
        assert grad.dtype == leaf.dtype == torch.bfloat16


def test_huge_logits_stay_finite() -> None:
    x = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    assert linear_cross_entropy(x, weight, torch.tensor([0])).item() == 0.0
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.item() == 2e4
    for grad in torch.autograd.grad(loss, (x, weight)):
        assert grad.isfinite().all()


def test_nan_is_not_healed() -> None:
    x, weight, labels = problem(3, 4)
    with torch.no_grad():
        x[1, 0] = torch.nan
    assert linear_cross_entropy(x, weight, labels).isnan()


@pytest.mark.parametrize("label", [4, -1])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    x, weight, _ = problem(2, 4)
    with pytest.raises(IndexError):
        linear_cross_entropy(x, weight, torch.tensor([0, label]))


class Sizes(TorchDispatchMode):
    """Watches every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "mm" in name:
            self.products.append(name)
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_whole_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 16 * 50)
    x, weight, labels = problem(640, 50)
    with Sizes() as sizes:
        torch.autograd.grad(linear_cross_entropy(x, weight, labels), (x, weight))
    assert sizes.largest == max(16 * 50, 640 * 5), "a chunk of logits, or the hidden states"
    with Sizes() as sizes:
        torch.autograd.grad(whole(x, weight, labels), (x, weight))
    assert sizes.largest == 640 * 50


def test_without_grad_no_gradient_is_computed() -> None:
    """Evaluation pays for one product, not for three."""
    x, weight, labels = problem(10, 4)
    with torch.no_grad(), Sizes() as sizes:
        linear_cross_entropy(x, weight, labels)
    assert len(sizes.products) == 1
    with Sizes() as sizes:
        linear_cross_entropy(x, weight, labels)
    assert len(sizes.products) == 3

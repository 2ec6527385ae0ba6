"""Grouped products against one ``F.linear`` per expert, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moectl.moe.grouped import grouped_linear, swiglu
from tests.moe.reference import gradients

FLOAT64 = 1e-13  # sums of at most a dozen products of order one
counts_strategy = st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=6)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def problem(counts: list[int], outputs: int = 3, inputs: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    experts = len(counts)
    return [
        leaf(sum(counts), inputs, dtype=dtype),
        leaf(experts, outputs, inputs, dtype=dtype),
        leaf(experts, outputs, dtype=dtype),
    ]


def one_by_one(x: Tensor, weight: Tensor, counts: list[int], bias: Tensor | None) -> Tensor:
    rows = x.split(counts)
    return torch.cat([F.linear(rows[e], weight[e], None if bias is None else bias[e]) for e in range(len(counts))])


@given(counts_strategy, st.booleans())
def test_equals_one_linear_per_expert(counts: list[int], with_bias: bool) -> None:
    x, weight, bias = problem(counts)
    leaves = [x, weight, bias] if with_bias else [x, weight]
    used_bias = bias if with_bias else None
    fast = grouped_linear(x, weight, torch.tensor(counts), used_bias)
    torch.testing.assert_close(fast, one_by_one(x, weight, counts, used_bias), rtol=0, atol=FLOAT64)
    ours = gradients(lambda: grouped_linear(x, weight, torch.tensor(counts), used_bias), *leaves)
    reference = gradients(lambda: one_by_one(x, weight, counts, used_bias), *leaves)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 4], [4, 0], [1], [0, 0]])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(counts: list[int], with_bias: bool) -> None:
    x, weight, bias = problem(counts)
    counts_E = torch.tensor(counts)
    if with_bias:
        assert torch.autograd.gradcheck(lambda x, w, b: grouped_linear(x, w, counts_E, b), (x, weight, bias))
    else:
        assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts_E), (x, weight))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradient_of_one_input_alone(wanted: str) -> None:
    """Frozen experts, or a frozen model with trainable biases: only what is asked for is computed, and right."""
    names = ("x", "weight", "bias")
    counts = [2, 0, 3]
    leaves = dict(zip(names, problem(counts), strict=True))
    for name in names:
        leaves[name].requires_grad_(name == wanted)
    mine = gradients(
        lambda: grouped_linear(leaves["x"], leaves["weight"], torch.tensor(counts), leaves["bias"]), leaves[wanted]
    )
    theirs = gradients(lambda: one_by_one(leaves["x"], leaves["weight"], counts, leaves["bias"]), leaves[wanted])
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("counts", [[2, 0, 3, 0], [0, 0, 0], [0, 5, 0]])
def test_an_expert_without_rows_gets_zero_gradients(counts: list[int], poisoned_memory: None) -> None:
    """Buffers are not cleared when made, and hold NaN here: whatever is left unwritten would show."""
    x, weight, bias = problem(counts)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(
        grouped_linear(x, weight, torch.tensor(counts), bias).square().sum(), (x, weight, bias)
    )
    assert grad_x.isfinite().all()
    for expert, count in enumerate(counts):
        for grad in (grad_weight[expert], grad_bias[expert]):
            assert grad.isfinite().all()
            assert bool(grad.any()) == (count > 0)


def test_strided_input_and_strided_gradient() -> None:
    """The gated expert hands in halves of a wider tensor, and takes back gradients that are expanded."""
    counts = [3, 2]
    wide = leaf(5, 8)
    weight = leaf(2, 3, 4)
    mine = torch.autograd.grad(grouped_linear(wide[:, ::2], weight, torch.tensor(counts)).sum(), (wide, weight))
    theirs = torch.autograd.grad(one_by_one(wide[:, ::2], weight, counts, None).sum(), (wide, weight))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64)


def test_transposed_weight() -> None:
    counts, x, storage = [1, 2], leaf(3, 4), leaf(2, 4, 3)
    mine = torch.autograd.grad(
        grouped_linear(x, storage.transpose(1, 2), torch.tensor(counts)).square().sum(), (x, storage)
    )
    theirs = torch.autograd.grad(one_by_one(x, storage.transpose(1, 2), counts, None).square().sum(), (x, storage))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64)


def test_counts_that_do_not_cover_the_rows_are_refused() -> None:
    """Rows of no expert would come back as whatever the memory held."""
    x, weight, _ = problem([2, 2])
    with pytest.raises(AssertionError, match="uninitialised"):
        grouped_linear(x, weight, torch.tensor([2, 1]))


def test_autocast_lowers_like_linear_does() -> None:
    """bfloat16 output, bit-equal to F.linear under autocast; gradients come back in the parameters' float32."""
    counts = [3, 0, 4]
    x, weight, bias = problem(counts, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = grouped_linear(x, weight, torch.tensor(counts), bias)
        slow = one_by_one(x, weight, counts, bias)
    assert fast.dtype == torch.bfloat16
    assert torch.equal(fast, slow)
    for grad in torch.autograd.grad(fast.float().sum(), (x, weight, bias)):
        assert grad.dtype == torch.float32


def test_autocast_spares_float64_like_linear_does() -> None:
    x, weight, bias = problem([3, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = grouped_linear(x, weight, torch.tensor([3, 2]), bias)
        slow = one_by_one(x, weight, [3, 2], bias)
    assert fast.dtype == slow.dtype == torch.float64
    torch.testing.assert_close(fast, slow, rtol=0, atol=FLOAT64)


def swiglu_as_written(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_swiglu_has_the_bits_of_silu_times_up(dtype: torch.dtype, rows: int, poisoned_memory: None) -> None:
    """Forward and backward; and its input, which the backward reads again, is left as it was."""
    gate_up = (4 * torch.randn(rows, 10)).to(dtype).requires_grad_()
    before, upstream = gate_up.detach().clone(), torch.randn(rows, 5).to(dtype)
    mine, theirs = swiglu(gate_up), swiglu_as_written(gate_up)
    assert torch.equal(mine, theirs)
    for _ in range(2):  # the second time over a kept graph
        grads = [torch.autograd.grad(out, gate_up, upstream, retain_graph=True)[0] for out in (mine, theirs)]
        assert torch.equal(*grads)
    assert torch.equal(gate_up.detach(), before)


def test_swiglu_gradcheck_and_expanded_gradients() -> None:
    gate_up = leaf(3, 8)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
    (mine,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)  # a gradient of stride 0
    (theirs,) = torch.autograd.grad(swiglu_as_written(gate_up).sum(), gate_up)
    assert torch.equal(mine, theirs)


@cuda
@pytest.mark.parametrize("counts", [[16, 0, 40, 8], [0, 0, 64, 0], [3, 5, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("with_bias", [True, False])
def test_cuda_kernel_agrees_with_float32(counts: list[int], with_bias: bool) -> None:
    """bfloat16 keeps 8 bits: outputs of order √64 differ by up to 2⁻⁸ of themselves, sums of gradients likewise.

    Experts without rows must get exact zeros (some kernels leave their slice of the gradient unwritten).
    """
    x, weight, bias = (
        tensor.detach().cuda().bfloat16().requires_grad_() for tensor in problem(counts, 32, 64, torch.float32)
    )
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, weight, bias)]
    poison = torch.full_like(weight, torch.nan)  # so that reused memory is not zero by luck
    del poison
    counts_E = torch.tensor(counts, device="cuda")
    fast = grouped_linear(x, weight, counts_E, bias if with_bias else None)
    slow = one_by_one(exact[0], exact[1], counts, exact[2] if with_bias else None)
    torch.testing.assert_close(fast.float(), slow, rtol=2**-7, atol=2**-4)
    leaves = 3 if with_bias else 2
    mine = torch.autograd.grad(fast.float().square().sum(), (x, weight, bias)[:leaves])
    theirs = torch.autograd.grad(slow.square().sum(), exact[:leaves])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-5, atol=2**-5 * float(other.abs().max() + 1))
    for expert, count in enumerate(counts):
        if count == 0:
            assert not mine[1][expert].any()

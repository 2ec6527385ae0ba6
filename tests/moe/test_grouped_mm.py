"""The GPU's way, with torch's own CPU implementation of the grouped product, which leaves unused rows unwritten too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from moectl.moe import Experts, GatedExperts
from moectl.moe.dispatch import Dispatch, dispatch
from moectl.moe.expert_ops import Plan, Weights
from moectl.moe.grouped_mm import ByRow, GroupedMM, compute_grouped_mm, grouped_mm_takes
from tests.moe.reference import EXPERTS, by_hand

D, INNER = 64, 32
CHOSEN = torch.tensor([[0, 2], [2, 0], [2, 3], [3, 0], [0, 3]] * 8)  # expert 1 gets nothing
BITS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # four products deep


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no group covers hold NaN, as memory fresh from a GPU may; and so do gradients of empty groups."""
    real = F.grouped_mm

    def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        assert offs.dtype == torch.int32
        for operand in (a, b):  # rows or columns next to each other, and a whole number of 16 bytes apart
            far, near = sorted(operand.stride()[-2:], reverse=True)
            assert near == 1 and far * operand.element_size() % 16 == 0 and operand.data_ptr() % 16 == 0
        out = real(a, b, offs=offs)
        if b.dim() == 3:
            return torch.cat([out[: int(offs[-1])], torch.full_like(out[int(offs[-1]) :], torch.nan)])
        sizes = torch.diff(offs, prepend=offs.new_zeros(1))
        return out.masked_fill((sizes == 0)[:, None, None], torch.nan)

    monkeypatch.setattr(F, "grouped_mm", grouped_mm)


def make(kind: str, dtype: torch.dtype, experts: int = 4) -> Experts:
    torch.manual_seed(0)
    made = EXPERTS[kind](experts, D, INNER, backend="loop")
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.to(dtype)


def routes(plan: Dispatch) -> Plan:
    return Plan(plan.token_ids, plan.weights, plan.tokens_per_expert)


def both(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    slope = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * slope).sum(), leaves)]


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("keep", ["all", "some", "none"])
def test_equals_the_loop_in_float64(kind: str, keep: str, dtype: torch.dtype, unwritten_is_nan: None) -> None:
    """Output and every gradient, an expert without tokens, unused slots with NaN weights."""
    experts = make(kind, dtype)
    exact = make(kind, torch.float64)
    exact.load_state_dict(experts.state_dict())
    used = {"all": None, "some": torch.rand(40, 2) > 0.3, "none": torch.zeros(40, 2, dtype=torch.bool)}[keep]
    x, weights = torch.randn(40, D).to(dtype).requires_grad_(), torch.rand(40, 2).requires_grad_()
    exact_x, exact_weights = (leaf.detach().double().requires_grad_() for leaf in (x, weights))
    plan = dispatch(by_hand(CHOSEN, weights, 4, used))
    unused = torch.arange(80) >= plan.tokens_per_expert.sum()
    poisoned = routes(plan)._replace(weights=plan.weights.masked_fill(unused, torch.nan))
    mine = both(
        compute_grouped_mm(x, experts.stacked(), poisoned, experts.activation), (x, weights, *experts.parameters())
    )
    reference = both(
        exact(exact_x, dispatch(by_hand(CHOSEN, exact_weights, 4, used))),
        (exact_x, exact_weights, *exact.parameters()),
    )
    assert mine[0].dtype == dtype
    for one, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * BITS[dtype] * other.abs().max().item())


@pytest.mark.parametrize("kind", EXPERTS)
def test_combine_weights_of_unused_slots_get_no_gradient(kind: str, unwritten_is_nan: None) -> None:
    experts, keep = make(kind, torch.bfloat16), torch.arange(80).view(40, 2) % 3 > 0
    plan = dispatch(by_hand(CHOSEN, torch.rand(40, 2), 4, keep))
    used = int(plan.tokens_per_expert.sum())
    weights = torch.cat([plan.weights[:used], torch.full((80 - used,), torch.nan)]).requires_grad_()
    x = torch.randn(40, D, dtype=torch.bfloat16)
    compute_grouped_mm(
        x, experts.stacked(), routes(plan)._replace(weights=weights), experts.activation
    ).sum().backward()
    assert weights.grad is not None
    assert weights.grad[:used].all() and not weights.grad[used:].any()


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float32_parameters_under_bfloat16_activations(kind: str, weight_dtype: torch.dtype) -> None:
    """Autocast: parameters are cast on the way, and get their gradients in their own dtype."""
    experts, x = make(kind, torch.float32), torch.randn(40, D, dtype=torch.bfloat16)
    plan = dispatch(by_hand(CHOSEN, torch.rand(40, 2, dtype=weight_dtype), 4))
    out = compute_grouped_mm(x, experts.stacked(), routes(plan), experts.activation)
    reference = experts(x.float(), plan._replace(weights=plan.weights.float()))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference, rtol=0, atol=0.03 * reference.detach().abs().max().item())
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in experts.parameters())


def test_bias_gradients_of_many_rows_are_summed_in_float32(unwritten_is_nan: None) -> None:
    """Two thousand ones: a sum in bfloat16 stops at 256."""
    counts = torch.tensor([0, 2000, 0, 40])
    bias = torch.randn(4, 16, dtype=torch.bfloat16).requires_grad_()
    rows = ByRow.apply(bias, counts, 2048)
    assert torch.equal(rows[:2000], bias[1].expand(2000, -1)) and torch.equal(rows[2000:2040], bias[3].expand(40, -1))
    (grad,) = torch.autograd.grad(rows.sum(), bias)
    assert torch.equal(grad, counts[:, None].expand(4, 16).to(torch.bfloat16))


def test_the_product_by_itself(unwritten_is_nan: None) -> None:
    """A gradient with stride 0, and a weight that needs none."""
    torch.manual_seed(0)
    x, weight, counts = torch.randn(20, 8).requires_grad_(), torch.randn(3, 16, 8).requires_grad_(), [7, 0, 9]
    groups = torch.tensor([0] * 7 + [2] * 9)
    out = GroupedMM.apply(x, weight, torch.tensor(counts))[:16]
    reference = torch.einsum("ai,aoi->ao", x[:16], weight[groups])
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-5)
    grads = torch.autograd.grad(out.sum(), (x, weight), retain_graph=True)
    expected = torch.autograd.grad(reference.sum(), (x, weight))
    torch.testing.assert_close(grads[0][:16], expected[0][:16], rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[1], expected[1], rtol=0, atol=1e-5)
    all_rows = GroupedMM.apply(x[:16], weight, torch.tensor(counts))
    for mine, reference in zip(torch.autograd.grad(all_rows.sum(), (x, weight)), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5)
    frozen = GroupedMM.apply(x, weight.detach(), torch.tensor(counts))[:16]
    assert torch.equal(torch.autograd.grad(frozen.sum(), x)[0][:16], grads[0][:16])


@pytest.mark.parametrize("kind", EXPERTS)
def test_compiles_whole_for_all_token_counts(kind: str) -> None:
    """In bfloat16: torch compiles no other grouped product."""
    torch._dynamo.reset()
    experts = make(kind, torch.bfloat16)

    def call(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        plan = dispatch(by_hand(indices, weights, 4))
        return compute_grouped_mm(x, experts.stacked(), routes(plan), experts.activation)

    def run(run_it: Callable[..., Tensor], tokens: int) -> list[Tensor]:
        torch.manual_seed(tokens)
        x = torch.randn(tokens, D, dtype=torch.bfloat16).requires_grad_()
        weights = torch.rand(tokens, 2).requires_grad_()
        out = run_it(x, weights, CHOSEN[:tokens])
        return both(out, (x, weights, *experts.parameters()))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for tokens in (3, 5, 8, 13, 21, 34):
        for one, other in zip(run(compiled, tokens), run(call, tokens), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2.0**-6 * other.abs().max().item())
    assert counter.frame_count <= 2
    torch._dynamo.reset()


class _OnCuda(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float16}, False),
        ({"tokens": 0}, False),
        ({"hidden": 60}, False),
        ({"inner": 20}, False),
        ({"experts": 1023, "hidden": 8, "inner": 8}, True),
        ({"experts": 1024, "hidden": 8, "inner": 8}, False),
    ],
)
def test_what_the_kernel_takes(change: dict[str, object], taken: bool) -> None:
    shape = {"tokens": 4, "hidden": 64, "inner": 32, "experts": 4, "dtype": torch.bfloat16, **change}
    experts = GatedExperts(shape["experts"], shape["hidden"], shape["inner"]).to(shape["dtype"])
    x = torch.randn(shape["tokens"], shape["hidden"], dtype=shape["dtype"])
    assert not grouped_mm_takes(x, experts.stacked())
    assert grouped_mm_takes(x.as_subclass(_OnCuda), experts.stacked()) is taken


def test_weights_at_odd_places_are_not_taken() -> None:
    x = torch.randn(4, 64, dtype=torch.bfloat16).as_subclass(_OnCuda)
    flat = torch.zeros(1 + 4 * 64 * 64, dtype=torch.bfloat16)
    square = torch.zeros(4, 64, 64, dtype=torch.bfloat16)
    assert grouped_mm_takes(x, Weights(square, square))
    assert not grouped_mm_takes(x, Weights(flat[1:].view(4, 64, 64), square))
    assert not grouped_mm_takes(x, Weights(square, square.transpose(1, 2)))

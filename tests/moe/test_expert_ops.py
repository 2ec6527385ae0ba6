"""The operator by itself: what torch asks of one, gradients one by one, and gradients into lasting buffers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moectl.moe import Experts, MLPExperts, expert_ops, products
from moectl.moe.dispatch import Dispatch, dispatch
from moectl.moe.expert_ops import experts_op
from tests.moe.reference import EXPERTS, HIDDEN, Case, by_hand, cases, gradients, make_experts, mixture_by_token

CHOSEN = [[0, 2], [2, 0], [2, 3], [3, 0], [0, 3]]  # expert 1 gets nothing


def problem(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Experts, Tensor, Dispatch]:
    experts = make_experts(kind, 4).to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, HIDDEN, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(5, 2, dtype=exact, generator=generator).requires_grad_()
    return experts, x, dispatch(by_hand(torch.tensor(CHOSEN), weights, 4))


def operands(experts: Experts, x: Tensor, plan: Dispatch) -> tuple[object, ...]:
    up, down, up_bias, down_bias = experts.stacked()
    routes = (plan.token_ids, plan.weights.detach().requires_grad_(), plan.tokens_per_expert)
    return (x, up, down, up_bias, down_bias, *routes, experts.activation, True)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_finds_nothing_wrong_with_the_operator(kind: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake implementation, and compilation with dynamic shapes."""
    torch.library.opcheck(experts_op, operands(*problem(kind, dtype)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", EXPERTS)
def test_gradcheck(kind: str) -> None:
    experts, x, plan = problem(kind)
    arguments = operands(experts, x, plan)
    assert torch.autograd.gradcheck(lambda *args: experts_op(*args)[0], arguments)


@pytest.mark.parametrize("kind", EXPERTS)
def test_only_the_gradients_that_are_wanted(kind: str) -> None:
    """Frozen experts, or all but one frozen: the others are what they would be, and no one else's is made."""
    experts, x, plan = problem(kind)
    names = ["x", *(name for name, _ in experts.named_parameters())]
    leaves = {"x": x, **dict(experts.named_parameters())}
    everything = dict(zip(names, gradients(lambda: experts(x, plan), *leaves.values()), strict=True))
    frozen = dispatch(by_hand(torch.tensor(CHOSEN), plan.weights.new_zeros(5, 2).fill_(0.5), 4))
    reference = gradients(lambda: experts(x, frozen), *leaves.values())
    assert any(not torch.equal(one, other) for one, other in zip(everything.values(), reference, strict=True))
    for wanted, expected in zip(names, reference, strict=True):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        torch.testing.assert_close(
            gradients(lambda: experts(x, frozen), leaves[wanted])[0], expected, rtol=0, atol=1e-13
        )


@pytest.mark.parametrize(
    ("rows", "batches"), [(1, [[0], [2], [3]]), (6, [[0], [2, 3]]), (7, [[0, 2], [3]]), (99, [[0, 2, 3]])]
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_that_share_a_batch(
    kind: str, in_place: bool, rows: int, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together or each for itself, forward and every gradient agree with the loop; experts have 4, 0, 3 and 3 rows."""
    experts, x, plan = problem(kind)
    assert plan.tokens_per_expert.tolist() == [4, 0, 3, 3]
    assert [batch.experts for batch in expert_ops.Plan(*plan[:1], *plan[2:4]).batches(rows)] == batches
    monkeypatch.setattr(expert_ops, "CACHED", rows * max(experts.stacked().up.shape[1:]))
    weights = plan.weights.detach().requires_grad_()
    leaves, found = (x, weights, *experts.parameters()), []
    for backend in ("loop", "grouped"):
        experts.backend = backend
        experts.accumulate_gradients_in_place(in_place)
        for leaf in leaves:
            leaf.grad = None
        out = experts(x, plan._replace(weights=weights))
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(leaves) + 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_with_stride_zero(in_place: bool) -> None:
    experts, x, plan = problem("gated")
    experts.accumulate_gradients_in_place(in_place)
    experts(x, plan).sum().backward(retain_graph=True)
    expanded = [parameter.grad.clone() for parameter in experts.parameters() if parameter.grad is not None]
    experts.zero_grad()
    experts(x, plan).backward(torch.ones(5, HIDDEN, dtype=torch.float64))
    assert len(expanded) == 2
    for one, parameter in zip(expanded, experts.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(one, parameter.grad)


@pytest.mark.parametrize("in_place", [False, True])
def test_no_second_derivative_is_invented(in_place: bool) -> None:
    experts, x, plan = problem("gated")
    experts.accumulate_gradients_in_place(in_place)
    (first,) = torch.autograd.grad(experts(x, plan).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), x)


def test_rows_of_unused_slots_may_hold_anything() -> None:
    """Padding, and what capacity dropped: at the end, never read, and without a gradient."""
    experts, x, _ = problem("gated")
    keep = torch.tensor([[True, False], [True, True], [False, False], [True, True], [True, False]])
    weights = torch.rand(5, 2, dtype=torch.float64).masked_fill(~keep, 0.0)
    routing = by_hand(torch.tensor(CHOSEN), weights, 4, keep)
    plan = dispatch(routing)
    poisoned = plan._replace(weights=plan.weights.clone())
    poisoned.weights[int(plan.tokens_per_expert.sum()) :] = torch.nan
    poisoned.weights.requires_grad_()
    out = experts(x, poisoned)
    torch.testing.assert_close(out, mixture_by_token(x, routing, experts), rtol=0, atol=1e-13)
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert poisoned.weights.grad is not None
    assert not poisoned.weights.grad[int(plan.tokens_per_expert.sum()) :].any()


@given(case=cases(), kind=st.sampled_from(sorted(EXPERTS)), steps=st.integers(1, 3))
def test_buffers_hold_what_autograd_gives(case: Case, kind: str, steps: int) -> None:
    """Two rounds of ``steps`` micro-batches each, bit for bit: what the first leaves behind must not show."""
    ordinary = make_experts(kind, case.num_experts, case.seed)
    buffered = copy.deepcopy(ordinary)
    buffered.accumulate_gradients_in_place()
    for _ in range(2):
        for experts in (ordinary, buffered):
            experts.zero_grad(set_to_none=True)
            torch.manual_seed(case.seed)
            for _ in range(steps):
                x = torch.randn(case.num_tokens, HIDDEN, dtype=torch.float64)
                gradient = torch.randn(case.num_tokens, HIDDEN, dtype=torch.float64)
                experts(x, dispatch(case.routing())).backward(gradient)
        for one, other in zip(ordinary.parameters(), buffered.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None
            # addmm_ rounds the sum of product and buffer once, autograd's product and sum twice.
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0 if steps == 1 else 1e-13)


def test_buffers_are_taken_again_after_zero_grad_and_not_when_grad_is_someone_elses() -> None:
    experts, x, plan = problem("gated")
    experts.accumulate_gradients_in_place()
    experts(x, plan).sum().backward(retain_graph=True)
    assert experts.down_proj.grad is not None
    first = experts.down_proj.grad.data_ptr()
    experts.zero_grad(set_to_none=True)
    experts(x, plan).sum().backward(retain_graph=True)
    assert experts.down_proj.grad is not None
    assert experts.down_proj.grad.data_ptr() == first
    once = experts.down_proj.grad.clone()
    own = torch.ones_like(once)
    experts.down_proj.grad = own
    experts(x, plan).sum().backward()
    assert experts.down_proj.grad is own
    torch.testing.assert_close(own, 1 + once, rtol=0, atol=1e-13)


def test_gradients_go_through_autograd_unless_asked_otherwise() -> None:
    experts, x, plan = problem("gated")
    grads = torch.autograd.grad(experts(x, plan).sum(), list(experts.parameters()))
    assert all(grad.any() for grad in grads)
    assert all(parameter.grad is None for parameter in experts.parameters())


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_parameters_with_hooks_take_the_ordinary_way(register: str) -> None:
    experts, x, plan = problem("gated")
    experts.accumulate_gradients_in_place()
    seen: list[Tensor] = []
    getattr(experts.down_proj, register)(lambda tensor: seen.append(tensor) and None)
    experts(x, plan).sum().backward()
    assert len(seen) == 1
    assert experts.down_proj.grad is not None and experts.gate_up_proj.grad is not None


def test_buffers_follow_a_change_of_dtype_and_stay_out_of_copies() -> None:
    experts, x, plan = problem("gated")
    plan = plan._replace(weights=plan.weights.detach())
    experts.accumulate_gradients_in_place()
    experts(x, plan).sum().backward()
    copied = copy.deepcopy(experts)
    file = io.BytesIO()
    torch.save(experts.state_dict(), file)
    assert file.tell() < 3 * sum(p.numel() * p.element_size() for p in experts.parameters()) + 4096
    copied.zero_grad(set_to_none=True)
    assert experts.down_proj.grad is not None
    copied(x, plan).sum().backward()
    assert copied.down_proj.grad is not None and experts.down_proj.grad is not None
    assert copied.down_proj.grad.data_ptr() != experts.down_proj.grad.data_ptr()
    experts.zero_grad(set_to_none=True)
    experts.float()
    experts(x.float().detach(), plan._replace(weights=plan.weights.float())).sum().backward()
    assert experts.down_proj.grad.dtype == torch.float32


def test_training_with_buffers_is_training() -> None:
    """Five steps of AdamW over two micro-batches each, clipped: the same weights to rounding."""
    finals = []
    for in_place in (False, True):
        experts = make_experts("mlp", 4)
        experts.accumulate_gradients_in_place(in_place)
        optimizer = torch.optim.AdamW(experts.parameters(), lr=0.01)
        torch.manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(2):
                indices = torch.randint(0, 4, (9, 1))
                plan = dispatch(by_hand(indices, torch.rand(9, 1, dtype=torch.float64), 4))
                experts(torch.randn(9, HIDDEN, dtype=torch.float64), plan).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(experts.parameters(), 1.0)
            optimizer.step()
        finals.append([parameter.detach().clone() for parameter in experts.parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_bfloat16_on_either_cpu(kind: str, in_place: bool, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 weights and gradients, products in bfloat16 or float32: 2⁻⁸ each, four deep, 3 % of the largest."""
    if supported and not products.cpu_has_bfloat16():
        pytest.skip("this CPU has no bfloat16 instructions")
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: supported)
    experts, x, plan = problem(kind, torch.bfloat16)
    plan = plan._replace(weights=plan.weights.detach())
    experts.accumulate_gradients_in_place(in_place)
    exact = make_experts(kind, 4)
    exact.load_state_dict(experts.state_dict())
    exact_x = x.detach().double().requires_grad_()
    out, reference = experts(x, plan), exact(exact_x, plan._replace(weights=plan.weights.double()))
    out.backward(torch.ones_like(out))
    reference.backward(torch.ones_like(reference))
    assert out.dtype == torch.bfloat16
    pairs = [(out, reference), (x.grad, exact_x.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(experts.parameters(), exact.parameters(), strict=True)]
    for mine, theirs in pairs:
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0.03 * theirs.detach().abs().max().item())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tokens_experts_are_summed_in_float32(in_place: bool) -> None:
    """256 + 8 · 0.5: in bfloat16 each half would be lost. Outputs by their biases, gradients by the matrices."""
    experts = MLPExperts(9, 1, 1).bfloat16()
    values = torch.tensor([256.0] + [0.5] * 8)
    with torch.no_grad():
        experts.up_proj[:, 0, 0], experts.up_proj_bias[:] = values.bfloat16(), 10.0  # where gelu is the identity
        experts.down_proj[:], experts.down_proj_bias[:, 0] = 1.0, (values - 10).bfloat16()
    experts.accumulate_gradients_in_place(in_place)
    x = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    out = experts(x, dispatch(by_hand(torch.arange(9).repeat(2, 1), torch.ones(2, 9), 9)))
    out.sum().backward()
    assert out.tolist() == [[260.0]] * 2
    assert x.grad is not None and x.grad.tolist() == [[260.0]] * 2


@pytest.mark.parametrize("tokens", range(1, 9))
def test_decoding_touches_only_the_chosen_experts(tokens: int) -> None:
    """The weights of all others are NaN here."""
    experts = make_experts("gated", 16)
    indices = torch.tensor([[3, 11], [11, 3], [3, 5]]).repeat(3, 1)[:tokens]
    with torch.no_grad():
        for expert in set(range(16)) - set(indices.flatten().tolist()):
            experts.gate_up_proj[expert], experts.down_proj[expert] = torch.nan, torch.nan
        x = torch.randn(tokens, HIDDEN, dtype=torch.float64)
        routing = by_hand(indices, torch.rand(tokens, 2, dtype=torch.float64), 16)
        out = experts(x, dispatch(routing))
    torch.testing.assert_close(out, mixture_by_token(x, routing, experts).detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", EXPERTS)
def test_autocast_casts_only_the_chosen_experts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token; whatever is read of another expert would show, and so would a cast of everything."""
    experts = make_experts(kind, 16).float()
    cast: list[int] = []
    real = Tensor.to
    monkeypatch.setattr(
        Tensor, "to", lambda self, *args, **options: (cast.append(self.numel()), real(self, *args, **options))[1]
    )
    x, weights = torch.randn(1, HIDDEN), torch.rand(1, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert experts(x, dispatch(by_hand(torch.tensor([[3, 11]]), weights, 16))).dtype == torch.bfloat16
    assert 0 < max(cast) <= max(parameter[0].numel() for parameter in experts.parameters())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_autocast_does_not_reach_into_the_operator(
    kind: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bfloat16 instructions, training multiplies in float32 all the same: pre-activations round once, to 2⁻⁸.

    Outputs and gradients as the same operator gives them for the same low-precision input, bit for bit.
    """
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: False)
    experts, x, plan = problem(kind, torch.float32)
    plan = plan._replace(weights=plan.weights.detach().float())
    results = []
    for autocast in (True, False):
        with torch.autocast("cpu", dtype=low, enabled=autocast):
            out = experts(x if autocast else x.to(low), plan)
        assert out.dtype == low
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, *experts.parameters()))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert all(grad.dtype == torch.float32 for grad in results[0][1:])


@pytest.mark.parametrize("kind", EXPERTS)
def test_shapes_without_data(kind: str) -> None:
    """On the meta device, as tools that only measure a model run it."""
    experts, x, plan = problem(kind)
    on_meta = plan._replace(
        **{name: getattr(plan, name).detach().to("meta") for name in ("token_ids", "weights", "tokens_per_expert")}
    )
    out = experts.to("meta")(x.detach().to("meta").requires_grad_(), on_meta)
    out.sum().backward()
    assert out.shape == x.shape and out.is_meta
    assert all(p.grad is not None and p.grad.shape == p.shape for p in experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("in_place", [False, True])
def test_combine_weights_of_any_dtype(kind: str, dtype: torch.dtype, weight_dtype: torch.dtype, in_place: bool) -> None:
    """Every gradient has the dtype of what it belongs to; 3 % of the largest value in the lower precisions."""
    experts, x, plan = problem(kind, dtype)
    experts.accumulate_gradients_in_place(in_place)
    weights = plan.weights.detach().to(weight_dtype).requires_grad_()
    exact = make_experts(kind, 4, backend="loop")
    exact.load_state_dict(experts.state_dict())
    exact_x, exact_weights = (leaf.detach().double().requires_grad_() for leaf in (x, weights))
    out = experts(x, plan._replace(weights=weights))
    reference = exact(exact_x, plan._replace(weights=exact_weights))
    out.backward(torch.ones_like(out))
    reference.backward(torch.ones_like(reference))
    pairs = [(out, reference), (x.grad, exact_x.grad), (weights.grad, exact_weights.grad)]
    pairs += [(mine.grad, theirs.grad) for mine, theirs in zip(experts.parameters(), exact.parameters(), strict=True)]
    assert [mine.dtype for mine, _ in pairs if mine is not None] == [dtype, dtype, weight_dtype] + [dtype] * (
        len(pairs) - 3
    )
    for mine, theirs in pairs:
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0.03 * theirs.detach().abs().max().item())


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("masked", [False, True])
def test_cuda_bfloat16_equals_the_loop(kind: str, masked: bool) -> None:
    """torch's grouped kernel against one product per expert, with an idle expert and unused slots."""
    torch.manual_seed(0)
    experts = EXPERTS[kind](4, 64, 32).to("cuda", torch.bfloat16)
    indices = torch.tensor(CHOSEN * 8, device="cuda")
    keep = torch.rand(40, 2, device="cuda") > 0.3 if masked else None
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weights = torch.rand(40, 2, device="cuda").requires_grad_()
    plan = dispatch(by_hand(indices, weights, 4, keep))
    leaves = (x, weights, *experts.parameters())
    results = []
    for backend in ("grouped", "loop"):
        experts.backend = backend
        out = experts(x, plan)
        results.append([out, *torch.autograd.grad(out.sum(), leaves, retain_graph=True)])
    for mine, reference in zip(*results, strict=True):
        assert mine.isfinite().all()
        atol = 0.03 * reference.detach().abs().max().item()
        torch.testing.assert_close(mine.float(), reference.float(), rtol=0, atol=atol)


@cuda
def test_cuda_bfloat16_waits_for_nothing() -> None:
    experts = EXPERTS["gated"](4, 64, 32).to("cuda", torch.bfloat16)
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    indices, weights = torch.tensor(CHOSEN * 8, device="cuda"), torch.rand(40, 2, device="cuda")
    experts(x, dispatch(by_hand(indices, weights, 4))).sum().backward()  # the first call builds and caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, dispatch(by_hand(indices, weights, 4))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

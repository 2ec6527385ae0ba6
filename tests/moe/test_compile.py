"""Under ``torch.compile(fullgraph=True)``: one graph, no recompilation over token counts, the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moectl.moe import GatedExperts, MLPExperts, MoELayer
from moectl.plugins import BUILT_IN
from moectl.routers import build_router

D, E, F = 16, 8, 12
#: Twenty counts: fewer than the experts, a prime, a power of two, and more than the expert count squared.
COUNTS = [2, 3, 5, 7, 8, 13, 16, 17, 23, 31, 32, 40, 41, 48, 57, 64, 65, 80, 99, 128]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(router: str = "topk", dtype: torch.dtype = torch.float32, experts: type[Any] = GatedExperts) -> MoELayer:
    torch.manual_seed(0)
    options = {"top_k": 2} if router == "topk" else {}
    made = MoELayer(build_router(router, hidden_size=D, num_experts=E, **options), experts(E, D, F))
    nn.init.normal_(made.router.weight)
    return made.to(dtype)


def run(call: Callable[[Tensor], Tensor], model: nn.Module, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Output, and the gradients of the input and of every parameter; none is as good as zeros."""
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens)).to(dtype).requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(tokens)
    out = call(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    return [
        out.detach(),
        x.grad,
        *[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [GatedExperts, MLPExperts])
def test_one_graph_and_no_recompilation_over_twenty_token_counts(dtype: torch.dtype, experts: type[Any]) -> None:
    """Two compilations, as for any model: the first token count is taken for a constant, the second makes it a size."""
    model = layer(dtype=dtype, experts=experts).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in COUNTS:
        mine, eager = run(compiled, model, tokens, dtype), run(model, model, tokens, dtype)
        for one, other in zip(mine, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("router", BUILT_IN)
@pytest.mark.parametrize("training", [False, True])
def test_every_router_compiles_whole(router: str, training: bool) -> None:
    model = layer(router).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (9, 33):
        mine, eager = run(compiled, model, tokens, torch.float32), run(model, model, tokens, torch.float32)
        for one, other in zip(mine, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [GatedExperts, MLPExperts])
def test_autocast_compiles_whole(experts: type[Any]) -> None:
    """The same operator calls as in eager mode; bfloat16 keeps 8 bits."""
    model = layer(experts=experts).eval()

    def low(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(x)

        return cast

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(low(model), fullgraph=True, backend=counter)
    for tokens in COUNTS[::4]:
        mine, eager = run(compiled, model, tokens, torch.float32), run(low(model), model, tokens, torch.float32)
        assert mine[0].dtype == torch.bfloat16
        for one, other in zip(mine, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2.0**-7 * other.abs().max().item())
    assert counter.frame_count <= 2


def test_inductor_too() -> None:
    """What users get from ``torch.compile`` alone; in eval, because its random numbers are its own."""
    model = layer().eval()
    compiled = torch.compile(model, fullgraph=True)
    for one, other in zip(run(compiled, model, 24, torch.float32), run(model, model, 24, torch.float32), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_changes_nothing(in_place: bool, dtype: torch.dtype) -> None:
    """Bit for bit, with exploration noise on and more experts than tokens."""
    model = layer(dtype=dtype).train()
    model.experts.accumulate_gradients_in_place(in_place)
    for tokens in (3, 40):
        plain = run(model, model, tokens, dtype)
        again = run(lambda x: checkpoint(model, x, use_reentrant=False), model, tokens, dtype)
        for one, other in zip(plain, again, strict=True):
            assert torch.equal(one, other)


def test_compiling_takes_no_lasting_buffers() -> None:
    """The option is for eager training: a compiled graph's gradients go through autograd, and are the same."""
    model = layer().eval()
    expected = run(model, model, 20, torch.float32)
    model.experts.accumulate_gradients_in_place()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled, model, 20, torch.float32), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

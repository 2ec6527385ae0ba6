"""Under `lifted`, nothing is float32: not by any way of asking for it, and not in Hugging Face's Qwen3-MoE."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moectl.parity.lift import lifted

ASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to device": lambda x: x.to("cpu", torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.float),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "type by class": lambda x: x.type(torch.FloatTensor),
    "type keyword": lambda x: x.type(dtype=torch.float32),
    "new_zeros": lambda x: x.new_zeros(3, dtype=torch.float32),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.float32),
    "empty": lambda x: torch.empty(3, dtype=torch.float32),
    "arange": lambda x: torch.arange(3, dtype=torch.float),
    "arange to float": lambda x: torch.arange(3).float(),
    "tensor": lambda x: torch.tensor([1.0, 2.0]),
    "tensor dtype": lambda x: torch.tensor(1, dtype=torch.float32),
    "tensor of numpy": lambda x: torch.tensor(np.ones(3, dtype=np.float32)),
    "as_tensor": lambda x: torch.as_tensor(np.float32(1)),
    "constructor": lambda x: torch.Tensor(3),
    "softmax": lambda x: torch.softmax(x, dim=-1, dtype=torch.float32),
    "F.softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float),
    "sum": lambda x: x.sum(dtype=torch.float32),
    "integers divided": lambda x: torch.arange(3) / 2,
    "module": lambda x: nn.Linear(3, 3).weight,
    "module dtype": lambda x: nn.Linear(3, 3, dtype=torch.float32).weight,
    "module float": lambda x: nn.Linear(3, 3).float().weight,
    "module to": lambda x: nn.Linear(3, 3).to(torch.float32).weight,
    "buffer": lambda x: nn.Buffer(torch.zeros(3, dtype=torch.float32)),
    "after bfloat16": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_float32_becomes_float64(ask: Callable[[Tensor], Tensor]) -> None:
    assert ask(torch.randn(3, dtype=torch.float64)).dtype == torch.float32
    with lifted():
        assert ask(torch.randn(3)).dtype == torch.float64


def test_complex_too() -> None:
    with lifted():
        x = torch.randn(4, 2)
        assert torch.view_as_complex(x.float()).dtype == torch.complex128
        assert torch.zeros(2, dtype=torch.complex64).dtype == torch.complex128
        assert x.cfloat().dtype == torch.complex128


def test_low_precision_on_purpose_stays() -> None:
    with lifted():
        x = torch.full((3,), 1.0 + 2**-10)
        for dtype in (torch.bfloat16, torch.float16):
            assert x.to(dtype).dtype == dtype
        assert x.to(torch.bfloat16).float().eq(1.0).all()  # what was lost is lost
        assert torch.ones(3, dtype=torch.int32).dtype == torch.int32


def test_bytes_are_read_as_what_they_are() -> None:
    values = np.array([1.0, 2.5], dtype=np.float32)
    with lifted():
        read = torch.frombuffer(bytearray(values.tobytes()), dtype=torch.float32)
        assert read.tolist() == [1.0, 2.5]
        seen = torch.tensor([1, 2], dtype=torch.int32).view(torch.float32)
        shared = torch.from_numpy(values)
    assert seen.dtype == shared.dtype == torch.float32


def test_values_are_kept() -> None:
    """Not rounded to float32 on the way: 1/3 in float64 is 1/3 in float64 after `.float()`."""
    third = torch.tensor(1 / 3, dtype=torch.float64)
    with lifted():
        assert third.float().item() == third.item()
        assert torch.tensor([1 / 3], requires_grad=True).grad_fn is None
        assert torch.tensor(np.ones(2, dtype=np.float32), requires_grad=True).requires_grad


def test_finfo_and_masks() -> None:
    with lifted():
        masked = torch.zeros(3).masked_fill(torch.tensor([True, False, False]), torch.finfo(torch.float32).min)
        assert torch.softmax(masked, dim=-1).tolist() == [0.0, 0.5, 0.5]
        assert torch.finfo(masked.dtype).eps == torch.finfo(torch.float64).eps


def test_autocast_leaves_float64_alone() -> None:
    with lifted(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 3)
        assert (x @ x).dtype == nn.Linear(3, 3)(x).dtype == torch.softmax(x, dim=-1).dtype == torch.float64


@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16])
def test_default_dtype_is_restored(before: torch.dtype) -> None:
    torch.set_default_dtype(before)
    try:
        with lifted():
            assert torch.get_default_dtype() == torch.float64
            with lifted():
                pass
            assert torch.get_default_dtype() == torch.float64
            assert torch.ones(1).float().dtype == torch.float64
        assert torch.get_default_dtype() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_exception_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="within"), lifted():
        raise ValueError("within")
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32


def test_overlapping_generators() -> None:
    """Two generators that yield inside, ended in the order in which they began and not in reverse."""

    def inside() -> Iterator[torch.dtype]:
        with lifted():
            yield torch.ones(1, dtype=torch.float32).dtype

    first, second = inside(), inside()
    assert next(first) == next(second) == torch.float64
    first.close()
    assert torch.ones(1, dtype=torch.float32).dtype == torch.float64  # the second still holds
    assert torch.get_default_dtype() == torch.float64
    second.close()
    assert torch.ones(1, dtype=torch.float32).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_other_threads_keep_float32_when_they_say_so() -> None:
    found: list[torch.dtype] = []
    with lifted():
        thread = threading.Thread(target=lambda: found.append(torch.ones(1).to(torch.float32).dtype))
        thread.start()
        thread.join()
    assert found == [torch.float32]


class Spy(TorchDispatchMode):
    """Every floating tensor below float64 that any operation makes, backward included, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                self.seen.add(str(func))
        return result


CONFIG = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    mlp_only_layers=[1],
)


def qwen3() -> Any:
    torch.manual_seed(0)
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float64, **options)


def spied(training: bool) -> tuple[Spy, Any, Any]:
    """A forward pass with both losses and a backward pass under a spy."""
    model = qwen3().train(training)
    input_ids = torch.arange(18).view(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with Spy() as spy:
        output = model(input_ids, attention_mask=mask, labels=input_ids, output_router_logits=True)
        output.loss.backward()
    return spy, model, output


@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_qwen3_moe_is_float32(training: bool) -> None:
    with lifted():
        spy, model, output = spied(training)
    assert spy.seen == set()
    assert spy.calls > 500  # it did look
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float64}
    assert model.model.rotary_emb.inv_freq.dtype == output.loss.dtype == output.aux_loss.dtype == torch.float64


def test_the_spy_sees_what_is_there_without_it() -> None:
    spy, _, output = spied(training=True)
    assert {"aten._softmax.default", "aten.cos.default", "aten.rsqrt.default"} & spy.seen
    assert output.loss.dtype == torch.float32


def test_formulas_stay_the_same() -> None:
    """Lifted and not, logits differ by float32's rounding (a relative 6e-8 in each of a dozen casts), no more."""
    input_ids = torch.arange(18).view(2, 9)
    plain = qwen3()(input_ids).logits
    with lifted():
        raised = qwen3()(input_ids).logits
    assert 0 < float((plain - raised).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_lifted_too(backend: str) -> None:
    def rounded(x: Tensor) -> Tensor:
        return torch.softmax(x.to(torch.float32), dim=-1, dtype=torch.float).float() * torch.arange(
            4, dtype=torch.float32
        )

    torch.compiler.reset()
    with lifted():
        x = torch.randn(3, 4, requires_grad=True)
        y = torch.compile(rounded, backend=backend, fullgraph=True)(x)
        y.sum().backward()
        assert y.dtype == torch.float64
        assert x.grad is not None and x.grad.dtype == torch.float64
        torch.testing.assert_close(y, rounded(x), rtol=0, atol=1e-15)

"""How much slower is the MoE layer than a dense MLP of the same active FLOPs, and than Hugging Face's?

    python benchmarks/moe_layer.py --clock cpu --rounds 9 --max-seconds 12       # the first table below
    python benchmarks/moe_layer.py --threads 2 --shapes 1024x1024x512x64x8 --skip "HF eager"

Shapes are TxDxFxExk (tokens, hidden, expert intermediate, experts, experts per token), with ``:gelu``
for plain GELU experts with biases instead of SwiGLU. The dense MLP has k·F neurons and the same
activation: the same multiplications per token, without routing. ``moectl`` is the layer as the trainer
runs it, weight gradients in lasting buffers; ``moectl, plain`` the same with ordinary gradients.
Hugging Face's block is ``Qwen3MoeSparseMoeBlock`` over the very same parameters (with two-matrix experts
for ``:gelu``), its experts run by ``eager``, ``grouped_mm``, and ``batched_mm`` where the weights that it
copies for every assignment fit into 4 GiB. All variants take turns in every round; ratios are medians of
per-round ratios, with quartiles; a slow variant gets fewer rounds. Forward is timed without a graph, as in
evaluation; forward+backward starts without gradients, on both sides. The errors are the largest absolute
ones of output and input gradient against a float64 loop over the experts, over the tokens whose experts
are the same there ("flips" counts others).

A virtual Intel Xeon (AVX-512, AMX), torch 2.13.0+cpu, transformers 5.23.0, float32. One thread, process CPU time:

| shape | variant | rounds | forward, ms | ÷ dense | forward+backward, ms | ÷ dense | error y, ∂x | flips |
|---|---|---|---|---|---|---|---|---|
| 2048x768x3072x8x1:gelu | dense | 9 | 134.2 | 1.00 (1.00-1.00) | 357.9 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x1:gelu | moectl | 9 | 144.9 | 1.06 (1.04-1.10) | 418.4 | 1.15 (1.14-1.20) | 9e-07, 9e-07 | 0 |
| 2048x768x3072x8x1:gelu | moectl, plain | 9 | 142.7 | 1.05 (1.04-1.08) | 464.7 | 1.29 (1.27-1.31) | 9e-07, 9e-07 | 0 |
| 2048x768x3072x8x1:gelu | HF eager | 9 | 143.0 | 1.05 (1.04-1.08) | 987.7 | 2.75 (2.70-2.81) | 1e-06, 1e-06 | 0 |
| 2048x768x3072x8x1:gelu | HF grouped_mm | 9 | 159.9 | 1.20 (1.19-1.21) | 460.9 | 1.28 (1.27-1.33) | 9e-07, 1e-06 | 0 |
| 2048x768x3072x8x2:gelu | dense | 9 | 236.0 | 1.00 (1.00-1.00) | 749.7 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x2:gelu | moectl | 9 | 257.5 | 1.11 (1.08-1.12) | 808.6 | 1.08 (1.06-1.12) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | moectl, plain | 9 | 259.7 | 1.11 (1.08-1.11) | 870.8 | 1.17 (1.13-1.21) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | HF eager | 9 | 258.4 | 1.10 (1.09-1.11) | 1355.1 | 1.81 (1.77-1.89) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | HF grouped_mm | 9 | 269.9 | 1.15 (1.13-1.15) | 884.2 | 1.20 (1.17-1.24) | 1e-06, 2e-06 | 0 |
| 1024x1024x512x64x8 | dense | 9 | 156.2 | 1.00 (1.00-1.00) | 435.5 | 1.00 (1.00-1.00) |  |  |
| 1024x1024x512x64x8 | moectl | 9 | 215.6 | 1.38 (1.38-1.39) | 567.6 | 1.30 (1.28-1.30) | 3e-07, 4e-07 | 0 |
| 1024x1024x512x64x8 | moectl, plain | 9 | 213.6 | 1.37 (1.33-1.39) | 747.1 | 1.70 (1.68-1.71) | 3e-07, 4e-07 | 0 |
| 1024x1024x512x64x8 | HF eager | 1 | 231.8 | 1.50 (1.48-1.52) | 12527.8 | 26.62 (26.62-26.62) | 2e-07, 4e-07 | 0 |
| 1024x1024x512x64x8 | HF grouped_mm | 9 | 225.5 | 1.44 (1.44-1.45) | 781.2 | 1.78 (1.75-1.79) | 2e-07, 4e-07 | 0 |
| 1024x2048x768x128x8 | dense | 8 | 449.3 | 1.00 (1.00-1.00) | 1344.7 | 1.00 (1.00-1.00) |  |  |
| 1024x2048x768x128x8 | moectl | 5 | 699.9 | 1.54 (1.51-1.56) | 1938.1 | 1.46 (1.44-1.52) | 8e-07, 1e-06 | 0 |
| 1024x2048x768x128x8 | moectl, plain | 4 | 699.4 | 1.52 (1.50-1.56) | 2561.1 | 1.91 (1.88-1.99) | 8e-07, 1e-06 | 0 |
| 1024x2048x768x128x8 | HF eager | 1 | 793.7 | 1.77 (1.72-1.78) | 136310.1 | 102.72 (102.72-102.72) | 6e-07, 8e-07 | 0 |
| 1024x2048x768x128x8 | HF grouped_mm | 3 | 736.8 | 1.63 (1.62-1.68) | 2867.1 | 2.16 (2.13-2.21) | 6e-07, 8e-07 | 0 |
| 1x2048x768x128x8 | dense | 9 | 9.9 | 1.00 (1.00-1.00) | 35.3 | 1.00 (1.00-1.00) |  |  |
| 1x2048x768x128x8 | moectl | 9 | 13.1 | 1.33 (1.32-1.34) | 298.0 | 8.43 (8.31-8.44) | 2e-07, 6e-07 | 0 |
| 1x2048x768x128x8 | moectl, plain | 9 | 12.3 | 1.25 (1.24-1.26) | 803.9 | 22.59 (22.14-22.80) | 2e-07, 6e-07 | 0 |
| 1x2048x768x128x8 | HF eager | 1 | 11.9 | 1.21 (1.20-1.22) | 10354.2 | 288.96 (288.96-288.96) | 2e-07, 5e-07 | 0 |
| 1x2048x768x128x8 | HF batched_mm | 9 | 49.1 | 4.98 (4.96-4.99) | 914.4 | 25.45 (25.42-26.35) | 3e-07, 4e-07 | 0 |
| 1x2048x768x128x8 | HF grouped_mm | 9 | 11.6 | 1.18 (1.17-1.19) | 816.8 | 22.24 (21.98-23.17) | 2e-07, 5e-07 | 0 |
| 8x2048x768x128x8 | dense | 9 | 29.2 | 1.00 (1.00-1.00) | 66.8 | 1.00 (1.00-1.00) |  |  |
| 8x2048x768x128x8 | moectl | 9 | 75.4 | 2.54 (2.52-2.56) | 435.8 | 6.58 (6.52-6.73) | 2e-07, 8e-07 | 0 |
| 8x2048x768x128x8 | moectl, plain | 9 | 72.7 | 2.44 (2.44-2.51) | 975.0 | 14.88 (14.65-15.04) | 2e-07, 8e-07 | 0 |
| 8x2048x768x128x8 | HF eager | 1 | 74.1 | 2.51 (2.48-2.56) | 59932.3 | 893.70 (893.70-893.70) | 2e-07, 5e-07 | 0 |
| 8x2048x768x128x8 | HF batched_mm | 4 | 744.4 | 25.44 (24.84-25.83) | 2520.6 | 37.51 (37.37-37.84) | 3e-07, 5e-07 | 0 |
| 8x2048x768x128x8 | HF grouped_mm | 9 | 66.9 | 2.27 (2.25-2.38) | 945.5 | 14.17 (13.99-14.76) | 2e-07, 5e-07 | 0 |

Two threads on the same two cores, wall clock:

| shape | variant | rounds | forward, ms | ÷ dense | forward+backward, ms | ÷ dense | error y, ∂x | flips |
|---|---|---|---|---|---|---|---|---|
| 2048x768x3072x8x1:gelu | dense | 9 | 62.6 | 1.00 (1.00-1.00) | 184.7 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x1:gelu | moectl | 9 | 75.9 | 1.21 (1.19-1.21) | 219.3 | 1.18 (1.17-1.22) | 9e-07, 9e-07 | 0 |
| 2048x768x3072x8x1:gelu | moectl, plain | 9 | 74.6 | 1.19 (1.19-1.20) | 243.8 | 1.36 (1.32-1.38) | 9e-07, 9e-07 | 0 |
| 2048x768x3072x8x1:gelu | HF eager | 9 | 77.5 | 1.23 (1.23-1.27) | 586.9 | 3.23 (3.09-3.32) | 1e-06, 1e-06 | 0 |
| 2048x768x3072x8x1:gelu | HF grouped_mm | 9 | 78.2 | 1.25 (1.23-1.27) | 290.2 | 1.56 (1.55-1.63) | 9e-07, 1e-06 | 0 |
| 2048x768x3072x8x2:gelu | dense | 9 | 122.2 | 1.00 (1.00-1.00) | 400.6 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x2:gelu | moectl | 9 | 140.5 | 1.15 (1.13-1.16) | 416.6 | 1.06 (1.04-1.10) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | moectl, plain | 9 | 141.1 | 1.13 (1.12-1.19) | 455.8 | 1.14 (1.08-1.19) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | HF eager | 9 | 139.3 | 1.15 (1.12-1.23) | 761.8 | 1.94 (1.85-1.97) | 1e-06, 2e-06 | 0 |
| 2048x768x3072x8x2:gelu | HF grouped_mm | 9 | 152.9 | 1.27 (1.17-1.31) | 516.9 | 1.31 (1.24-1.33) | 1e-06, 2e-06 | 0 |
| 1024x1024x512x64x8 | dense | 9 | 76.7 | 1.00 (1.00-1.00) | 231.9 | 1.00 (1.00-1.00) |  |  |
| 1024x1024x512x64x8 | moectl | 9 | 108.9 | 1.41 (1.39-1.43) | 310.2 | 1.35 (1.34-1.38) | 3e-07, 3e-07 | 0 |
| 1024x1024x512x64x8 | moectl, plain | 9 | 107.2 | 1.39 (1.36-1.40) | 364.1 | 1.62 (1.57-1.65) | 3e-07, 3e-07 | 0 |
| 1024x1024x512x64x8 | HF eager | 1 | 128.7 | 1.65 (1.63-1.67) | 6314.5 | 29.39 (29.39-29.39) | 2e-07, 3e-07 | 0 |
| 1024x1024x512x64x8 | HF grouped_mm | 9 | 117.3 | 1.52 (1.48-1.53) | 426.6 | 1.89 (1.86-1.90) | 2e-07, 3e-07 | 0 |
| 1024x2048x768x128x8 | dense | 9 | 228.7 | 1.00 (1.00-1.00) | 680.6 | 1.00 (1.00-1.00) |  |  |
| 1024x2048x768x128x8 | moectl | 9 | 355.3 | 1.55 (1.52-1.59) | 990.6 | 1.47 (1.47-1.48) | 7e-07, 1e-06 | 0 |
| 1024x2048x768x128x8 | moectl, plain | 2 | 349.6 | 1.56 (1.50-1.57) | 2318.8 | 3.61 (3.59-3.64) | 7e-07, 1e-06 | 0 |
| 1024x2048x768x128x8 | HF grouped_mm | 4 | 412.8 | 1.79 (1.78-1.85) | 2250.6 | 3.38 (3.32-3.41) | 6e-07, 9e-07 | 0 |
| 1x2048x768x128x8 | dense | 9 | 5.0 | 1.00 (1.00-1.00) | | | | |
| 1x2048x768x128x8 | moectl | 9 | 6.5 | 1.26 (1.23-1.32) | | | 2e-07, 4e-07 | 0 |
| 1x2048x768x128x8 | HF grouped_mm | 4 | 5.4 | 1.09 (1.08-1.10) | | | 2e-07, 4e-07 | 0 |

bfloat16 weights, one thread, CPU time, three rounds: forward+backward of 1024x1024x512x64x8 takes 292 ms, Hugging
Face's grouped_mm 317 ms; the dense MLP, 99 ms, has AMX to itself. On a CPU without bfloat16 instructions
(``--no-mkldnn`` turns them off; one round) it is 621 ms against 23,178 ms, and in 2048x768x3072x8x1:gelu 506 ms against
13,593 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from interleaved import CLOCKS, Timed, measure, ratio, spread
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moectl.models.decoder import GatedMLP
from moectl.moe import Experts, GatedExperts, MLPExperts, MoELayer
from moectl.routers import build_router

SHAPES = [
    "2048x768x3072x8x1:gelu",
    "2048x768x3072x8x2:gelu",
    "1024x1024x512x64x8",
    "1024x2048x768x128x8",
    "1x2048x768x128x8",
    "8x2048x768x128x8",
]
#: Hugging Face's batched_mm copies the weights of every assignment: 150 GB in the third shape.
BATCHED_MM_BYTES = 2**32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Shape(NamedTuple):
    """One problem size."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gelu: bool

    @classmethod
    def parse(cls, text: str) -> Shape:
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)(:gelu)?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 2048x768x3072x8x1 or ...x1:gelu")
        return cls(*(int(number) for number in match.groups()[:5]), gelu=match.group(6) is not None)

    def __str__(self) -> str:
        return "x".join(str(number) for number in self[:5]) + (":gelu" if self.gelu else "")


class GeluMLP(nn.Module):
    """GPT-2's MLP: biases and tanh-GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class TwoMatrixExperts(nn.Module):
    """GPT-2's experts as transformers would have them: its implementations, over the parameters of ours."""

    def __init__(self, config: Qwen3MoeConfig, ours: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = config.num_experts, ACT2FN["gelu_pytorch_tanh"]
        for name, parameter in ours.named_parameters():
            setattr(self, name, parameter)

    def forward(self, x: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
        """The loop of transformers' own eager experts, without a gate."""
        output = torch.zeros_like(x)
        chosen = F.one_hot(topk_indices, self.num_experts).permute(2, 1, 0)
        for expert in chosen.sum(dim=(-1, -2)).nonzero().flatten().tolist():
            slot, token = torch.where(chosen[expert])
            hidden = self.act_fn(F.linear(x[token], self.up_proj[expert], self.up_proj_bias[expert]))
            result = F.linear(hidden, self.down_proj[expert], self.down_proj_bias[expert])
            output.index_add_(0, token, (result * topk_weights[token, slot, None]).to(output.dtype))
        return output


two_matrix = use_experts_implementation(TwoMatrixExperts, has_bias=True, has_gate=False)


class Variant(NamedTuple):
    """One implementation: ``call`` maps ``[T, D]`` to ``[T, D]``; ``routes`` its experts ``[T, k]``, if any."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    routes: Callable[[Tensor], Tensor] | None = None


def moectl_layer(shape: Shape, dtype: torch.dtype) -> MoELayer:
    """Our layer; a gate of unit-variance logits, so that the choice of experts is as even as chance makes it."""
    router = build_router(
        "topk",
        hidden_size=shape.hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        norm_topk_prob=shape.top_k > 1,  # with k = 1 the renormalised weight would be the constant 1
        noise_std=0.0,
    )
    nn.init.normal_(router.weight, std=1 / math.sqrt(shape.hidden))
    experts = (MLPExperts if shape.gelu else GatedExperts)(shape.experts, shape.hidden, shape.intermediate)
    for name, parameter in experts.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.02)
    return MoELayer(router, experts).to(dtype)


def huggingface_variant(shape: Shape, ours: MoELayer, implementation: str) -> Variant:
    """Qwen3's block over the very parameters of our layer."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.top_k > 1,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = ours.router.weight
    if shape.gelu:
        block.experts = two_matrix(config, ours.experts)
    else:
        block.experts.gate_up_proj, block.experts.down_proj = ours.experts.gate_up_proj, ours.experts.down_proj
    return Variant(block, lambda x: block(x[None])[0], lambda x: block.gate(x)[2])


def build(shape: Shape, dtype: torch.dtype) -> dict[str, Variant]:
    """All variants of a shape; the dense one first."""
    dense = (GeluMLP if shape.gelu else GatedMLP)(shape.hidden, shape.top_k * shape.intermediate).to(dtype)
    ours = moectl_layer(shape, dtype)
    ordinary = MoELayer(ours.router, sharing_weights(ours.experts))
    ours.experts.accumulate_gradients_in_place()
    variants = {"dense": Variant(dense, dense)}
    for name, layer in (("moectl", ours), ("moectl, plain", ordinary)):
        variants[name] = Variant(layer, layer, lambda x: ours.router(x).topk_indices)
    for implementation in huggingface_implementations(shape, dtype):
        variants[f"HF {implementation}"] = huggingface_variant(shape, ours, implementation)
    return variants


def sharing_weights(experts: Experts) -> Experts:
    """Other experts with the very same parameters."""
    with torch.device("meta"):
        other = type(experts)(experts.num_experts, experts.hidden_size, experts.intermediate_size)
    for name, parameter in experts.named_parameters():
        setattr(other, name, parameter)
    return other


def huggingface_implementations(shape: Shape, dtype: torch.dtype) -> list[str]:
    """Those that take this dtype and fit into memory."""
    if dtype == torch.float64:
        return ["eager"]  # its grouped kernel takes no float64
    copied = shape.tokens * shape.top_k * 2 * shape.intermediate * shape.hidden * dtype.itemsize
    return ["eager", *["batched_mm"] * (copied <= BATCHED_MM_BYTES), "grouped_mm"]


class Reference(NamedTuple):
    """Output, input gradient and experts of the exact computation."""

    output: Tensor
    grad: Tensor
    routes: Tensor


def exact(layer: MoELayer, x: Tensor, grad: Tensor) -> Reference:
    """The layer in float64, written out as a loop over experts that shares nothing with the layer's own code."""
    x = x.detach().double().requires_grad_()
    chosen, routes = (x @ layer.router.weight.detach().double().T).softmax(-1).topk(layer.router.top_k, dim=-1)
    chosen = chosen / chosen.sum(-1, keepdim=True) if layer.router.top_k > 1 else chosen
    output = torch.zeros_like(x)
    for expert in range(layer.router.num_experts):
        token, slot = (routes == expert).nonzero(as_tuple=True)
        own = {name: weight[expert].detach().double() for name, weight in layer.experts.named_parameters()}
        if "gate_up_proj" in own:
            gate, up = (x[token] @ own["gate_up_proj"].T).chunk(2, dim=-1)
            result = (F.silu(gate) * up) @ own["down_proj"].T
        else:
            hidden = F.gelu(x[token] @ own["up_proj"].T + own["up_proj_bias"], approximate="tanh")
            result = hidden @ own["down_proj"].T + own["down_proj_bias"]
        output = output.index_add(0, token, result * chosen[token, slot][:, None])
    (grad_x,) = torch.autograd.grad(output, x, grad.double())
    return Reference(output.detach(), grad_x, routes)


def errors(variant: Variant, x: Tensor, grad: Tensor, reference: Reference) -> dict[str, Any]:
    """Largest errors of output and input gradient where the route is the reference's, and how often it is not."""
    assert variant.routes is not None
    same = (variant.routes(x).sort(-1).values == reference.routes.sort(-1).values).all(-1)
    x = x.detach().requires_grad_()
    output = variant.call(x)
    output.backward(grad)
    assert x.grad is not None
    variant.module.zero_grad(set_to_none=True)
    return {
        "max_error_output": float((output.detach().double() - reference.output)[same].abs().max()),
        "max_error_grad": float((x.grad.double() - reference.grad)[same].abs().max()),
        "flips": int((~same).sum()),
    }


def timed_forward(variant: Variant, x: Tensor) -> Timed:
    def run() -> None:
        with torch.no_grad():
            variant.call(x)

    return Timed(run)


def timed_forward_backward(variant: Variant, x: Tensor, grad: Tensor) -> Timed:
    x = x.detach().requires_grad_()

    def run() -> None:
        variant.call(x).backward(grad)

    def prepare() -> None:
        variant.module.zero_grad(set_to_none=True)
        x.grad = None

    return Timed(run, prepare)


def bench(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    torch.manual_seed(arguments.seed)
    dtype = DTYPES[arguments.dtype]
    variants = {name: variant for name, variant in build(shape, dtype).items() if name not in arguments.skip}
    x = torch.randn(shape.tokens, shape.hidden).to(dtype)
    grad = torch.randn(shape.tokens, shape.hidden).to(dtype)
    ours = variants["moectl"].module
    assert isinstance(ours, MoELayer)
    reference = exact(ours, x, grad)
    accuracy = {name: errors(v, x, grad, reference) for name, v in variants.items() if v.routes is not None}
    counts = reference.routes.flatten().bincount(minlength=shape.experts)

    options = {"rounds": arguments.rounds, "clock": arguments.clock, "max_seconds": arguments.max_seconds}
    options |= {"min_rounds": 1, "warmup": 1}
    forward = measure({name: timed_forward(v, x) for name, v in variants.items()}, **options)
    both = measure({name: timed_forward_backward(v, x, grad) for name, v in variants.items()}, **options)
    return [
        {
            "shape": str(shape),
            "variant": name,
            "rounds": len(both[name]),
            "max_share": float(counts.max() / counts.sum()),
            "forward_ms": spread(forward[name]).median * 1e3,
            "forward_ratio": ratio(forward[name], forward["dense"])._asdict(),
            "forward_backward_ms": spread(both[name]).median * 1e3,
            "forward_backward_ratio": ratio(both[name], both["dense"])._asdict(),
            **accuracy.get(name, {}),
        }
        for name in variants
    ]


HEADER = """\
| shape | variant | rounds | forward, ms | ÷ dense | forward+backward, ms | ÷ dense | error y, ∂x | flips |
|---|---|---|---|---|---|---|---|---|"""


def table_line(row: dict[str, Any]) -> str:
    """A row as Markdown; ratios are times the dense MLP's time."""
    ratios = [
        "{median:.2f} ({low:.2f}-{high:.2f})".format(**row[f"{key}_ratio"]) for key in ("forward", "forward_backward")
    ]
    error = f"{row['max_error_output']:.0e}, {row['max_error_grad']:.0e}" if "flips" in row else ""
    return (
        f"| {row['shape']} | {row['variant']} | {row['rounds']} | {row['forward_ms']:.1f} | {ratios[0]} "
        f"| {row['forward_backward_ms']:.1f} | {ratios[1]} | {error} | {row.get('flips', '')} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: process time, for one thread")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="a slower variant gets fewer rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-mkldnn", action="store_true", help="as on a CPU without bfloat16 instructions")
    parser.add_argument("--skip", nargs="*", default=[], metavar="VARIANT", help="such as 'HF eager', which is slow")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.mkldnn.enabled = not arguments.no_mkldnn
    setting = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{key: getattr(arguments, key) for key in ("threads", "rounds", "dtype", "clock", "no_mkldnn", "seed")},
    }
    if not arguments.json:
        print(", ".join(f"{key} {value}" for key, value in setting.items()), HEADER, sep="\n\n", flush=True)
    rows = []
    for shape in arguments.shapes:
        rows += bench(shape, arguments)
        if not arguments.json:
            print(*(table_line(row) for row in rows if row["shape"] == str(shape)), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps({"setting": setting, "rows": rows}))


if __name__ == "__main__":
    main()

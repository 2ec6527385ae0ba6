"""How much slower is the MoE layer than a dense MLP of the same active FLOPs, and than Hugging Face's?

    python benchmarks/moe_layer.py                              # the table below, all shapes
    python benchmarks/moe_layer.py --shapes 2048x768x3072x8x1 --rounds 9 --threads 1 --clock cpu

Shapes are TxDxFxExk (tokens, hidden, expert intermediate, experts, experts per token), with ``:gelu``
for plain GELU experts with biases instead of SwiGLU. The dense MLP has k·F neurons and the same
activation: the same multiplications per token, without routing. Hugging Face's block is
``Qwen3MoeSparseMoeBlock`` with the same weights, its experts run by ``eager`` and by ``grouped_mm``.
All variants take turns in every round; ratios are medians of per-round ratios, with quartiles.
Forward is timed without a graph, as in evaluation; forward+backward makes fresh gradients of the input and
of all parameters. The errors are the largest absolute ones of output and input gradient against a
float64 loop over the experts, over the tokens whose experts are the same there ("flips" counts others).

Two shared cores of a virtual Intel Xeon (AVX-512); torch 2.13.0+cpu, transformers 5.23.0, float32, two threads,
wall clock, 7 rounds, --max-seconds 12.

| shape | variant | forward, ms | ÷ dense | forward+backward, ms | ÷ dense | error y, ∂x | flips |
|---|---|---|---|---|---|---|---|
| 2048x768x3072x8x1 | dense | 105.0 | 1.00 (1.00-1.00) | 344.4 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x1 | moectl | 146.1 | 1.33 (1.27-1.44) | 518.9 | 1.49 (1.46-1.52) | 5e-07, 7e-07 | 0 |
| 2048x768x3072x8x1 | HF eager | 137.9 | 1.29 (1.27-1.35) | 997.3 | 2.84 (2.80-3.04) | 5e-07, 7e-07 | 0 |
| 2048x768x3072x8x1 | HF grouped_mm | 139.1 | 1.25 (1.24-1.38) | 499.6 | 1.40 (1.36-1.51) | 5e-07, 7e-07 | 0 |
| 2048x768x3072x8x2 | dense | 228.0 | 1.00 (1.00-1.00) | 724.5 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x2 | moectl | 272.7 | 1.16 (1.14-1.27) | 865.2 | 1.21 (1.19-1.24) | 6e-07, 1e-06 | 0 |
| 2048x768x3072x8x2 | HF eager | 247.8 | 1.10 (1.08-1.13) | 1380.6 | 1.91 (1.89-1.98) | 6e-07, 1e-06 | 0 |
| 2048x768x3072x8x2 | HF grouped_mm | 263.3 | 1.17 (1.16-1.19) | 930.8 | 1.28 (1.25-1.34) | 6e-07, 1e-06 | 0 |
| 1024x1024x512x64x8 | dense | 98.8 | 1.00 (1.00-1.00) | 278.2 | 1.00 (1.00-1.00) |  |  |
| 1024x1024x512x64x8 | moectl | 162.0 | 1.64 (1.50-1.69) | 638.3 | 2.32 (2.03-2.38) | 2e-07, 3e-07 | 0 |
| 1024x1024x512x64x8 | HF eager | 176.1 | 1.70 (1.66-1.79) | 10195.2 | 36.22 (35.77-37.28) | 2e-07, 3e-07 | 0 |
| 1024x1024x512x64x8 | HF grouped_mm | 153.7 | 1.54 (1.50-1.58) | 668.8 | 2.40 (2.20-2.74) | 2e-07, 3e-07 | 0 |
| 2048x768x3072x8x1:gelu | dense | 72.3 | 1.00 (1.00-1.00) | 197.9 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x1:gelu | moectl | 103.3 | 1.43 (1.34-1.53) | 261.7 | 1.35 (1.30-1.37) | 1e-06, 1e-06 | 0 |
| 2048x768x3072x8x2:gelu | dense | 135.4 | 1.00 (1.00-1.00) | 418.1 | 1.00 (1.00-1.00) |  |  |
| 2048x768x3072x8x2:gelu | moectl | 162.2 | 1.20 (1.18-1.21) | 520.1 | 1.18 (1.14-1.28) | 1e-06, 2e-06 | 0 |

Much of what is above the dense time is fresh memory: the gradient of all experts is written anew, and
glibc maps large blocks page by page each time. Where it is told to keep freed memory
(MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment), forward+backward
of the first three shapes took 1.16, 1.08 and 1.53 times as long as the dense MLP, which had the same.
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
    for name, layer in (("moectl", ours), ("moectl, autograd", ordinary)):
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
    variants = build(shape, dtype)
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{key: getattr(arguments, key) for key in ("threads", "rounds", "dtype", "clock", "seed")},
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

"""How much training throughput does the MoE keep, against the dense model of the same active FLOPs?

    python benchmarks/training_throughput.py --clock cpu --rounds 25                     # the first table below
    python benchmarks/training_throughput.py --size gpt2-small --models "dense; top1" --batch-size 2 --clock cpu \
        --rounds 4 --warmup 1                                                            # the second

One whole optimizer step of the demo's models (size tiny; 8 experts in layers 1, 2 and 3; 12 blocks of
128 tokens; vocabulary 2,048): forward, language-model, balance and z-loss, backward, clipping, AdamW.
All models take turns in every round; a ratio is tokens per second over those of the dense model with
the same active FLOPs in the same round, the median over rounds, with quartiles. ``top2`` visits two
experts per token, so its partner is a dense model with MLPs twice as wide in those layers.
``top4 of 16, F/4`` is the quickstart's: four experts of a quarter of the dense MLP's neurons each.
``loop`` is the same model on the readable reference backend, one expert after the other in Python.

One thread of a virtual Intel Xeon (AVX-512, AMX) that four other programs shared; torch 2.13.0+cpu, float32, CPU
time of the process, median and quartiles. Five shorter readings of top1 on the same day had medians from 0.83 to 0.86:
quartiles of one reading say less than they seem to. By wall clock with two threads an earlier release had 0.76
(0.75-0.77); that was not read again, and cannot be compared with these.

| model | parameters | step, ms | tokens/s | throughput ÷ dense of equal FLOPs |
|---|---|---|---|---|
| dense | 853,376 | 136.8 | 11,225 | 1.00 (1.00-1.00) × dense |
| dense, 2F | 1,148,288 | 163.4 | 9,402 | 1.00 (1.00-1.00) × dense, 2F |
| top1 | 2,920,832 | 161.7 | 9,502 | 0.84 (0.83-0.85) × dense |
| switch | 2,920,832 | 162.2 | 9,468 | 0.84 (0.82-0.85) × dense |
| top2 | 2,920,832 | 198.1 | 7,755 | 0.82 (0.81-0.84) × dense, 2F |
| top4 of 16, F/4 | 1,744,256 | 172.0 | 8,932 | 0.79 (0.78-0.81) × dense |
| top1, loop | 2,920,832 | 174.5 | 8,803 | 0.78 (0.77-0.80) × dense |

``--size gpt2-small``: 12 layers of 768, 8 experts in the last four, vocabulary 50,257, 2 blocks of 512 tokens. Four
rounds only, so that its quartiles are little more than its range.

| model | parameters | step, ms | tokens/s | throughput ÷ dense of equal FLOPs |
|---|---|---|---|---|
| dense | 123,552,768 | 10367.6 | 99 | 1.00 (1.00-1.00) × dense |
| top1 | 255,697,920 | 10910.5 | 94 | 0.96 (0.95-0.97) × dense |

At the demo's size, timed by phase, a step of ``top1`` takes 24 ms more than the dense one: 18 in the forward and
backward passes of its three layers (their routers 3 to 4, and 2 for calls into torch, whatever their size), 2 in
losses, 4 in the norm, clipping and AdamW, which have 3.4 times as many parameters to see.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from interleaved import CLOCKS, Timed, measure, ratio, spread
from torch import Tensor

from moectl.config.schema import MoEConfig, OptimConfig
from moectl.models.config import SIZES, DecoderConfig
from moectl.models.decoder import Decoder, GatedMLP
from moectl.training.optim import build_optimizer
from moectl.training.routing import StepRouting

#: By size: the decoder's shape, its layers with experts, and blocks, their length and the vocabulary of a step.
SHAPES: dict[str, tuple[dict[str, int], str, tuple[int, int, int]]] = {
    "tiny": (SIZES["tiny"], "1,2,3", (12, 128, 2048)),
    # GPT-2's own MLP, 768 -> 3,072 -> 768, has as many weights as a gated one of 2,048.
    "gpt2-small": (
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_layers": 12,
            "num_heads": 12,
            "num_kv_heads": 12,
            "head_dim": 64,
        },
        "last:4",
        (4, 512, 50257),
    ),
}
DOMAINS = 3
MODELS = ("dense", "dense, 2F", "top1", "switch", "top2", "top4 of 16, F/4", "top1, loop")


class Workload(NamedTuple):
    """Random tokens in blocks of three documents, one domain per block, as the packed corpus has them."""

    ids: Tensor
    docs: Tensor
    domains: Tensor

    @classmethod
    def random(cls, batch: int, block: int, vocabulary: int) -> Workload:
        ids = torch.randint(vocabulary, (batch, block))
        docs = (torch.arange(block) * 3).div(block, rounding_mode="floor").expand(batch, block)
        return cls(ids, docs, torch.arange(batch) % DOMAINS)

    @property
    def tokens(self) -> int:
        return self.ids.numel()


class TrainingStep:
    """A model with its optimizer; calling it does one optimizer step as the trainer does it."""

    def __init__(self, model: Decoder, moe: MoEConfig | None, work: Workload) -> None:
        self.model, self.moe, self.work = model.train(), moe, work
        self.optimizer = build_optimizer(model, OptimConfig())
        for layer in model.moe_layers().values():
            layer.experts.accumulate_gradients_in_place()

    def __call__(self) -> None:
        ids, docs, domains = self.work
        labels = ids[:, 1:].masked_fill(docs[:, 1:] != docs[:, :-1], -100)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.lm_loss_sum(ids[:, :-1], labels, docs[:, :-1]) / (labels >= 0).sum()
        routing = None
        if self.moe is not None:
            routing = StepRouting(self.model.moe_layers(), self.moe, DOMAINS, tokens=labels.numel())
            loss = loss + routing.losses(domains)[0]
        loss.backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if float(norm) > 0.999:
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self.optimizer.step()
        if routing is not None:
            for number, layer in routing.layers.items():
                layer.router.after_step(routing.steps[number].counts_E)


def build(
    shape: DecoderConfig, work: Workload, *, num_experts: int, layers: str, names: Sequence[str], seed: int
) -> dict[str, TrainingStep]:
    """Every model of these names from the same seed."""

    def step(
        router: str | None,
        backend: str = "grouped",
        size: int | None = None,
        experts: int = num_experts,
        **options: Any,
    ) -> TrainingStep:
        torch.manual_seed(seed)
        moe = router and MoEConfig(
            router={"name": router, **options},
            num_experts=experts,
            expert_intermediate_size=size,
            layers=layers,
            backend=backend,
        )
        return TrainingStep(Decoder(shape.with_moe(moe or None)), moe or None, work)

    def wide() -> TrainingStep:
        made = step(None)
        for layer in shape.with_moe(MoEConfig(layers=layers)).moe_layers:
            made.model.layers[layer].mlp = GatedMLP(shape.hidden_size, 2 * shape.intermediate_size)
        return TrainingStep(made.model, None, work)

    makers = {
        "dense": lambda: step(None),
        "dense, 2F": wide,
        "top1": lambda: step("top1"),
        "switch": lambda: step("switch"),
        "top2": lambda: step("top2"),
        "top4 of 16, F/4": lambda: step("topk", size=shape.intermediate_size // 4, top_k=4, experts=2 * num_experts),
        "top1, loop": lambda: step("top1", backend="loop"),
    }
    return {name: make() for name, make in makers.items() if name in names}


def bench(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model."""
    torch.manual_seed(arguments.seed)
    sizes, layers, workload = SHAPES[arguments.size]
    given = (arguments.batch_size, arguments.block_size, arguments.vocabulary)
    batch, block, vocabulary = (own if value is None else value for value, own in zip(given, workload, strict=True))
    work = Workload.random(batch, block, vocabulary)
    shape = DecoderConfig(vocab_size=vocabulary, **sizes)
    names = arguments.models.split("; ") if arguments.models else MODELS
    steps = build(shape, work, num_experts=arguments.experts, layers=layers, names=names, seed=arguments.seed)
    timed = {name: Timed(step) for name, step in steps.items()}
    seconds = measure(
        timed, rounds=arguments.rounds, clock=arguments.clock, warmup=arguments.warmup, max_seconds=float("inf")
    )
    rows = []
    for name, step in steps.items():
        partner = "dense, 2F" if name in ("dense, 2F", "top2") else "dense"
        rows.append(
            {
                "model": name,
                "partner": partner,
                "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
                "step_ms": spread(seconds[name]).median * 1e3,
                "tokens_per_second": work.tokens / spread(seconds[name]).median,
                "throughput_ratio": ratio(seconds[partner], seconds[name])._asdict(),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | parameters | step, ms | tokens/s | throughput ÷ dense of equal FLOPs |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        kept = "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["throughput_ratio"])
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['step_ms']:.1f} | {row['tokens_per_second']:,.0f} "
            f"| {kept} × {row['partner']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--models", help="some of the table's, separated by '; '; their partners are needed")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="default: the size's own")
    parser.add_argument("--block-size", type=int, help="default: the size's own")
    parser.add_argument("--vocabulary", type=int, help="default: the size's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: process time, for one thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = bench(arguments)
    setting = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    setting |= {key: value for key, value in vars(arguments).items() if key != "json"}
    if arguments.json:
        print(json.dumps({"setting": setting, "rows": rows}))
    else:
        print(", ".join(f"{key} {value}" for key, value in setting.items()), table(rows), sep="\n\n")


if __name__ == "__main__":
    main()

"""How much training throughput does the MoE keep, against the dense model of the same active FLOPs?

    python benchmarks/training_throughput.py                    # the table below
    python benchmarks/training_throughput.py --threads 1 --clock cpu --rounds 40

One whole optimizer step of the demo's models (size tiny; 8 experts in layers 1, 2 and 3; 12 blocks of
128 tokens; vocabulary 2,048): forward, language-model, balance and z-loss, backward, clipping, AdamW.
All models take turns in every round; a ratio is tokens per second over those of the dense model with
the same active FLOPs in the same round, the median over rounds, with quartiles. ``top2`` visits two
experts per token, so its partner is a dense model with MLPs twice as wide in those layers.
``top4 of 16, F/4`` is the quickstart's: four experts of a quarter of the dense MLP's neurons each.
``loop`` is the same model on the readable reference backend, one expert after the other in Python.

Two shared cores of a virtual Intel Xeon (AVX-512); torch 2.13.0+cpu, float32, two threads, wall clock, 25 rounds.

| model | parameters | step, ms | tokens/s | throughput ÷ dense of equal FLOPs |
|---|---|---|---|---|
| dense | 853,376 | 71.4 | 21,500 | 1.00 (1.00-1.00) × dense |
| dense, 2F | 1,148,288 | 84.9 | 18,100 | 1.00 (1.00-1.00) × dense, 2F |
| top1 | 2,920,832 | 93.5 | 16,433 | 0.76 (0.75-0.77) × dense |
| switch | 2,920,832 | 93.0 | 16,511 | 0.77 (0.76-0.78) × dense |
| top2 | 2,920,832 | 109.6 | 14,014 | 0.78 (0.77-0.79) × dense, 2F |
| top4 of 16, F/4 | 1,744,256 | 103.9 | 14,782 | 0.68 (0.67-0.71) × dense |
| top1, loop | 2,920,832 | 96.8 | 15,868 | 0.74 (0.73-0.75) × dense |
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import torch
from interleaved import CLOCKS, Timed, measure, ratio, spread
from torch import Tensor

from moectl.config.schema import MoEConfig, OptimConfig
from moectl.models.config import SIZES, DecoderConfig
from moectl.models.decoder import Decoder, GatedMLP
from moectl.training.optim import build_optimizer
from moectl.training.routing import StepRouting

MOE_LAYERS = "1,2,3"
DOMAINS = 3


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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if routing is not None:
            for number, layer in routing.layers.items():
                layer.router.after_step(routing.steps[number].counts_E)


def build(shape: DecoderConfig, work: Workload, num_experts: int, seed: int) -> dict[str, TrainingStep]:
    """Every model from the same seed."""

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
            layers=MOE_LAYERS,
            backend=backend,
        )
        return TrainingStep(Decoder(shape.with_moe(moe or None)), moe or None, work)

    steps = {"dense": step(None)}
    wide = step(None)
    for layer in shape.with_moe(MoEConfig(layers=MOE_LAYERS)).moe_layers:
        wide.model.layers[layer].mlp = GatedMLP(shape.hidden_size, 2 * shape.intermediate_size)
    steps["dense, 2F"] = TrainingStep(wide.model, None, work)
    return steps | {
        "top1": step("top1"),
        "switch": step("switch"),
        "top2": step("top2"),
        "top4 of 16, F/4": step("topk", size=shape.intermediate_size // 4, top_k=4, experts=2 * num_experts),
        "top1, loop": step("top1", backend="loop"),
    }


def bench(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model."""
    torch.manual_seed(arguments.seed)
    work = Workload.random(arguments.batch_size, arguments.block_size, arguments.vocabulary)
    shape = DecoderConfig(vocab_size=arguments.vocabulary, **SIZES[arguments.size])
    steps = build(shape, work, arguments.experts, arguments.seed)
    timed = {name: Timed(step) for name, step in steps.items()}
    seconds = measure(timed, rounds=arguments.rounds, clock=arguments.clock, warmup=3, max_seconds=float("inf"))
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
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
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

"""Which recipe makes specialisation emerge at the demo's size? Every recipe, every seed, one table.

    python benchmarks/recipes.py --out recipes.jsonl            # all recipes, seeds 0 1 2
    python benchmarks/recipes.py --only switch --seeds 0        # one
    python benchmarks/recipes.py --table --out recipes.jsonl    # the table of what is there

Each run trains from scratch on the shipped text (vocabulary 2,048, blocks of 128 tokens, 12 blocks a
step, every batch a random mix of the three domains), then reads the whole held-out split: NMI of
domain and expert per layer, beside the 95th percentile of 100 random gates on the same hidden states,
of 1,000 permutations of the domain labels over groups, and the value at step 0. Runs that are there
already are not trained again. About 4 minutes of one core per run. Results: docs/findings.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from moectl.runs.intervals import mean_interval

COMMON = [
    "data.tokenizer=bpe:2048",
    "data.block_size=128",
    "train.batch_size=12",
    "train.steps=1200",
    "train.threads=1",
    "train.eval_every=400",
    "train.checkpoint_every=1200",
    "moe.layers=1,2,3",
]
RECIPES: dict[str, list[str]] = {
    "top1": ["moe.router.name=top1"],
    "top1-quiet": ["moe.router.name=top1", "moe.router.noise_std=0", "moe.lb_coef=0.003"],
    "switch": ["moe.router.name=switch"],
    "switch-router-lr": ["moe.router.name=switch", "optim.router_lr=0.01"],
    "switch-weak-balance": ["moe.router.name=switch", "moe.lb_coef=0.001"],
    "switch-micro": [
        "moe.router.name=switch",
        "moe.balance_scope=micro",
        "train.grad_accum=4",
        "train.batch_size=3",
    ],
    "switch-last": ["moe.router.name=switch", "moe.layers=3"],
    "switch-no-balance": ["moe.router.name=switch", "moe.lb_coef=0", "moe.router.noise_std=0"],
    "top2": ["moe.router.name=top2"],
    # Active size equal to the dense model's: 2 experts of half its neurons, 4 of 16 with a quarter.
    "top2-half": ["moe.router.name=top2", "moe.expert_intermediate_size=128"],
    "top4-fine": [
        "moe.router.name=topk",
        "moe.router.top_k=4",
        "moe.num_experts=16",
        "moe.expert_intermediate_size=64",
    ],
}


def run(recipe: str, seed: int) -> dict[str, Any]:
    """Train (unless done) and inspect one run; the numbers that the table needs."""
    from moectl.config.loading import load_config
    from moectl.corpus.loader import PackedDataset
    from moectl.inspection.routing import inspect_routing
    from moectl.walk.loading import load_run
    from moectl.walk.train import RunRequest, start_run

    sets = [*COMMON, *RECIPES[recipe], f"train.seed={seed}", f"name=recipe-{recipe}-s{seed}"]
    started = time.process_time()
    outcome = start_run(load_config(None, sets=sets), RunRequest(command=["benchmarks/recipes.py", recipe, str(seed)]))
    loaded = load_run(outcome.folder)
    report = inspect_routing(
        loaded.model, PackedDataset.open(loaded.data), step0=load_run(outcome.folder, step=0).model
    )
    return {
        "recipe": recipe,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - started, 1),
        "lm_loss": outcome.metrics["eval/lm_loss"],
        "layers": [layer.to_dict() for layer in report.by_depth()],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: by recipe, layer and seed, NMI and its margin over the strongest reference; the verdict over seeds."""
    lines = [
        "| recipe | LM loss | CPU s | layer | NMI | gates, p95 | margin | mean [95 %] | emerged | busiest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = sorted((row for row in rows if row["recipe"] == recipe), key=lambda row: row["seed"])
        loss = " ".join(f"{row['lm_loss']:.3f}" for row in mine)
        cost = f"{sum(row['cpu_seconds'] for row in mine) / len(mine):.0f}"
        for index, layer in enumerate(mine[0]["layers"]):
            cells = [row["layers"][index] for row in mine]
            margins = [margin(cell["nmi"]) for cell in cells]
            spread = mean_interval(margins)
            known = spread.low is not None
            emerged = known and spread.low > 0 and all(cell["nmi"]["exceeds_all"] for cell in cells)
            name = (recipe, loss, cost) if index == 0 else ("", "", "")
            columns = (
                *name,
                layer["layer"],
                " ".join(f"{cell['nmi']['value']:.3f}" for cell in cells),
                " ".join(f"{cell['nmi']['null_random_router']['p95']:.3f}" for cell in cells),
                " ".join(f"{value:+.3f}" for value in margins),
                f"{spread.mean:+.3f}" + (f" [{spread.low:+.3f}, {spread.high:+.3f}]" if known else ""),
                f"not from {len(mine)}" if len(mine) < 3 else ("**yes**" if emerged else "no"),
                " ".join(f"{cell['max_share']:.2f}" for cell in cells),
            )
            lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def margin(nmi: dict[str, Any]) -> float:
    """NMI minus the strongest of its three references."""
    references = (nmi["null_permutation"]["p95"], nmi["null_random_router"]["p95"], nmi["step0"]["value"])
    return float(nmi["value"] - max(references))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of --out and stop")
    args = parser.parse_args()
    if not args.table:
        for seed in args.seeds:
            for recipe in args.only:
                row = run(recipe, seed)
                with args.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                print(f"{recipe} seed {seed}: {row['cpu_seconds']} CPU s", flush=True)
    latest = {(row["recipe"], row["seed"]): row for row in map(json.loads, args.out.read_text("utf-8").splitlines())}
    print(table(list(latest.values())))


if __name__ == "__main__":
    main()

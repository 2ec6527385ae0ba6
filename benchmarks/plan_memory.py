"""Does ``moectl plan`` say beforehand how much memory a run takes?

    python benchmarks/plan_memory.py                      # the table below
    python benchmarks/plan_memory.py --only small --threads 1

Each case is one whole run (the sample, vocabulary 8,192, blocks of 512; some steps, checkpoints, an
evaluation) in a process of its own. Measured is its peak resident memory (VmHWM) above what it had after
its imports; predicted is what the plan says before the run. Linux only.

Two shared cores of a virtual Intel Xeon (AVX-512); torch 2.13.0+cpu, float32, two threads, glibc.

| case | parameters | predicted, MB | measured, MB | error |
|---|---|---|---|---|
| tiny | 4,396,416 | 459 | 442 | +3.7% |
| tiny, dense | 1,639,808 | 365 | 368 | -0.7% |
| mini | 12,198,720 | 622 | 640 | -2.9% |
| mini, dense | 3,935,040 | 443 | 430 | +2.9% |
| small | 48,778,624 | 1,382 | 1,505 | -8.1% |
| small, dense | 15,736,192 | 718 | 677 | +6.2% |

``--precision bfloat16`` is not predicted on a CPU, and the plan says so: after 6 steps on one thread (AMX) tiny took
1,098 MB where 395 were planned, mini 1,115 (570), small 1,695 (1,387); dense ones 340 (306), 394 (379), 622 (659),
and 867 (540) with 192 rows of 64. With experts it grows with the steps, 1,705 MB after 24 and 1,776 after 60 in tiny:
oneDNN keeps a product for every number of tokens that an expert has had (869 MB after 24 with
``ONEDNN_PRIMITIVE_CACHE_CAPACITY=16``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALWAYS = ["train.steps=6", "optim.warmup_steps=1", "eval.batch_size=1", "eval.max_blocks=2", "train.device=cpu"]
CASES = {
    "tiny": ["train.batch_size=8"],
    "tiny, dense": ["train.batch_size=8", "preset=dense"],
    "mini": ["model.base=mini", "train.batch_size=4"],
    "mini, dense": ["model.base=mini", "train.batch_size=4", "preset=dense"],
    "small": ["model.base=small", "train.batch_size=2"],
    "small, dense": ["model.base=small", "train.batch_size=2", "preset=dense"],
}


def memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at its peak (ru_maxrss starts with the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def train(sets: list[str], threads: int) -> int:
    """One run in this process; its peak above what the imports left, in bytes."""
    import torch
    import torch._dynamo

    from moectl.config.loading import load_config
    from moectl.runs.store import Registry
    from moectl.walk.train import RunRequest, start_run

    torch.set_num_threads(threads)
    assert Registry and torch._dynamo  # both are imported late otherwise, by the run itself
    after_imports = memory("VmRSS")
    start_run(load_config(None, sets=sets), RunRequest())
    return memory("VmHWM") - after_imports


def measure(sets: list[str], threads: int) -> int:
    """The same, in a fresh process."""
    command = [sys.executable, __file__, "--train", json.dumps(sets), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def predict(sets: list[str]) -> dict[str, Any]:
    """What the plan says of this machine."""
    from moectl.config.loading import load_config
    from moectl.walk.plan import PlanRequest, plan_run

    return plan_run(load_config(None, sets=sets), PlanRequest(devices=["here"])).to_json()


def row(name: str, sets: list[str], threads: int) -> dict[str, Any]:
    """One line of the table."""
    plan = predict(sets)
    predicted, measured = plan["memory"]["cpu"]["peak"], measure(sets, threads)
    return {
        "case": name,
        "parameters": plan["parameters"]["total"],
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| case | parameters | predicted, MB | measured, MB | error |", "|---|---|---|---|---|"]
    for each in rows:
        lines.append(
            f"| {each['case']} | {each['parameters']:,} | {each['predicted'] / 1e6:,.0f} |"
            f" {each['measured'] / 1e6:,.0f} | {each['error']:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        print(train(json.loads(arguments.train), arguments.threads))
        return
    from moectl.config.schema import DataConfig
    from moectl.corpus.prepare import prepare

    with tempfile.TemporaryDirectory() as home:
        os.environ["MOECTL_HOME"] = home
        prepare(DataConfig())
        always = [*ALWAYS, f"train.precision={arguments.precision}"]
        rows = [row(name, [*always, *CASES[name]], arguments.threads) for name in arguments.only]
    print(json.dumps(rows) if arguments.json else table(rows))


if __name__ == "__main__":
    main()

"""Of the mistakes planted in two from-scratch Qwen3-MoEs, how many does compare-hf catch, and how many does it name?

    python benchmarks/diagnosis.py                 # the table below
    python benchmarks/diagnosis.py --only rope     # mutants whose name holds a word

Each mutant is one of the two examples in tests/parity/candidates with one mistake written into its text (see
tests/parity/mutants.py). It is loaded as anybody's candidate is, without an adapter, run in float64 on three
cases (on one with gradients, where only they show the mistake) beside Hugging Face's own module, and diagnosed.
*Caught*: a tensor differs by more than 1e-10 of its scale; *first* is the one that does. *Named*: the diagnosis
gives the planted mistake's class and no other; a class of several hypotheses (with "=") has one effect in this
configuration. *Equivalent*: the mistake changes nothing here, and is found to. A missing cast changes nothing in
float64; it is within every bound in bfloat16 too, and told by its bits. Two mistakes are no hypothesis's: they
must be caught, and get no name ("no").

torch 2.13.0+cpu, transformers 5.23.0; 50 s of CPU on one core:

| mistake | style | level | caught | first tensor | named | equivalent |
|---|---|---|---|---|---|---|
| top-k weights not normalised | modulelist | router | yes | mlp.weights | MOE016 = MOE011 |  |
| top-k weights not normalised | modulelist | moe | yes | mlp.weights | MOE016 = MOE011 |  |
| top-k weights not normalised | modulelist | model | yes | layers.0.mlp.weights | MOE016 = MOE011 |  |
| normalised though the config says not | modulelist | router | yes | mlp.weights | MOE016 = MOE015 |  |
| all probabilities normalised | modulelist | router | yes | mlp.weights | MOE016 = MOE011 |  |
| softmax after the top-k | modulelist | router | no |  |  | softmax-after-topk |
| softmax after the top-k, no normalisation | modulelist | moe | yes | mlp.weights | MOE016 = MOE015 |  |
| softmax once more after the top-k | modulelist | moe | yes | mlp.weights | MOE015 |  |
| softmax over tokens | modulelist | router | yes | mlp.chosen | MOE003 |  |
| softmax over tokens | modulelist | moe | yes | mlp.chosen | MOE003 |  |
| smallest experts chosen | modulelist | router | yes | mlp.chosen | MOE071 |  |
| indices sorted, weights not | modulelist | moe | yes | mlp.weights | MOE071 |  |
| sigmoid instead of softmax | modulelist | router | yes | mlp.weights | MOE100 |  |
| router logits in bfloat16 | modulelist | router | yes | mlp.router_logits | MOE027 |  |
| router logits in bfloat16 | modulelist | layer | yes | mlp.router_logits | MOE027 |  |
| router probabilities in bfloat16 | modulelist | router | yes | mlp.weights | MOE027 |  |
| normalisation ignored at k = E | modulelist | router | no |  |  | norm-topk |
| top-k weights not normalised | fused | router | yes | mlp.weights | MOE016 = MOE011 |  |
| top-k weights not normalised | fused | moe | yes | mlp.weights | MOE016 = MOE011 |  |
| normalised though the config says not | fused | moe | yes | mlp.weights | MOE016 = MOE015 |  |
| all probabilities normalised | fused | moe | yes | mlp.weights | MOE016 = MOE011 |  |
| softmax after the top-k | fused | router | no |  |  | softmax-after-topk |
| softmax after the top-k, no normalisation | fused | router | yes | mlp.weights | MOE016 = MOE015 |  |
| softmax once more after the top-k | fused | moe | yes | mlp.weights | MOE015 |  |
| softmax over tokens | fused | router | yes | mlp.chosen | MOE003 |  |
| smallest experts chosen | fused | moe | yes | mlp.chosen | MOE071 |  |
| indices sorted, weights not | fused | router | yes | mlp.weights | MOE071 |  |
| router logits in float16 | fused | moe | yes | mlp.router_logits | MOE027 |  |
| router probabilities in bfloat16 | fused | router | yes | mlp.weights | MOE027 |  |
| normalisation ignored at k = E | fused | moe | no |  |  | norm-topk |
| gate and up swapped | modulelist | moe | yes | mlp.expert_outputs | MOE007 |  |
| gate and up swapped | modulelist | model | yes | layers.0.mlp.expert_outputs | MOE007 |  |
| experts permuted | modulelist | moe | yes | mlp.routed | MOE017 |  |
| experts permuted: off by one | modulelist | moe | yes | mlp.routed | MOE017 |  |
| down reshaped, not transposed | modulelist | moe | yes | mlp.expert_outputs | MOE018 |  |
| combine weights not applied | modulelist | moe | yes | mlp.routed | MOE065 |  |
| combine weights on the input | modulelist | moe | yes | mlp.routed | MOE066 |  |
| gelu instead of silu | modulelist | moe | yes | mlp.expert_outputs | MOE064 |  |
| relu instead of silu | modulelist | layer | yes | mlp.expert_outputs | MOE064 |  |
| tokens over capacity dropped | modulelist | moe | yes | mlp.routed | MOE028 |  |
| capacity off by one | modulelist | moe | yes | mlp.routed | MOE031 |  |
| shared expert added | modulelist | moe | yes | mlp.output | MOE029 |  |
| counts used as offsets | modulelist | moe | yes | mlp.routed | MOE010 |  |
| outputs overwritten, not added | modulelist | moe | yes | mlp.routed | MOE101 |  |
| gate and up swapped | fused | moe | yes | mlp.routed | MOE007 |  |
| gate and up interleaved | fused | moe | yes | mlp.routed | MOE082 |  |
| experts permuted | fused | moe | yes | mlp.routed | MOE017 |  |
| experts permuted | fused | model | yes | layers.0.mlp.routed | MOE017 |  |
| down reshaped, not transposed | fused | moe | yes | mlp.routed | MOE018 |  |
| gate and up reshaped, not transposed | fused | moe | yes | mlp.routed | MOE018 |  |
| gate reshaped, not transposed | fused | router | yes | mlp.router_logits | MOE018 |  |
| combine weights not applied | fused | moe | yes | mlp.routed | MOE065 |  |
| combine weights on the input | fused | moe | yes | mlp.routed | MOE066 |  |
| gelu (tanh) instead of silu | fused | moe | yes | mlp.routed | MOE064 |  |
| sigmoid instead of silu | fused | moe | yes | mlp.routed | MOE064 |  |
| tokens over capacity dropped | fused | moe | yes | mlp.routed | MOE028 |  |
| capacity off by one | fused | moe | yes | mlp.routed | MOE031 |  |
| shared expert added | fused | moe | yes | mlp.output | MOE029 |  |
| counts used as offsets | fused | moe | yes | mlp.routed | MOE010 |  |
| weights of the best choice for all | fused | moe | yes | mlp.routed | MOE102 |  |
| only the best choice computed | modulelist | moe | yes | mlp.routed | MOE101 |  |
| weights of the best choice for all | modulelist | moe | yes | mlp.weights | MOE102 |  |
| sorted rows, unsorted weights | modulelist | moe | yes | mlp.routed | MOE105 |  |
| sort not undone | modulelist | moe | yes | mlp.routed | MOE076 |  |
| token ids repeated, not interleaved | modulelist | moe | yes | mlp.routed | MOE077 |  |
| logits divided by the root of the width | modulelist | router | yes | mlp.weights | MOE104 |  |
| outputs overwritten, not added | fused | moe | yes | mlp.routed | MOE101 |  |
| logits divided by a temperature | fused | moe | yes | mlp.weights | MOE104 |  |
| sigmoid instead of softmax | fused | router | yes | mlp.weights | MOE100 |  |
| RoPE interleaved | modulelist | attention | yes | rope.cos | MOE019 |  |
| RoPE tables interleaved | modulelist | attention | yes | rope.cos | MOE001 = MOE019 |  |
| RoPE rotation of neighbours | modulelist | layer | yes | attn.q_rotated | MOE019 |  |
| RoPE rotated backwards | modulelist | attention | yes | attn.q_rotated | MOE001 |  |
| RoPE theta 1e6 | modulelist | attention | yes | rope.cos | MOE020 |  |
| RoPE theta 12345 | modulelist | attention | yes | rope.cos | MOE020 |  |
| RoPE theta 5e5 | modulelist | model | yes | rope.cos | MOE020 |  |
| RoPE exponents i/P | modulelist | attention | yes | rope.cos | MOE020 |  |
| positions off by one | modulelist | attention | yes | rope.cos | MOE021 |  |
| values rotated | modulelist | attention | yes | attn.heads | MOE097 |  |
| q/k norm missing | modulelist | attention | yes | attn.q_rotated | MOE022 |  |
| k norm missing | modulelist | attention | yes | attn.k_rotated | MOE022 |  |
| q/k norm over all heads | modulelist | attention | yes | attn.q_rotated | MOE002 |  |
| q/k norm after the rotation | modulelist | attention | yes | attn.q | MOE098 |  |
| scale of the hidden size | modulelist | attention | yes | attn.heads | MOE023 |  |
| no attention scale | modulelist | layer | yes | attn.heads | MOE023 |  |
| no causal mask | modulelist | attention | yes | attn.heads | MOE006 |  |
| no causal mask | modulelist | model | yes | layers.0.attn.heads | MOE006 |  |
| causal mask lets the next token in | modulelist | attention | yes | attn.heads | MOE006 |  |
| padding attended to | modulelist | attention | yes | attn.heads | MOE061 |  |
| softmax over queries | modulelist | attention | yes | attn.heads | MOE003 |  |
| key/value heads tiled | modulelist | attention | yes | attn.heads | MOE024 |  |
| key/value heads tiled, one for each | modulelist | attention | no |  |  | kv-order |
| output reshaped before transpose | modulelist | attention | yes | attn.heads | MOE004 |  |
| q, k, v reshaped without transpose | modulelist | attention | yes | attn.q | MOE004 |  |
| biases present | modulelist | attention | yes | attn.q | MOE005 |  |
| output bias present | modulelist | layer | yes | attn.output | MOE005 |  |
| output projection untransposed | modulelist | attention | yes | attn.output | MOE018 |  |
| RoPE rotation of neighbours | fused | attention | yes | attn.q_rotated | MOE019 |  |
| RoPE interleaved | fused | model | yes | rope.cos | MOE019 |  |
| RoPE without the minus | fused | attention | yes | attn.q_rotated | MOE001 |  |
| RoPE theta 1e6 | fused | model | yes | rope.cos | MOE020 |  |
| positions off by one | fused | model | yes | rope.cos | MOE021 |  |
| RoPE table cut at the wrong end | fused | model | yes | rope.cos | MOE014 |  |
| RoPE table cut at the wrong end | modulelist | attention | yes | rope.cos | MOE014 |  |
| no rotation | modulelist | attention | yes | attn.heads | MOE096 |  |
| mask after the softmax | modulelist | attention | yes | attn.heads | MOE006 |  |
| values rotated | fused | attention | yes | attn.heads | MOE097 |  |
| q/k norm missing | fused | attention | yes | attn.q_rotated | MOE022 |  |
| q/k norm after the rotation | fused | attention | yes | attn.q | MOE098 |  |
| scaled twice | fused | attention | yes | attn.heads | MOE023 |  |
| no causal mask | fused | attention | yes | attn.heads | MOE006 |  |
| padding attended to | fused | attention | yes | attn.heads | MOE061 |  |
| key/value heads tiled | fused | attention | yes | attn.heads | MOE024 |  |
| output reshaped before transpose | fused | attention | yes | attn.heads | MOE004 |  |
| biases present | fused | attention | yes | attn.q | MOE005 |  |
| output projection untransposed | fused | attention | yes | attn.output | MOE018 |  |
| RMSNorm epsilon 1e-5 | modulelist | layer | yes | attn.input | MOE025 |  |
| RMSNorm epsilon 1e-5 | modulelist | attention | yes | attn.q | MOE025 |  |
| RMSNorm epsilon beside the root | modulelist | attention | yes | attn.q | MOE025 |  |
| RMSNorm statistic in bfloat16 | modulelist | layer | yes | attn.input | MOE026 |  |
| 1 + weight in RMSNorm | modulelist | layer | yes | attn.input | MOE074 |  |
| LayerNorm for RMSNorm | modulelist | layer | yes | attn.input | MOE099 |  |
| attention residual after the norm | modulelist | layer | yes | attn.residual | MOE067 |  |
| MLP residual missing | modulelist | layer | yes | mlp.residual | MOE067 |  |
| embedding tied | modulelist | model | yes | logits | MOE030 |  |
| last norm missing | modulelist | model | yes | logits | MOE099 |  |
| RMSNorm epsilon 1e-8 | fused | layer | yes | attn.input | MOE025 |  |
| RMSNorm epsilon 1e-5 | fused | model | yes | layers.0.attn.input | MOE025 |  |
| RMSNorm statistic in bfloat16 | fused | layer | yes | attn.input | MOE026 |  |
| RMSNorm weight left out | fused | attention | yes | attn.q | MOE074 |  |
| attention residual missing | fused | layer | yes | attn.residual | MOE067 |  |
| MLP residual after the norm | fused | layer | yes | mlp.residual | MOE067 |  |
| embedding tied | fused | model | yes | logits | MOE030 |  |
| norms after the additions | modulelist | layer | yes | attn.input | MOE106 |  |
| attention and MLP in parallel | fused | model | yes | layers.0.attn.residual | MOE106 |  |
| no norm before the MLP | fused | layer | yes | mlp.router_logits | MOE099 |  |
| attention limited to a window | modulelist | attention | yes | attn.heads | MOE103 |  |
| attention limited to a window | fused | layer | yes | attn.heads | MOE103 |  |
| no rotation | fused | attention | yes | attn.q_rotated | MOE096 |  |
| router under no_grad | modulelist | moe | yes | grad.input | MOE032 = MOE095 |  |
| router under no_grad | modulelist | model | yes | grad.input | MOE032 = MOE095 |  |
| combine weights detached | modulelist | layer | yes | grad.input | MOE032 = MOE095 |  |
| combine weights detached | modulelist | router | yes | grad.input | MOE032 = MOE095 |  |
| router's input detached | modulelist | moe | yes | grad.input | MOE095 |  |
| sum of the chosen detached | modulelist | router | yes | grad.input | MOE095 |  |
| experts' input detached | modulelist | moe | yes | grad.input | MOE095 |  |
| experts' outputs detached | modulelist | moe | yes | grad.input | MOE095 |  |
| an expert frozen | modulelist | moe | yes | grad.experts.gate_up_proj | MOE095 = MOE059 |  |
| gate frozen | modulelist | layer | yes | grad.mlp.gate.weight | MOE032 = MOE095 = MOE059 |  |
| values detached | modulelist | attention | yes | grad.input | MOE095 |  |
| norm's statistic under no_grad | modulelist | layer | yes | grad.input | MOE095 |  |
| residual detached | modulelist | layer | yes | grad.input | MOE095 |  |
| router under no_grad | fused | moe | yes | grad.input | MOE032 = MOE095 |  |
| combine weights detached | fused | moe | yes | grad.input | MOE032 = MOE095 |  |
| combine weights detached | fused | model | yes | grad.input | MOE032 = MOE095 |  |
| router's input detached | fused | layer | yes | grad.input | MOE095 |  |
| experts' input detached | fused | moe | yes | grad.input | MOE095 |  |
| expert weights as .data | fused | moe | yes | grad.experts.down_proj | MOE095 = MOE059 |  |
| gate's weight as .data | fused | router | yes | grad.weight | MOE032 = MOE095 = MOE059 |  |
| keys and values under no_grad | fused | attention | yes | grad.input | MOE095 |  |
| norm's statistic detached | fused | layer | yes | grad.input | MOE095 |  |
| expert outputs clamped | modulelist | moe | yes | mlp.routed | no |  |
| keys averaged over neighbours | fused | attention | yes | attn.k_rotated | no |  |
| RMSNorm not in float32 | modulelist | layer | in bfloat16, by its bits | attn.input | MOE026 |  |
| RMSNorm not in float32 | modulelist | attention | in bfloat16, by its bits | attn.q | MOE026 |  |
| softmax not in float32 | modulelist | router | in bfloat16, by its bits | mlp.weights | MOE027 |  |
| RMSNorm not in float32 | fused | layer | in bfloat16, by its bits | attn.input | MOE026 |  |
| softmax not in float32 | fused | moe | in bfloat16, by its bits | mlp.weights | MOE027 |  |

planted 168, of which 5 change nothing and are found equivalent; of the other 163: caught 163 (5 in bfloat16
alone), named 161, wrongly named 0, left without a name 2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moectl.parity.diagnosis.diagnose import equivalent_here
from tests.parity.judging import cases_and_answers, judge, judge_in_bfloat16
from tests.parity.mutants import MUTANTS, Mutant

HEADER = ("mistake", "style", "level", "caught", "first tensor", "named", "equivalent")


def row(mutant: Mutant, folder: Path) -> dict[str, Any]:
    judgement = judge(mutant, folder)
    findings = judgement.diagnosis.findings if judgement.diagnosis is not None else ()
    named, first, dtype = mutant.named, judgement.first, "float64"
    if mutant.in_bfloat16 and not first:
        name = mutant.in_bfloat16.split()[0]
        findings = judge_in_bfloat16(mutant, folder)
        named, dtype = frozenset([name]), "bfloat16"
        first = next((finding.tensor for finding in findings), "")
    called = frozenset(name for finding in findings for name in finding.hypotheses)
    equivalent = not first and bool(mutant.equivalent)
    if equivalent:
        equivalent = mutant.equivalent in equivalent_here("qwen3", cases_and_answers(mutant.level, mutant.config)[0])
    return {
        "mistake": mutant.mistake,
        "style": mutant.style,
        "level": mutant.level,
        "dtype": dtype,
        "caught": bool(first),
        "first tensor": first,
        "named": len(findings) == 1 and called == named,
        "called": [list(finding.hypotheses) for finding in findings],
        "codes": [list(finding.codes) for finding in findings],
        "equivalent": mutant.equivalent if equivalent else "",
    }


def table_line(row: dict[str, Any]) -> str:
    codes = "; ".join(" = ".join(c) or " = ".join(n) for c, n in zip(row["codes"], row["called"], strict=True))
    named = codes if row["named"] else f"wrongly: {codes}" if row["called"] else "no" if row["caught"] else ""
    caught = ("yes" if row["dtype"] == "float64" else "in bfloat16, by its bits") if row["caught"] else "no"
    cells = (row["mistake"], row["style"], row["level"], caught, row["first tensor"], named, row["equivalent"])
    return f"| {' | '.join(cells)} |"


def totals(rows: list[dict[str, Any]]) -> str:
    real = [row for row in rows if not row["equivalent"]]
    return (
        f"planted {len(rows)}, of which {len(rows) - len(real)} change nothing and are found equivalent; of the other "
        f"{len(real)}: caught {sum(row['caught'] for row in real)} ({sum(row['dtype'] != 'float64' for row in real)} "
        f"in bfloat16 alone), named {sum(row['named'] for row in real)}, "
        f"wrongly named {sum(bool(row['called']) and not row['named'] for row in real)}, "
        f"left without a name {sum(row['caught'] and not row['called'] for row in real)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    parser.add_argument("--json", action="store_true", help="one document instead of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mutant in MUTANTS:
            if arguments.only in mutant.id:
                rows.append(row(mutant, Path(folder)))
    if arguments.json:
        print(json.dumps({"rows": rows, "totals": totals(rows)}, indent=2))
        return
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for each in rows:
        print(table_line(each))
    print(f"\n{totals(rows)}")


if __name__ == "__main__":
    main()

"""Probes of the router: loads, extreme scores, ties, how many experts and with what weights.

Routers are steered through the first feature of what they read, which these cases make large and
positive in every token.

Shape suffixes: E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, Level, Unsupported, Weights
from moectl.parity.probes.bench import Bench
from moectl.parity.probes.probe import Probe

ROUTED: tuple[Level, ...] = ("model", "layer", "moe", "router")
#: Of that feature: of a token that goes to a router as it is, and of one that is normed on the way.
STEADY, STEADY_NORMED = 4.0, 8.0
#: Of the logits, at full size.
EXTREME = 80.0
#: How far the rows of near twins are apart, relatively: far below what counts as a tie.
NEAR = {torch.float64: 1e-12, torch.float32: 1e-7}


def steered(bench: Bench, change: Callable[[Tensor], Tensor]) -> tuple[Weights, Inputs]:
    """Weights and inputs with which every router sees a large first feature, and has its matrix changed."""
    steady = STEADY_NORMED if bench.level in ("model", "layer") else STEADY
    weights = dict(bench.with_routers(change))
    for name, tensor in weights.items():
        if name.endswith("embed_tokens.weight"):
            weights[name] = tensor.index_fill(1, torch.tensor(0), steady)
        elif name.endswith("post_attention_layernorm.weight"):
            weights[name] = tensor.index_fill(0, torch.tensor(0), 1.0)
    return weights, bench.inputs(steady=steady)


def _takes_all(bench: Bench) -> Iterator[Case]:
    def change(weight_ED: Tensor) -> Tensor:
        weight_ED = weight_ED.index_fill(1, torch.tensor(0), 0.0)
        weight_ED[0, 0] = 2.0
        return weight_ED

    weights, inputs = steered(bench, change)
    yield bench.case("one-expert-takes-all", inputs, weights=weights)


def _idle(bench: Bench) -> Iterator[Case]:
    experts, top_k = bench.formula.router.num_experts, bench.formula.router.top_k
    if top_k > experts // 2:
        raise Unsupported(f"{top_k} of {experts} experts are chosen: half of them cannot be idle")

    def change(weight_ED: Tensor) -> Tensor:
        weight_ED = weight_ED.index_fill(1, torch.tensor(0), 0.0)
        weight_ED[experts // 2 :, 0] = -2.0
        return weight_ED

    weights, inputs = steered(bench, change)
    yield bench.case("idle-experts", inputs, weights=weights)


def _alike(bench: Bench) -> Iterator[Case]:
    yield bench.case("tokens-alike", bench.inputs(alike=True))


def _extreme(bench: Bench) -> Iterator[Case]:
    inputs = bench.inputs()
    assert inputs.hidden is not None
    hidden_TD = inputs.hidden.double().reshape(-1, inputs.hidden.shape[-1])

    def change(weight_ED: Tensor) -> Tensor:
        return weight_ED * (EXTREME / (hidden_TD @ weight_ED.T).abs().max())

    yield bench.case("logits-80", inputs, weights=bench.with_routers(change))


def _exact_ties(bench: Bench) -> Iterator[Case]:
    def change(rows_ED: Tensor) -> Tensor:
        return torch.cat([rows_ED[:1].expand(len(rows_ED) // 2, -1), rows_ED[len(rows_ED) // 2 :]])

    yield bench.case("exact-ties", weights=bench.with_routers(change, biases=True))
    yield bench.case("exact-ties", weights=bench.with_routers(torch.zeros_like, biases=True))


def _near_ties(bench: Bench) -> Iterator[Case]:
    def change(rows_ED: Tensor) -> Tensor:
        half = len(rows_ED) // 2
        apart_E1 = 1.0 + NEAR[bench.dtype] * torch.arange(half, dtype=rows_ED.dtype)[:, None]
        return torch.cat([rows_ED[:1] * apart_E1, rows_ED[half:]])

    yield bench.case("near-ties", weights=bench.with_routers(change, biases=True))


def _norm_topk(bench: Bench) -> Iterator[Case]:
    if "norm_topk_prob" not in bench.config:
        raise Unsupported(f"{bench.family} has no norm_topk_prob")
    for value in (True, False):
        yield bench.changed(norm_topk_prob=value).case("norm-topk-prob")


def _k_one(bench: Bench) -> Iterator[Case]:
    yield bench.changed(num_experts_per_tok=1).case("k-1")


def _k_all(bench: Bench) -> Iterator[Case]:
    router = bench.formula.router
    groups = {"topk_group": router.groups} if router.groups > 1 else {}
    yield bench.changed(num_experts_per_tok=router.num_experts, **groups).case("k-all")


PROBES = (
    Probe("one-expert-takes-all", "every token goes to expert 0", _takes_all, ROUTED),
    Probe("idle-experts", "half of the experts get no token", _idle, ROUTED),
    Probe("tokens-alike", "every token is the same", _alike, ROUTED),
    # In a whole model, steep routers make rounding large by themselves: the question is the component's.
    Probe("logits-80", "router logits up to ±80", _extreme, ("moe", "router")),
    Probe("exact-ties", "half of the experts score the same; all of them do", _exact_ties, ROUTED),
    Probe("near-ties", "scores that differ by less than rounding", _near_ties, ROUTED),
    Probe("norm-topk-prob", "chosen weights renormalised, and not", _norm_topk, ROUTED),
    Probe("k-1", "one expert for each token", _k_one, ROUTED),
    Probe("k-all", "every expert for each token", _k_all, ROUTED),
)

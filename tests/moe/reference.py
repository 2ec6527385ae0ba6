"""Slow, obvious definitions: one token, one expert at a time, in plain Python. No code of moectl's runs here.

Also the strategies that draw shapes, and helpers that build a routing decision by hand, or a small layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from moectl.moe import Experts, GatedExperts, MLPExperts, MoELayer, RouterOutput
from moectl.routers import build_router

HIDDEN, INTERMEDIATE = 6, 5

ROUTERS = ["top1", "switch", "topk", "topk-raw"]
EXPERTS: dict[str, type[Experts]] = {"gated": GatedExperts, "mlp": MLPExperts}


@dataclass(frozen=True)
class Case:
    """A routing decision as Python lists: who goes where, and which slots are in use."""

    num_experts: int
    top_k: int
    chosen: list[list[int]]
    keep: list[list[bool]] | None
    seed: int

    @property
    def num_tokens(self) -> int:
        return len(self.chosen)

    def assignments(self) -> list[tuple[int, int, int]]:
        """``(expert, token, slot)`` of every slot in use, ordered by expert, then token, then slot."""
        used = [
            (expert, token, slot)
            for token, row in enumerate(self.chosen)
            for slot, expert in enumerate(row)
            if self.keep is None or self.keep[token][slot]
        ]
        return sorted(used)

    def routing(self, dtype: torch.dtype = torch.float64) -> RouterOutput:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.num_tokens, self.top_k)
        weights = torch.rand(shape, generator=generator, dtype=dtype)
        indices = torch.tensor(self.chosen, dtype=torch.int64).reshape(shape)
        keep = None if self.keep is None else torch.tensor(self.keep, dtype=torch.bool).reshape(shape)
        return by_hand(indices, weights, self.num_experts, keep)


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 20, max_experts: int = 6) -> Case:
    """T 0-20, E 1-6, k 1-E; experts drawn from a subset, so that some stay empty or one takes all."""
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, max_tokens))
    popular = draw(st.integers(top_k, num_experts))  # experts from here on never get a token
    offset = draw(st.integers(0, num_experts - 1))
    row = st.permutations(range(popular)).map(lambda order: [(e + offset) % num_experts for e in order[:top_k]])
    chosen = draw(st.lists(row, min_size=num_tokens, max_size=num_tokens))
    slots = st.lists(st.booleans(), min_size=top_k, max_size=top_k)
    keep = draw(st.none() | st.lists(slots, min_size=num_tokens, max_size=num_tokens))
    return Case(num_experts, top_k, chosen, keep, draw(st.integers(0, 2**31)))


def by_hand(
    indices: Tensor, weights: Tensor, num_experts: int, keep: Tensor | None = None, probs: Tensor | None = None
) -> RouterOutput:
    """A routing decision; its distribution is uniform if not given (without capacity, dispatch does not look at it)."""
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
    if probs is None:
        probs = torch.full((indices.shape[0], num_experts), 1 / num_experts, dtype=weights.dtype)
    entropy = torch.full((indices.shape[0],), math.log(num_experts), dtype=weights.dtype)
    return RouterOutput(indices, weights, torch.zeros_like(probs), probs, probs, entropy, keep)


@st.composite
def crowded(draw: st.DrawFn, max_tokens: int = 14, max_experts: int = 5) -> tuple[Case, list[list[float]]]:
    """A case and its distribution ``[T][E]``: many ties, some zeros, chosen by it in some cases only."""
    case = draw(cases(max_tokens=max_tokens, max_experts=max_experts))
    grid = st.sampled_from([0.0, 0.125, 0.25, 0.25, 0.5, 1.0])  # not normalised: only the order and the ratios count
    row = st.lists(grid, min_size=case.num_experts, max_size=case.num_experts)
    probs = draw(st.lists(row, min_size=case.num_tokens, max_size=case.num_tokens))
    if draw(st.booleans()):
        best = [sorted(range(case.num_experts), key=lambda e, p=p: (-p[e], e))[: case.top_k] for p in probs]
        case = replace(case, chosen=best)
    return case, probs


def capacity_by_hand(factor: str, top_k: int, tokens: int, num_experts: int) -> int:
    """``ceil(k·T/E·factor)`` in exact fractions of the factor as it is written."""
    return math.ceil(Fraction(factor) * top_k * tokens / num_experts)


@dataclass(frozen=True)
class Limited:
    """What is left under a capacity: each slot's expert or None, and the losses by the expert first chosen."""

    experts: list[list[int | None]]
    dropped: list[int]


def limit_by_hand(case: Case, probs: list[list[float]], limit: int, overflow: str, fill: str) -> Limited:
    """One assignment after the other, in the order that ``fill`` names; every expert has ``limit`` places."""
    room = [limit] * case.num_experts
    wanted = [(token, slot, expert) for expert, token, slot in case.assignments()]
    found: dict[tuple[int, int], int] = {}
    # A token visits an expert once: under next-best, naming it twice asks for one more expert.
    twice = {
        (token, slot)
        for token, slot, expert in wanted
        if overflow == "next-best" and any((token, other, expert) in wanted for other in range(slot))
    }

    def take(token: int, slot: int, expert: int) -> None:
        if room[expert] > 0:
            room[expert] -= 1
            found[token, slot] = expert

    def substitute(token: int, expert: int) -> None:
        waiting = [slot for t, slot, _ in sorted(wanted) if t == token and (token, slot) not in found]
        named = [chosen for t, _, chosen in wanted if t == token]
        if waiting and expert not in named and probs[token][expert] > 0:
            take(token, waiting[0], expert)

    if fill == "position":
        for token in range(case.num_tokens):
            for _, slot, expert in sorted(a for a in wanted if a[0] == token and a[:2] not in twice):
                take(token, slot, expert)
            if overflow == "next-best":
                for expert in sorted(range(case.num_experts), key=lambda e, p=probs[token]: (-p[e], e)):
                    substitute(token, expert)
    else:
        for token, slot, expert in sorted(wanted, key=lambda a: (-probs[a[0]][a[2]], a[0], a[1])):
            if (token, slot) not in twice:
                take(token, slot, expert)
        if overflow == "next-best":
            pairs = [(token, expert) for token in range(case.num_tokens) for expert in range(case.num_experts)]
            for token, expert in sorted(pairs, key=lambda pair: (-probs[pair[0]][pair[1]], *pair)):
                substitute(token, expert)
    lost = Counter(expert for token, slot, expert in wanted if (token, slot) not in found)
    experts = [[found.get((token, slot)) for slot in range(case.top_k)] for token in range(case.num_tokens)]
    return Limited(experts, [lost[expert] for expert in range(case.num_experts)])


def apply_limit(routing: RouterOutput, limited: Limited) -> RouterOutput:
    """The decision that is left, with its graph: a substitute's weight is ``w · p(substitute) / p(chosen)``."""
    rows, chosen, keep = [], [], []
    for token, row in enumerate(limited.experts):
        for slot, expert in enumerate(row):
            first = int(routing.topk_indices[token, slot])
            weight = routing.topk_weights[token, slot]
            if expert is not None and expert != first:
                weight = weight * routing.router_probs[token, expert] / routing.router_probs[token, first]
            rows.append(weight if expert is not None else weight.detach() * 0.0)
            chosen.append(first if expert is None else expert)
            keep.append(expert is not None)
    shape = routing.topk_indices.shape
    weights = torch.stack(rows).reshape(shape) if rows else routing.topk_weights
    return routing._replace(
        topk_indices=torch.tensor(chosen, dtype=torch.int64).reshape(shape),
        topk_weights=weights,
        keep=torch.tensor(keep, dtype=torch.bool).reshape(shape),
    )


def expert_on_token(experts: Experts, expert: int, x_D: Tensor) -> Tensor:
    """One expert on one token, from its matrices alone."""
    if isinstance(experts, GatedExperts):
        half = experts.gate_up_proj.shape[1] // 2
        gate = experts.gate_up_proj[expert, :half] @ x_D
        up = experts.gate_up_proj[expert, half:] @ x_D
        return experts.down_proj[expert] @ (gate / (1 + torch.exp(-gate)) * up)
    assert isinstance(experts, MLPExperts)
    up = experts.up_proj[expert] @ x_D + experts.up_proj_bias[expert]
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return experts.down_proj[expert] @ gelu + experts.down_proj_bias[expert]


def mixture_by_token(x_TD: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
    """The routed sum, token by token: ``y_t = Σ_k w_tk · expert_k(x_t)`` over the slots in use."""
    rows = []
    for token in range(x_TD.shape[0]):
        total = x_TD[token] * 0.0
        for slot in range(routing.topk_indices.shape[1]):
            if routing.keep is None or routing.keep[token, slot]:
                expert = int(routing.topk_indices[token, slot])
                total = total + routing.topk_weights[token, slot] * expert_on_token(experts, expert, x_TD[token])
        rows.append(total)
    return torch.stack(rows) if rows else x_TD * 0.0


def make_experts(kind: str, num_experts: int, seed: int = 0, backend: str = "grouped", std: float = 0.5) -> Experts:
    """Small float64 experts whose biases are not zero, so that a forgotten bias shows."""
    torch.manual_seed(seed)
    experts = EXPERTS[kind](num_experts, HIDDEN, INTERMEDIATE, backend=backend).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return experts


def make_layer(
    router: str = "topk", experts: int = 4, k: int = 2, *, kind: str = "gated", backend: str = "grouped", seed: int = 0
) -> MoELayer:
    """A float64 layer without noise whose gate is large enough to be decided."""
    name, _, raw = router.partition("-")
    options = {"top_k": k, "norm_topk_prob": not raw} if name == "topk" else {}
    torch.manual_seed(seed)
    gate = build_router(name, hidden_size=HIDDEN, num_experts=experts, noise_std=0.0, **options)
    nn.init.normal_(gate.weight)
    return MoELayer(gate.double(), make_experts(kind, experts, seed, backend))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def decide_in_python(layer: MoELayer, router: str, x_TD: Tensor, real: list[bool]) -> RouterOutput:
    """The routing decision one token at a time, from the gate matrix and the definitions."""
    gate, k = layer.router.weight, layer.router.top_k
    rows, weights = [], []
    for x in x_TD:
        logits = [(gate[expert] * x).sum() for expert in range(gate.shape[0])]
        order = sorted(range(len(logits)), key=lambda expert: (-logits[expert].item(), expert))[:k]
        exps = [torch.exp(logit) for logit in logits]
        probs = [value / sum(exps) for value in exps]
        chosen = [probs[expert] for expert in order]
        if router == "top1":
            chosen = [1.0 + (p - p.detach()) for p in chosen]
        elif router == "topk":
            chosen = [p / sum(chosen) for p in chosen]
        rows.append(order)
        weights.append(torch.stack(chosen))
    shape = (len(rows), k)
    keep = torch.tensor(real, dtype=torch.bool)[:, None].expand(shape)
    weight_TK = torch.stack(weights) if weights else x_TD.new_zeros(shape)
    nothing = x_TD.new_zeros(len(rows), gate.shape[0])
    return RouterOutput(
        torch.tensor(rows, dtype=torch.int64).reshape(shape), weight_TK, nothing, nothing, nothing, nothing[:, 0], keep
    )


def gradients(build: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    """Gradients of a fixed, uneven functional of ``build()``: every output entry gets a weight of its own.

    A leaf that the output does not reach counts as zeros.
    """
    output = build()
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).reshape(output.shape)
    found = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]

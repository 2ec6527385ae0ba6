"""Which experts take as many FLOPs per token as the dense MLP that they stand for.

With gated experts of F columns, k of them routed and s shared, a token takes (k + s) · F columns of the
dense model's; equal exactly when (k + s) · F is the dense MLP's size. The gate comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from moectl.planning.anatomy import Anatomy

_GRANULARITIES = (1, 2, 4, 8)
_FIXED = ("top1", "top2", "switch")  # routers whose k cannot be chosen


@dataclass(frozen=True)
class Match:
    """One way.

    Attributes:
        changes: what it keeps and changes, in words.
        size: F of one expert. top_k: K. num_experts: E.
        sets: ``KEY=VALUE`` for ``--set``, complete.
        columns: of all experts that a token visits, over the dense MLP's: 1 is equal.
    """

    changes: str
    size: int
    top_k: int
    num_experts: int
    sets: tuple[str, ...]
    columns: float


def match_dense(model: Anatomy, *, router: str, n_shared: int = 0, granularity: int | None = None) -> list[Match]:
    """Ways to equal active FLOPs, nearest to the model as it is first; an expert's size is a whole number.

    Args:
        model: a MoE model.
        router: its router's name; where k changes, one that fixes it is replaced.
        n_shared: always-on experts.
        granularity: only this one: experts of 1/G of the dense MLP.
    """
    moe, dense = model.moe, model.config.intermediate_size
    assert moe is not None
    found: list[Match] = []

    def add(changes: str, size: int, top_k: int, num_experts: int) -> None:
        if size < 1 or not 1 <= top_k < num_experts:  # all of them: nothing to choose
            return
        sets = [] if size == moe.size else [f"moe.expert_intermediate_size={size}"]
        if top_k != moe.top_k:
            sets.append(_router(router, top_k))
        sets += [] if num_experts == moe.num_experts else [f"moe.num_experts={num_experts}"]
        match = Match(changes, size, top_k, num_experts, tuple(sets), (top_k + n_shared) * size / dense)
        if all(match.sets != other.sets for other in found):
            found.append(match)

    if granularity is None:
        add("the same E and k, other experts", round(dense / (moe.top_k + n_shared)), moe.top_k, moe.num_experts)
        if dense % moe.size == 0:
            add("the same experts, another k", moe.size, dense // moe.size - n_shared, moe.num_experts)
    neurons = moe.num_experts * moe.size
    for parts in _GRANULARITIES if granularity is None else (granularity,):
        if dense % parts == 0 and neurons % (dense // parts) == 0:
            size = dense // parts
            add(f"experts of 1/{parts} of the dense MLP, as many neurons", size, parts - n_shared, neurons // size)
    return sorted(found, key=lambda match: (abs(match.columns - 1) > 0, len(match.sets)))


def _router(name: str, top_k: int) -> str:
    """The setting that gives ``top_k``: one expert by the router whose gate still learns from it."""
    if top_k == 1:
        return "moe.router=top1"
    return f"moe.router={{name: topk, top_k: {top_k}}}" if name in _FIXED else f"moe.router.top_k={top_k}"

"""Which experts take as many FLOPs per token as the dense MLP that they stand for.

With gated experts of F columns, k of them routed and s shared, a token takes (k + s) · F columns of the
dense model's; equal exactly when (k + s) · F is the dense MLP's size. Where experts choose tokens, it takes
k times their own capacity factor in place of k. The gate comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from moectl.config.schema import MoEConfig
from moectl.planning.anatomy import Anatomy

_GRANULARITIES = (1, 2, 4, 8)
_FIXED = ("top1", "top2", "switch")  # routers whose k cannot be chosen


@dataclass(frozen=True)
class Matching:
    """That ways to equal the dense model's FLOPs are asked for.

    Attributes:
        granularity: only with experts of 1/G of the dense MLP; None for any.
        trained: the experts come out of a trained base, so that ``init: auto`` copies its MLPs.
    """

    granularity: int | None = None
    trained: bool = False


_ANY = Matching()


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


def match_dense(model: Anatomy, config: MoEConfig, asked: Matching = _ANY) -> list[Match]:
    """Ways to equal active FLOPs, nearest to the model as it is first; an expert's size is a whole number.

    Args:
        model: a MoE model.
        config: of its experts. Where k changes, a router that fixes it is replaced; parts of the dense MLP
            (``init: split``) stay parts, and copies of it may become parts, but have no other size.
        asked: which ways.
    """
    granularity = asked.granularity
    moe, dense = model.moe, model.config.intermediate_size
    assert moe is not None
    shared = config.n_shared_experts
    init = {True: "copy", False: "random"}[asked.trained] if config.init == "auto" else config.init
    found: list[Match] = []

    def add(changes: str, size: int, per_token: float, num_experts: int) -> None:
        top_k = round(per_token / moe.room)
        if abs(top_k * moe.room - per_token) > 1e-9:
            return
        if size < 1 or not 1 <= top_k < num_experts or per_token >= num_experts:  # all of them: nothing to choose
            return
        whole = moe.token_choice and (top_k + shared) * size == dense and num_experts % top_k == 0
        if size == moe.size:
            sets = []
        elif init == "random":
            sets = [f"moe.expert_intermediate_size={size}"]
        elif whole and init == "split":
            sets = [f"moe.granularity={dense // size}"]
        elif whole and init == "copy" and not config.allow_shrinking:
            sets = ["moe.init=split", f"moe.granularity={dense // size}"]
        else:
            return
        if init == "split" and not whole:
            return  # no whole groups of parts
        if top_k != moe.top_k:
            sets.append(_router(config.router_name, top_k, token_choice=moe.token_choice))
        sets += [] if num_experts == moe.num_experts else [f"moe.num_experts={num_experts}"]
        match = Match(changes, size, top_k, num_experts, tuple(sets), (per_token + shared) * size / dense)
        if all(match.sets != other.sets for other in found):
            found.append(match)

    now = moe.top_k * moe.room
    if granularity is None:
        add("the same E and k, other experts", round(dense / (now + shared)), now, moe.num_experts)
        if dense % moe.size == 0:
            add("the same experts, another k", moe.size, dense // moe.size - shared, moe.num_experts)
    neurons = moe.num_experts * moe.size
    for parts in _GRANULARITIES if granularity is None else (granularity,):
        if dense % parts == 0 and neurons % (dense // parts) == 0:
            size = dense // parts
            add(f"experts of 1/{parts} of the dense MLP, as many neurons", size, parts - shared, neurons // size)
    return sorted(found, key=lambda match: (abs(match.columns - 1) > 0, len(match.sets)))


def _router(name: str, top_k: int, *, token_choice: bool) -> str:
    """The setting that gives ``top_k``: one expert per token by the router whose gate still learns from it."""
    if top_k == 1 and token_choice:
        return "moe.router=top1"
    return f"moe.router={{name: topk, top_k: {top_k}}}" if name in _FIXED else f"moe.router.top_k={top_k}"

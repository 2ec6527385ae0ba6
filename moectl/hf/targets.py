"""The plain families of transformers that a model with experts can be exported to, and what each can say.

A table by data: every field is what the family's own code does, read in transformers 5.17 and 5.23. Whether a
model fits is decided by :func:`reasons`, which names all that stands in the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moectl.errors import unknown
from moectl.hf.export_facts import Facts

#: Neurons of a shared expert that has to be there and says nothing: zeros, and so many that devices can share them.
EMPTY_SHARED = 8


@dataclass(frozen=True)
class Target:
    """One family of transformers.

    Attributes:
        name: its ``model_type``; ``architecture`` is the class that loads it.
        layout: of its files with one tensor per expert; see :data:`moectl.hf.checkpoint_layouts.LAYOUTS`.
        dense: which layers may have a dense MLP: any, only those before the first with experts, or none.
        score: what a router's logits become.
        weights: whether the weights of the chosen can be their plain scores too, and not only renormalised ones.
        qk_norm: whether its attention norms queries and keys: always, never, or as the config says.
        qkv_bias, o_bias: whether its projections can have biases.
        window: which layers may look back only so far: any, all or none of them.
        shared: how a shared expert is added: not at all, plainly, or times a sigmoid, which is ½ for a zero gate.
        shared_required: a model without shared experts needs one of zeros.
        keys: what the family calls a thing in its config.
    """

    name: str
    architecture: str
    layout: str
    dense: Literal["any", "first", "none"]
    score: Literal["softmax", "sigmoid"]
    weights: Literal["both", "renormalised"]
    qk_norm: Literal["always", "never", "optional"]
    qkv_bias: bool
    o_bias: bool
    window: Literal["any", "all", "none"]
    shared: Literal["none", "plain", "gated"]
    shared_required: bool
    keys: Mapping[str, str]


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="mixtral", architecture="MixtralForCausalLM", layout="mixtral", dense="none",
            score="softmax", weights="renormalised", qk_norm="never", qkv_bias=False, o_bias=False,
            window="all", shared="none", shared_required=False,
            keys={"experts": "num_local_experts", "expert_size": "intermediate_size"},
        ),
        Target(
            name="qwen3_moe", architecture="Qwen3MoeForCausalLM", layout="qwen3", dense="any",
            score="softmax", weights="both", qk_norm="always", qkv_bias=True, o_bias=True,
            window="all", shared="none", shared_required=False,
            keys={"experts": "num_experts", "expert_size": "moe_intermediate_size"},
        ),
        Target(
            name="qwen2_moe", architecture="Qwen2MoeForCausalLM", layout="qwen2_moe", dense="any",
            score="softmax", weights="both", qk_norm="never", qkv_bias=True, o_bias=False,
            window="any", shared="gated", shared_required=True,
            keys={"experts": "num_experts", "expert_size": "moe_intermediate_size"},
        ),
        Target(
            name="glm4_moe", architecture="Glm4MoeForCausalLM", layout="qwen2_moe", dense="first",
            score="sigmoid", weights="both", qk_norm="optional", qkv_bias=True, o_bias=False,
            window="none", shared="plain", shared_required=False,
            keys={"experts": "n_routed_experts", "expert_size": "moe_intermediate_size"},
        ),
    )
}  # fmt: skip


def target(name: str) -> Target:
    """The target of that name. Raises ConfigError: there is none."""
    if name not in TARGETS:
        raise unknown("export family", name, [*TARGETS, "auto", "own"])
    return TARGETS[name]


def reasons(target: Target, facts: Facts, *, replicate_dense: bool = False) -> list[str]:
    """Why ``target`` cannot say what ``facts`` are, in sentences; empty where it can, exactly.

    Args:
        replicate_dense: dense layers may be written as so many equal experts.
    """
    return [
        *_attention(target, facts),
        *_dense(target, facts, replicate_dense),
        *_router(target, facts),
    ]


def extra_parameters(target: Target, facts: Facts, *, replicate_dense: bool = False) -> int:
    """Parameters that the target's form needs beyond the model's own."""
    dense = facts.layers - len(facts.moe_layers)
    if target.dense == "none" and dense and replicate_dense:
        one = 3 * facts.hidden_size * facts.dense_size
        return dense * ((facts.num_experts - 1) * one + facts.num_experts * facts.hidden_size)
    if target.shared == "gated":  # its gate, and experts of zeros where there are none
        empty = 0 if facts.shared_size else 3 * facts.hidden_size * EMPTY_SHARED
        return len(facts.moe_layers) * (facts.hidden_size + empty)
    return 0


def _attention(target: Target, facts: Facts) -> list[str]:
    found = []
    if not facts.gated:
        found.append(
            "the model is a GPT-2: learned positions, LayerNorm and GELU MLPs with biases, where"
            " the family has rotary positions, RMSNorm and gated MLPs"
        )
        return found
    if target.qk_norm == "always" and not facts.qk_norm:
        found.append("its attention norms queries and keys, the model's does not, and an RMSNorm is never the identity")
    if target.qk_norm == "never" and facts.qk_norm:
        found.append("the model's attention norms queries and keys (q/k norm), the family's does not")
    if facts.qkv_bias and not target.qkv_bias:
        found.append("the model's query, key and value projections have biases, the family's have none")
    if facts.o_bias and not target.o_bias:
        found.append("the model's attention output has a bias, the family's has none")
    if target.o_bias and facts.qkv_bias != facts.o_bias:
        found.append("the model has biases in some projections of its attention, the family in all or in none")
    if facts.window is not None and (
        target.window == "none" or (target.window == "all" and len(facts.sliding) < facts.layers)
    ):
        can = "none" if target.window == "none" else "all layers or none"
        found.append(
            f"{len(facts.sliding)} of {facts.layers} layers look back {facts.window} tokens only (a sliding window),"
            f" which the family has in {can}"
        )
    return found


def _dense(target: Target, facts: Facts, replicate_dense: bool) -> list[str]:
    found, dense = [], facts.layers - len(facts.moe_layers)
    if facts.gated and facts.mlp_bias and dense:
        found.append("the model's dense MLPs have biases, the family's have none")
    if target.dense == "none" and dense:
        if not replicate_dense:
            found.append(
                f"{dense} of {facts.layers} layers are dense, and all of the family's have experts"
                " (--replicate-dense writes a dense layer as equal experts: the same function, and larger)"
            )
        elif facts.dense_size != facts.expert_size:
            found.append(
                f"dense MLPs have {facts.dense_size} neurons and experts {facts.expert_size}: as experts they would"
                " have to be of one size"
            )
    if target.dense == "first" and facts.first_dense is None:
        found.append("dense layers lie between those with experts, and the family has them before the first only")
    if facts.shared_size and target.shared == "none":
        found.append("the model has shared experts, the family has none")
    if facts.shared_size and target.shared == "plain" and facts.shared_size % facts.expert_size:
        found.append(f"shared experts have {facts.shared_size} neurons, no multiple of an expert's {facts.expert_size}")
    return found


def _router(target: Target, facts: Facts) -> list[str]:
    router, found = facts.router, []
    if router.score != target.score:
        found.append(
            f"the router '{router.name}' scores experts by a {router.score}, the family by a {target.score}"
            + (" without a bias for the choice" if router.biased and target.score == "softmax" else "")
        )
    elif router.weights == "probability" and target.weights == "renormalised":
        found.append(
            f"the router '{router.name}' weighs its experts by their plain probabilities, which the family divides by"
            " their sum"
        )
    if router.clamp is not None:
        found.append(f"the router's logits are clamped to ±{router.clamp:g}, which the family does not do")
    if router.groups != (1, 1):
        found.append(
            f"the router chooses among {router.groups[1]} of {router.groups[0]} groups of experts, which releases of"
            " the family mask differently"
        )
    return found

"""The arithmetic of a model family as plain data, so that a mistake is a change of one field.

:func:`moectl.parity.reference.run` computes any :class:`Formula`. A family is a formula read from its
config; a hypothesis about somebody's code is the same formula with one field replaced. The first value
in each ``Literal`` is what Qwen3-MoE does; the others are other families' ways and known mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AttentionFormula:
    """Grouped-query attention with rotary positions.

    Attributes:
        qk_norm: over each head's dimension; over all heads with a weight of that whole size (OLMoE); none;
            or, a mistake, over all heads at once with one head's weight.
        rope_table: frequencies once after the other (``[f0 f1 .. f0 f1 ..]``), or each twice (``[f0 f0 f1 f1 ..]``).
        rope_rotation: pairs are (i, i + P/2), or neighbours (2i, 2i + 1).
        rope_sign: of the rotation ``(-x2, x1)``; backwards ``(x2, -x1)``; or, a mistake, no sign at all ``(x2, x1)``.
        rope_offset: added to every position.
        rope_offset_of: of queries and keys, or of one of them alone.
        causal_offset: how many later tokens a token sees besides.
        scale: the softmax's temperature: ``P^-1/2``; of the hidden size; of one over P; none at all.
        kv_repeat: query head h reads key/value head ``h // (H/G)``, or ``h % G``.
        merge: heads are transposed back before they are flattened, or not.
        softmax_over: keys, or queries, or heads.
        v_rotated: values are rotated too.
        clip_qkv: clamp of q, k, v before the split into heads (OLMoE), or None.
        split: projections are cut into heads ``[B, S, H, P]`` and transposed, or (a mistake) read as ``[B, H, S, P]``.
        mask_on: logits, before the softmax; or the probabilities, which then no longer sum to 1.
        rope_restarts: positions begin anew with every chunk of a cached run (a mistake, seen in chunks alone).
        window: how many tokens back one sees, itself included; None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    qk_norm: Literal["head", "flat", "none", "all_heads"] = "head"
    rope_table: Literal["halves", "interleaved"] = "halves"
    rope_rotation: Literal["halves", "neighbours"] = "halves"
    rope_sign: Literal["plus", "minus", "none"] = "plus"
    rope_offset: int = 0
    rope: bool = True
    v_rotated: bool = False
    scale: Literal["head_dim", "hidden_size", "one_over_head_dim", "none"] = "head_dim"
    causal: bool = True
    kv_repeat: Literal["grouped", "tiled"] = "grouped"
    merge: Literal["transposed", "reshaped"] = "transposed"
    softmax_over: Literal["keys", "queries", "heads"] = "keys"
    bias: bool = False
    out_bias: bool = False
    clip_qkv: float | None = None
    rope_offset_of: Literal["both", "q", "k"] = "both"
    causal_offset: int = 0
    split: Literal["transposed", "reshaped"] = "transposed"
    mask_on: Literal["logits", "probabilities"] = "logits"
    rope_restarts: bool = False
    window: int | None = None


@dataclass(frozen=True)
class RouterFormula:
    """From hidden states to chosen experts and weights.

    Attributes:
        score: softmax over all experts; sigmoid (DeepSeek-V3); softmax over the chosen alone (gpt-oss); softmax over
            all, and another one over the chosen probabilities (a mistake).
        softmax_over: experts, or tokens (a mistake).
        norm_topk: chosen weights are divided by their sum.
        choice_bias: a buffer is added to the scores for choosing, not for weighing (DeepSeek-V3).
        bias_weighs: the same buffer reaches the weights too (a mistake).
        groups, groups_kept: only the best groups of experts, by the sum of their two best, may be chosen.
        scaling: of the final weights.
        dtype: what logits are computed in; None for the input's.
        probs_dtype: what probabilities are rounded to before the choice; None for no rounding.
        choose: the largest scores, or the smallest.
        pairing: a chosen expert gets its own weight; or (mistakes) weights stay sorted by size while the indices are
            sorted by number, or the weights come in the reverse order, or all get that of the best.
        group_score: of a group: the sum of its two best, or its best.
        softmax_dtype: what the softmax is asked to compute in, and its result is in; None for the logits' or float32.
        probs_stay: rounded probabilities are also normalised in that dtype.
        group_mask: experts of other groups score minus infinity, or zero (which a negative bias makes eligible).
        logit_scale: the logits are multiplied by it: one over a temperature.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid", "softmax_chosen", "softmax_twice"] = "softmax"
    softmax_over: Literal["experts", "tokens"] = "experts"
    norm_topk: bool = True
    norm_all: bool = False
    choose: Literal["largest", "smallest"] = "largest"
    bias: bool = False
    choice_bias: bool = False
    bias_weighs: bool = False
    groups: int = 1
    groups_kept: int = 1
    scaling: float = 1.0
    norm_epsilon: float = 0.0
    dtype: Literal[None, "bfloat16", "float16", "float32"] = None
    probs_dtype: Literal[None, "bfloat16", "float16", "float32"] = None
    pairing: Literal["own", "sorted_indices", "reversed", "best"] = "own"
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    group_mask: Literal["minus_infinity", "zero"] = "minus_infinity"
    softmax_dtype: Literal[None, "bfloat16", "float16"] = None
    probs_stay: bool = False
    logit_scale: float = 1.0


@dataclass(frozen=True)
class ExpertsFormula:
    """The experts, and how tokens get to them and back.

    Attributes:
        layout: of the stacked weights: ``[E, 2F, D]`` and ``[E, D, F]``, or ``[E, D, 2F]`` and ``[E, F, D]`` (gpt-oss).
        gate_up: gate rows, then up rows; up first; or every other one (gpt-oss).
        activation: of the gate.
        glu: ``act(gate) · up``; or gpt-oss's ``(clamp(up) + 1) · gate · σ(α·gate)`` with gate clamped above.
        applied: the combine weight multiplies the expert's output, its input, or nothing.
        permutation: expert e computes with the weights of ``permutation[e]``.
        capacity: tokens that an expert takes, the earliest; None for no limit.
        offsets: rows of expert e in the sorted list begin after all earlier experts' counts, or (a mistake) at
            the count of the expert before it; ``counts_as_ends``: and end at its own count.
        shared: always-on experts: none; added (DeepSeek-V3); or gated by a sigmoid (Qwen2-MoE).
        capacity_order: who comes first: earlier tokens; all tokens' first choices (GShard); or larger weights.
        offset_rows: where wrong offsets make experts overlap, the later one overwrites, or both are added.
        combined: a token's experts are added up; or (mistakes) only one of them is left, the last by number or by
            rank, or the first by rank; or assignments sorted by expert meet weights in the order of tokens, or come
            back without being put in the order of tokens, their weights sorted too or not; or the token of assignment
            a is a mod T instead of a // K, where it is read or also where it comes back.
    """

    hidden_size: int
    intermediate_size: int
    layout: Literal["out_in", "in_out"] = "out_in"
    gate_up: Literal["gate_first", "up_first", "interleaved"] = "gate_first"
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid"] = "silu"
    glu: Literal["swiglu", "clamped"] = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0
    bias: bool = False
    applied: Literal["output", "input", "none"] = "output"
    permutation: tuple[int, ...] | None = None
    capacity: int | None = None
    offsets: Literal["cumulative", "counts", "counts_as_ends"] = "cumulative"
    shared: Literal["none", "added", "sigmoid_gated"] = "none"
    shared_intermediate_size: int = 0
    capacity_order: Literal["tokens", "slots", "weights"] = "tokens"
    offset_rows: Literal["overwritten", "added"] = "overwritten"
    combined: Literal[
        "added",
        "last_expert",
        "last_choice",
        "first_choice",
        "unsorted_weights",
        "unsorted_outputs",
        "unsorted_rows",
        "tiled_inputs",
        "tiled_tokens",
    ] = "added"


@dataclass(frozen=True)
class NormFormula:
    """RMSNorm.

    Attributes:
        weight: multiplies; is added to one first; or is not applied.
        dtype: of the statistic; None for float32 or the reference's own.
        kind: root mean square, or with the mean taken off (LayerNorm without bias), or nothing but the weight, or,
            a mistake, not even that.
        eps_place: under the root, or added to it.
        statistic_alone: ``dtype`` is that of the mean square, and not of the values that it divides.
        statistic_detached: no gradient passes through the mean square.
    """

    eps: float = 1e-6
    weight: Literal["scale", "one_plus", "none"] = "scale"
    dtype: Literal[None, "bfloat16", "float16"] = None
    kind: Literal["rms", "layer", "weight_only", "identity"] = "rms"
    eps_place: Literal["inside", "outside"] = "inside"
    statistic_alone: bool = False
    statistic_detached: bool = False


@dataclass(frozen=True)
class Formula:
    """A whole decoder.

    Attributes:
        moe_layers: which layers have experts; the others have a dense MLP of ``dense_intermediate_size``.
        residual_attn, residual_mlp: what is added back: the block's input, the normed input, or nothing.
        reshaped: roles whose weight is read as if its memory were its transpose (``w.reshape(in, out)`` where
            ``w.T`` is meant); a square one is used untransposed. Roles: q k v o router gate_up down lm_head, and
            gate and up, each half of ``gate_up`` by itself.
        norms: by role (attn, mlp, q, k, final) where one differs from ``norm``.
        casts: ``exact`` computes everything in the input's dtype (float32 at least); ``reference`` rounds where
            Hugging Face does: softmax, RMSNorm and rotary tables in float32 even for float64 input.
        router_name: of the router in canonical names: ``gate``, or ``router`` (gpt-oss).
        balance_in_objective: gradients are of loss + ``balance_coef`` · balance loss (config: output_router_logits).
        head_bias: the head adds ``lm_head.bias``.
        order: norm, part, addition; or the norm after the addition (post-norm); or attention and MLP beside each
            other, each of the norm of the layer's input.
        detached: where no gradient passes (mistakes): router_input, weights, normaliser, expert_input,
            expert_outputs, q, k, v, attn_residual, mlp_residual.
        padding_idx: the token whose embedding gets no gradient (``nn.Embedding(padding_idx=...)``). Whatever
            ``pad_token_id`` says, every comparison is made with None: it is a matter of training data, not a formula.
    """

    family: str
    attention: AttentionFormula
    router: RouterFormula
    experts: ExpertsFormula
    norm: NormFormula
    num_layers: int
    vocab_size: int
    moe_layers: tuple[int, ...]
    dense_intermediate_size: int = 0
    tie_embeddings: bool = False
    residual_attn: Literal["input", "normed", "none"] = "input"
    residual_mlp: Literal["input", "normed", "none"] = "input"
    qk_norm_after_rope: bool = False
    reshaped: tuple[str, ...] = ()
    balance_coef: float = 0.001
    casts: Literal["exact", "reference"] = "exact"
    norms: tuple[tuple[str, NormFormula], ...] = ()
    router_name: str = "gate"
    balance_in_objective: bool = False
    head_bias: bool = False
    padding_idx: int | None = None
    order: Literal["pre_norm", "post_norm", "parallel"] = "pre_norm"
    detached: tuple[str, ...] = ()

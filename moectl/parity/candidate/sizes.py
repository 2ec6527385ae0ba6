"""The sizes of a comparison by their letters, and the canonical weights as pieces with a role.

Sizes: D hidden, F expert intermediate, E experts, K experts per token, H heads, G key/value heads, P head dimension,
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moectl.parity.formula import Formula

LETTERS = "DFEKHGPVL"
_SUFFIXES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "q_norm": "q_norm", "k_norm": "k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "embed_tokens": "embed", "norm": "final_norm",
    "lm_head": "head", "gate": "router", "router": "router", "shared_expert_gate": "shared_router",
}  # fmt: skip


def sizes_of(formula: Formula) -> dict[str, int]:
    """The sizes that expressions may name."""
    return {
        "D": formula.experts.hidden_size,
        "F": formula.experts.intermediate_size,
        "E": formula.router.num_experts,
        "K": formula.router.top_k,
        "H": formula.attention.num_heads,
        "G": formula.attention.num_kv_heads,
        "P": formula.attention.head_dim,
        "V": formula.vocab_size,
        "L": formula.num_layers,
    }


class Piece(NamedTuple):
    """What one role of one layer is made of.

    Attributes:
        layer: its number; None outside of layers.
        role: as :mod:`moectl.parity.candidate.words` names it; biases are ``role.bias``.
        source: an expression in the orientation ``[out, in]``, or ``[E, out, in]`` where ``stacked``.
        stacked: whether the first dimension counts experts.
    """

    layer: int | None
    role: str
    source: str
    stacked: bool = False


def pieces_of(shapes: Mapping[str, tuple[int, ...]], formula: Formula) -> Iterator[Piece]:
    """Every canonical weight's roles; the fused expert weights are given whole and in halves."""
    turned = formula.experts.layout == "in_out"
    first, second = ("::2", "1::2") if formula.experts.gate_up == "interleaved" else (":F", "F:")
    for name in shapes:
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("model.layers.") else None
        if parts[-1] in ("gate_up_proj", "gate_up_proj_bias"):
            tail = ".bias" if parts[-1].endswith("_bias") else ""
            whole = f"{name}.mT" if turned and not tail else name
            halves = [
                f"{name}[:, {half}]" if not turned or tail else f"{name}[:, :, {half}].mT" for half in (first, second)
            ]
            yield Piece(layer, f"gate_up{tail}", whole, True)
            yield Piece(layer, f"gate{tail}", halves[0], True)
            yield Piece(layer, f"up{tail}", halves[1], True)
        elif parts[-1] in ("down_proj", "down_proj_bias"):
            tail = ".bias" if parts[-1].endswith("_bias") else ""
            yield Piece(layer, f"down{tail}", f"{name}.mT" if turned and not tail else name, True)
        elif parts[-1] == "e_score_correction_bias":
            yield Piece(layer, "choice_bias", name)
        elif parts[-1] in ("weight", "bias"):
            tail = ".bias" if parts[-1] == "bias" else ""
            role = _SUFFIXES[parts[-2]] if len(parts) > 1 else "router"
            shared = len(parts) > 2 and parts[-3].startswith("shared_expert")
            yield Piece(layer, f"{'shared_' if shared else ''}{role}{tail}", name)

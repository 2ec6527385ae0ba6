"""Mistakes in attention: rotary positions, q/k norms, masks, heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moectl.parity.case import Case, positions_of
from moectl.parity.formula import Formula, NormFormula
from moectl.parity.hypotheses.fits import fitted_offsets, fitted_thetas, fitted_window
from moectl.parity.hypotheses.kinds import Hypothesis, Look, Variant, attention, whole

#: Bases that models in the wild use, so that somebody may have left one in.
THETAS = (1e4, 2e4, 2.5e4, 5e4, 1e5, 1.5e5, 2.5e5, 5e5, 1e6, 2e6, 5e6, 8e6, 1e7, 1e3, 100.0)


def _tables(look: Look) -> Iterator[Variant]:
    yield attention(
        "tables interleaved, halves rotated: [f0 f0 f1 f1 ..] against (i, i + P/2)",
        rope_table="interleaved",
        rope_rotation="halves",
    )


def _neighbours(look: Look) -> Iterator[Variant]:
    yield attention("neighbours (2i, 2i + 1) rotated as pairs", rope_table="interleaved", rope_rotation="neighbours")
    yield attention(
        "neighbours rotated with tables in halves: [f0 f1 .. f0 f1 ..]", rope_table="halves", rope_rotation="neighbours"
    )


def _signs(look: Look) -> Iterator[Variant]:
    yield attention("rotated backwards: (x2, -x1)", rope_sign="minus")
    yield attention("rotate_half without the minus: (x2, x1)", rope_sign="none")


def _thetas(look: Look) -> Iterator[Variant]:
    own, dim = look.formula.attention.rope_theta, look.formula.attention.head_dim
    ways = {
        **{f"{theta:g}": theta for theta in THETAS},
        **{f"{theta:.10g}, from its tables": theta for theta in fitted_thetas(look)},
        f"exponents i/P instead of 2i/P, as theta {own**0.5:g}": own**0.5,
        f"exponents 4i/P instead of 2i/P, as theta {own**2:g}": own**2,
        "exponents over the hidden size instead of P": own ** (dim / look.formula.experts.hidden_size),
    }
    for label, theta in ways.items():
        if abs(theta / own - 1) > 1e-12:
            yield attention(f"rope_theta {label}, not {own:g}", rope_theta=theta)


def _offsets(look: Look) -> Iterator[Variant]:
    for offset in (1, -1, *(offset for offset in fitted_offsets(look) if offset not in (1, -1))):
        yield attention(f"all positions {offset:+d}", rope_offset=offset)
    for side in ("q", "k"):
        for offset in (1, -1):
            label = f"positions of {'queries' if side == 'q' else 'keys'} alone {offset:+d}"
            yield attention(label, rope_offset=offset, rope_offset_of=side)


def _cut(look: Look) -> Iterator[Variant]:
    longest = look.cases[0].config.get("max_position_embeddings")
    if longest is None:
        return

    def from_the_end(formula: Formula, case: Case) -> Formula:
        length = positions_of(case.inputs).shape[1]
        return replace(formula, attention=replace(formula.attention, rope_offset=int(longest) - length))

    yield Variant(f"the last rows of a table of {longest} instead of the first", from_the_end)


def _qk_dimension(look: Look) -> Iterator[Variant]:
    if look.formula.attention.qk_norm == "head":
        yield attention("q/k norm over all heads at once", qk_norm="all_heads")


def _qk_missing(look: Look) -> Iterator[Variant]:
    if look.formula.attention.qk_norm == "none":
        return
    yield attention("no norm of q and k", qk_norm="none")
    for role in ("q", "k"):
        yield _identity(role, f"no norm of {role}")


def _identity(role: str, label: str) -> Variant:
    return whole(label, norms=((role, NormFormula(kind="identity")),))


def _qk_after(look: Look) -> Iterator[Variant]:
    if look.formula.attention.qk_norm != "none":
        change = whole("", qk_norm_after_rope=True).formula
        hooked = {"attn.q": "attn.q_rotated", "attn.k": "attn.k_rotated"}  # the norm's output is read there
        hooked |= {"attn.q_rotated": "", "attn.k_rotated": ""}
        yield Variant("q and k normed after the rotation", change, shown_as=hooked)


def _scales(look: Look) -> Iterator[Variant]:
    yield attention("logits not divided by √P", scale="none")
    yield attention("logits divided by √D, the hidden size's root", scale="hidden_size")
    yield attention("logits divided by P: scaled twice", scale="one_over_head_dim")


def _causal(look: Look) -> Iterator[Variant]:
    yield attention("no causal mask", causal=False)
    yield attention("every token sees the next one", causal_offset=1)


def _window(look: Look) -> Iterator[Variant]:
    window = fitted_window(look)
    if window is not None:
        yield attention(f"a token sees itself and the {window - 1} before it", window=window)


def _split(look: Look) -> Iterator[Variant]:
    change = attention("", split="reshaped").formula
    yield Variant("q, k, v read as [B, H, S, P]", change, either=("attn.v",))  # read off the projection's output


def _softmax(look: Look) -> Iterator[Variant]:
    yield attention("softmax of the attention logits over queries", softmax_over="queries")
    yield attention("softmax of the attention logits over heads", softmax_over="heads")


HYPOTHESES = (
    Hypothesis("rope-tables", ("MOE001", "MOE019"), "rotary halves put together the wrong way", "attention", _tables),
    Hypothesis(
        "rope-neighbours", ("MOE019",), "RoPE interleaved, the weights are half-split", "attention", _neighbours
    ),
    Hypothesis("rope-sign", ("MOE001",), "rotary halves put together the wrong way", "attention", _signs),
    Hypothesis("rope-theta", ("MOE020",), "RoPE theta is not the config's", "attention", _thetas),
    Hypothesis("rope-offset", ("MOE021",), "positions off by one", "attention", _offsets),
    Hypothesis("rope-cut", ("MOE014",), "RoPE table not cut to the sequence", "attention", _cut),
    Hypothesis(
        "rope-missing",
        ("MOE096",),
        "no rotary positions",
        "attention",
        lambda _: [attention("no rotation", rope=False)],
    ),
    Hypothesis(
        "rope-restarts",
        ("MOE068",),
        "cached decoding rotates with positions from zero",
        "attention",
        lambda _: [attention("positions begin anew with every chunk", rope_restarts=True)],
    ),
    Hypothesis(
        "v-rotated",
        ("MOE097",),
        "values rotated like queries and keys",
        "attention",
        lambda _: [attention("values rotated too", v_rotated=True)],
    ),
    Hypothesis("qk-norm-dimension", ("MOE002",), "q/k norm over the wrong dimension", "attention", _qk_dimension),
    Hypothesis("qk-norm-missing", ("MOE022",), "q/k norm missing", "attention", _qk_missing),
    Hypothesis("qk-norm-after-rope", ("MOE098",), "q/k norm after the rotation, not before", "attention", _qk_after),
    Hypothesis("attention-scale", ("MOE023",), "attention scale wrong", "attention", _scales),
    Hypothesis("causal-mask", ("MOE006",), "causal mask missing", "attention", _causal),
    Hypothesis("window", ("MOE103",), "attention limited to a window, which this model has not", "attention", _window),
    Hypothesis(
        "mask-after-softmax",
        ("MOE006",),
        "causal mask on the probabilities instead of the logits",
        "attention",
        lambda _: [attention("probabilities masked", mask_on="probabilities")],
    ),
    Hypothesis(
        "kv-order",
        ("MOE024",),
        "key/value heads repeated in the wrong order",
        "attention",
        lambda _: [attention("query head h reads key/value head h mod G", kv_repeat="tiled")],
    ),
    Hypothesis(
        "heads-reshaped",
        ("MOE004",),
        "attention output reshaped before transpose",
        "attention",
        lambda _: [attention("heads flattened untransposed", merge="reshaped")],
    ),
    Hypothesis(
        "heads-split",
        ("MOE004",),
        "projections reshaped to heads without the transpose",
        "attention",
        _split,
    ),
    Hypothesis("attention-softmax", ("MOE003",), "attention softmax over the wrong dimension", "attention", _softmax),
)

"""Mistakes in the experts, and on the way to them and back: order, layout, activation, weights, dropped tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from moectl.parity.hypotheses.kinds import Hypothesis, Look, Variant, experts
from moectl.parity.hypotheses.routes import permutation_of, router_permutation_of, weights_evidence

#: Where the weight of a role is, among canonical names of any level.
ROLES = {
    "q": r"(^|\.)q_proj\.weight$",
    "k": r"(^|\.)k_proj\.weight$",
    "v": r"(^|\.)v_proj\.weight$",
    "o": r"(^|\.)o_proj\.weight$",
    "router": r"(^|\.)(gate|router)\.weight$|^weight$",
    "gate_up": r"(^|\.)experts\.gate_up_proj$",
    "down": r"(^|\.)experts\.down_proj$",
}
#: Which roles are misread together, by people who misread.
TOGETHER: tuple[tuple[str, ...], ...] = (
    ("q",), ("k",), ("v",), ("o",), ("q", "k"), ("q", "k", "v"), ("q", "k", "v", "o"), ("router",),
    ("gate",), ("up",), ("gate", "up"), ("gate_up",), ("down",), ("gate", "up", "down"), ("gate_up", "down"),
)  # fmt: skip
Matrix = Callable[[Tensor], Tensor]


def _memory_as_transpose(weight: Tensor) -> Tensor:
    """``[.., out, in]`` whose memory was taken for ``[.., in, out]``."""
    *stack, rows, columns = weight.shape
    return weight.reshape(*stack, columns, rows).transpose(-1, -2)


def _transpose_as_memory(weight: Tensor) -> Tensor:
    """Kept as ``[.., in, out]``, its memory taken for ``[.., out, in]``."""
    return weight.transpose(-1, -2).reshape(weight.shape)


def _misread(look: Look, roles_wanted: Callable[[tuple[str, ...]], bool]) -> Iterator[Variant]:
    for roles in filter(roles_wanted, TOGETHER):
        names = ", ".join(roles)
        square = any(role in ("q", "k", "v", "o") for role in roles) and _square(look, roles)
        yield Variant(
            f"{names} {'used untransposed' if square else 'reshaped to [in, out] instead of transposed'}",
            weights=_reading(roles, _memory_as_transpose),
        )
        if not square:
            yield Variant(
                f"{names} kept as [in, out] and reshaped to [out, in] instead of transposed",
                weights=_reading(roles, _transpose_as_memory),
            )


def _square(look: Look, roles: tuple[str, ...]) -> bool:
    shapes = [w.shape[-2:] for role in roles for n, w in look.cases[0].weights.items() if re.search(ROLES[role], n)]
    return bool(shapes) and all(shape[0] == shape[1] for shape in shapes)


def _reading(roles: tuple[str, ...], misread: Matrix) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def change(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = dict(weights)
        for name, weight in weights.items():
            for role in roles:
                if role in ("gate", "up") and re.search(ROLES["gate_up"], name):
                    halves = list(changed[name].chunk(2, dim=-2))
                    half = 0 if role == "gate" else 1
                    halves[half] = misread(halves[half])
                    changed[name] = torch.cat(halves, dim=-2)
                elif role in ROLES and re.search(ROLES[role], name) and weight.dim() >= 2:
                    changed[name] = misread(weight)
        return changed

    return change


def _expert_weights(look: Look) -> Iterator[Variant]:
    if look.formula.experts.layout == "out_in":
        yield from _misread(look, lambda roles: bool({"gate", "up", "gate_up", "down"} & set(roles)))


def _router_weight(look: Look) -> Iterator[Variant]:
    yield from _misread(look, lambda roles: roles == ("router",))


def _attention_weights(look: Look) -> Iterator[Variant]:
    yield from _misread(look, lambda roles: bool({"q", "k", "v", "o"} & set(roles)))


def _gate_up(look: Look) -> Iterator[Variant]:
    own = look.formula.experts.gate_up
    if own != "interleaved":
        yield experts("the activation is on the up projection", gate_up="up_first")


def _gate_up_interleaved(look: Look) -> Iterator[Variant]:
    own = look.formula.experts.gate_up
    yield experts(
        "gate and up read from every other row" if own != "interleaved" else "gate and up read as two halves",
        gate_up="interleaved" if own != "interleaved" else "gate_first",
    )


def _permuted(look: Look) -> Iterator[Variant]:
    found = permutation_of(look)
    if found is not None and found != tuple(range(len(found))):
        change = experts("", permutation=found).formula
        label = f"expert e computes with the weights of {_mapping(found)}"
        yield Variant(label, change, either=("mlp.expert_outputs",))
    rows = router_permutation_of(look)
    if rows is not None and rows != tuple(range(len(rows))):
        yield Variant(f"row e of the router is that of {_mapping(rows)}", weights=_router_rows(rows))


def _router_rows(rows: tuple[int, ...]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def change(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: w[list(rows)] if re.search(ROLES["router"], n) else w for n, w in weights.items()}

    return change


def _mapping(permutation: tuple[int, ...]) -> str:
    moved = [f"{e}→{other}" for e, other in enumerate(permutation) if e != other]
    return ", ".join(moved[:8]) + (f", … ({len(moved)} in all)" if len(moved) > 8 else "")


def _activations(look: Look) -> Iterator[Variant]:
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid"):
        if activation != look.formula.experts.activation:
            yield experts(f"{activation} instead of {look.formula.experts.activation}", activation=activation)


def _offsets(look: Look) -> Iterator[Variant]:
    for rows in ("overwritten", "added"):
        for offsets, label in (("counts", "begin at the count before"), ("counts_as_ends", "end at their own count")):
            yield Variant(
                f"rows of experts {label}, overlaps {rows}",
                experts("", offsets=offsets, offset_rows=rows).formula,
                either=("mlp.chosen", "mlp.weights"),
            )


def _applied(look: Look) -> Iterator[Variant]:
    yield experts("expert outputs summed without weights", applied="none")


def _one_left(look: Look) -> Iterator[Variant]:
    if look.formula.router.top_k > 1:
        yield _combined("an expert's output overwrites those before it, by number", "last_expert")
        yield _combined("each choice's output overwrites those before it", "last_choice")
        yield _combined("only the best choice is computed", "first_choice")


def _unsorted(look: Look) -> Iterator[Variant]:
    yield _combined("rows sorted by expert are multiplied by weights in the order of tokens", "unsorted_weights")


def _not_undone(look: Look) -> Iterator[Variant]:
    yield _combined("rows sorted by expert are read as [T, K, D], then weighed", "unsorted_outputs")
    yield _combined("rows sorted by expert are weighed, then read as [T, K, D]", "unsorted_rows")


def _tiled(look: Look) -> Iterator[Variant]:
    yield _combined("assignment a reads token a mod T instead of a // K", "tiled_inputs")
    yield _combined("assignment a belongs to token a mod T instead of a // K", "tiled_tokens")


def _combined(label: str, combined: str) -> Variant:
    """A router that shows its choice shows the right one: it goes wrong after it."""
    return Variant(label, experts("", combined=combined).formula, either=("mlp.chosen", "mlp.weights"))


HYPOTHESES = (
    Hypothesis("gate-up-swapped", ("MOE007",), "gate and up projections swapped", "experts", _gate_up),
    Hypothesis(
        "gate-up-interleaved", ("MOE082",), "gate and up interleaved where they are halves, or the reverse", "experts",
        _gate_up_interleaved,
    ),
    Hypothesis("experts-permuted", ("MOE017",), "experts permuted", "experts", _permuted),
    Hypothesis("expert-weight-transposed", ("MOE018",), "a weight transposed or reshaped", "experts", _expert_weights),
    Hypothesis(
        "attention-weight-transposed", ("MOE018",), "a weight transposed or reshaped", "attention", _attention_weights
    ),
    Hypothesis(
        "router-weight-transposed", ("MOE018",), "a weight transposed or reshaped", "router", _router_weight
    ),
    Hypothesis("activation", ("MOE064",), "wrong activation function", "experts", _activations),
    Hypothesis("offsets", ("MOE010",), "counts used where cumulative offsets belong", "experts", _offsets),
    Hypothesis(
        "weights-not-applied", ("MOE065",), "combine weights not applied", "experts", _applied, weights_evidence
    ),
    Hypothesis(
        "overwritten", ("MOE101",), "outputs of a token's experts overwritten instead of added", "experts", _one_left,
        weights_evidence,
    ),
    Hypothesis(
        "weights-unsorted", ("MOE105",), "sorted rows meet weights that were not sorted", "experts", _unsorted,
        weights_evidence,
    ),
    Hypothesis(
        "sort-not-undone", ("MOE076",), "sorted outputs returned without undoing the sort", "experts", _not_undone,
    ),
    Hypothesis("tokens-tiled", ("MOE077",), "token ids repeated in the wrong order", "experts", _tiled),
    Hypothesis(
        "weights-on-input", ("MOE066",), "combine weights applied to the expert's input", "experts",
        lambda _: [experts("the expert's input is multiplied by the weight", applied="input")],
    ),
    Hypothesis(
        "shared-missing", ("MOE080",), "shared expert left out, or without its gate", "experts",
        lambda look: [] if look.formula.experts.shared == "none" else [experts("no shared expert", shared="none")],
    ),
)  # fmt: skip

"""What the outputs of MoE blocks say about routes: the effective weights, and what was dropped.

Shape suffixes: T tokens, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.parity.case import Case
from moectl.parity.compare import compare_tensor, real_tokens
from moectl.parity.diagnosis.effective_weights import (
    Effective,
    effective_weights,
    find_capacity,
    find_permutation,
    relation,
)
from moectl.parity.hypotheses.kinds import Look
from moectl.parity.tape import Tape, model_order


class Block(NamedTuple):
    """One MoE block that was given the reference's input and put out something else.

    Attributes:
        prefix: of its tensors' names: ``layers.3.mlp`` or ``mlp``.
        reference: the reference's combine weights ``[T, E]``.
        effective: the candidate's.
        sums: of the chosen probabilities, ``[T]``.
    """

    prefix: str
    reference: Tensor
    effective: Effective
    sums: Tensor


def wrong_block(case: Case, reference: Tape, shown: Tape) -> Block | None:
    """The first block whose input agrees (or is the case's own) and whose output does not, decomposed."""
    for name in sorted(reference, key=model_order):
        prefix, _, last = name.rpartition(".")
        if last != "output" or not prefix.endswith("mlp") or name not in shown:
            continue
        if not _agrees(name, reference, shown, case):
            return _block(prefix, case, reference, shown) if _input_agrees(prefix, reference, shown, case) else None
    return None


def _block(prefix: str, case: Case, reference: Tape, shown: Tape) -> Block | None:
    needed = [f"{prefix}.{last}" for last in ("expert_outputs", "weights", "router_logits")]
    if any(name not in reference for name in needed):
        return None
    outputs_TED, weights_TE, logits_TE = (reference[name] for name in needed)
    output_TD = shown[f"{prefix}.output"].flatten(0, -2).double()
    if f"{prefix}.shared" in reference:
        output_TD = output_TD - reference[f"{prefix}.shared"].flatten(0, -2).double()
    kept: slice | Tensor = slice(None)
    found = effective_weights(output_TD, outputs_TED)
    real = real_tokens(case)
    if real is not None and (found is None or not found.experts_right):  # padding is anybody's own business
        kept = real.flatten()
        found = effective_weights(output_TD[kept], outputs_TED[kept])
    if found is None:
        return None
    probs_TE = logits_TE[kept].double().softmax(dim=-1)
    sums_T = (probs_TE * (weights_TE[kept] != 0)).sum(dim=-1)
    return Block(prefix, weights_TE[kept], found, sums_T)


def _input_agrees(prefix: str, reference: Tape, shown: Tape, case: Case) -> bool:
    name = f"{prefix}.input"
    return case.level in ("moe", "router") or name not in shown or _agrees(name, reference, shown, case)


def _agrees(name: str, reference: Tape, shown: Tape, case: Case) -> bool:
    return compare_tensor(name, reference[name], shown[name], case).ok is not False


def blocks(look: Look) -> Iterator[Block | None]:
    """One per case; None where all blocks agree, or none can be looked into."""
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        yield wrong_block(case, reference, shown)


def weights_evidence(look: Look) -> str:
    """How the candidate's combine weights relate to the reference's, from what it shows of them."""
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        block = wrong_block(case, reference, shown)
        if block is not None and block.effective.experts_right:
            return relation(block.reference, block.effective.weights, block.sums).text
        for name in reference:
            if name.endswith("mlp.weights") and name in shown and not _agrees(name, reference, shown, case):
                probs_TE = reference[name.replace("weights", "router_logits")].double().softmax(dim=-1)
                sums_T = (probs_TE * (reference[name] != 0)).sum(dim=-1)
                return relation(reference[name], shown[name], sums_T).text
    return ""


def logit_scales_of(look: Look) -> list[float]:
    """What the logits were multiplied by, from the logits themselves or from two weights of one token: one at most."""
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        for name in sorted(reference, key=model_order):
            last = name.rpartition("mlp.")[2]
            if last == "router_logits" and name in shown and not _agrees(name, reference, shown, case):
                right, theirs = reference[name].double(), shown[name].double()
                return _one_number((theirs * right).sum() / right.square().sum(), theirs, right)
            if last == "weights" and name in shown and not _agrees(name, reference, shown, case):
                return _scale_from_weights(reference, shown[name], name)
        block = wrong_block(case, reference, shown)
        if block is not None and block.effective.experts_right:
            return _scale_from_weights(reference, block.effective.weights, f"{block.prefix}.weights")
    return []


def _scale_from_weights(reference: Tape, weights_TE: Tensor, name: str) -> list[float]:
    """A ratio of two softmax probabilities is exp of a difference of logits, whatever they are divided by."""
    logits_TE = reference[name.removesuffix("weights") + "router_logits"].double()
    chosen_TE = reference[name] != 0
    if weights_TE.shape != logits_TE.shape or (weights_TE.double()[chosen_TE] <= 0).any():
        return []
    centred = []
    for values_TE in (weights_TE.double().log(), logits_TE):
        inside_TE = values_TE.masked_fill(~chosen_TE, 0.0)
        means_T1 = inside_TE.sum(dim=-1, keepdim=True) / chosen_TE.sum(dim=-1, keepdim=True)
        centred.append((values_TE - means_T1)[chosen_TE])
    theirs, right = centred
    return _one_number((theirs * right).sum() / right.square().sum().clamp(min=1e-300), theirs, right)


def _one_number(scale: Tensor, theirs: Tensor, right: Tensor) -> list[float]:
    """``scale`` if it is what lies between them."""
    fits = bool(((theirs - scale * right).abs() <= 1e-6 * theirs.abs().max()).all())
    value = float(scale)
    return [value] if fits and value > 0 and abs(value - 1) > 1e-9 else []


def permutation_of(look: Look) -> tuple[int, ...] | None:
    """Which expert's weights each expert computed with: from per-expert outputs, or from the effective weights."""
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        for name in reference:
            if name.endswith("mlp.expert_outputs") and name in shown and not _agrees(name, reference, shown, case):
                return find_permutation(
                    shown[name].movedim(1, -1).flatten(0, -2), reference[name].movedim(1, -1).flatten(0, -2)
                )
        block = wrong_block(case, reference, shown)
        if block is not None:
            return find_permutation(block.reference, block.effective.weights)
    return None


def router_permutation_of(look: Look) -> tuple[int, ...] | None:
    """π with candidate's logits of expert e = the reference's of π(e)."""
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        for name in reference:
            if name.endswith("mlp.router_logits") and name in shown and not _agrees(name, reference, shown, case):
                return find_permutation(shown[name], reference[name])
    return None


def capacities_of(look: Look) -> list[tuple[int | None, int]]:
    """By case: how many tokens an expert took where some were dropped (None: none were), and the fullest's count.

    Empty where what is missing is not what a capacity leaves out.
    """
    found: list[tuple[int | None, int]] = []
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        block = wrong_block(case, reference, shown)
        if block is None:
            names = [name for name in reference if name.endswith("mlp.weights")]
            fullest = max((int((reference[name] != 0).sum(dim=0).max()) for name in names), default=0)
            found.append((None, fullest))
            continue
        if not block.effective.experts_right:
            return []
        capacity = find_capacity(block.reference, block.effective.weights)
        if capacity is None:
            return []
        found.append((capacity, int((block.reference != 0).sum(dim=0).max())))
    return found


def picture(look: Look) -> str:
    """What the effective weights show, for a difference that nothing explains; empty where nothing is to be seen."""
    for block in blocks(look):
        if block is None:
            continue
        if not block.effective.experts_right:
            part = torch.tensor(block.effective.residual).item()
            return f"{block.prefix}.output is not made of the reference's expert outputs: {part:.2g} of it is left over"
        return f"{block.prefix}.output: {relation(block.reference, block.effective.weights, block.sums).text}"
    return ""

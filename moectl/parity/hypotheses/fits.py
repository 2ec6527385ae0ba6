"""Numbers read off what a candidate shows of its positions: theta, offset and window.

Shape suffixes: B batch, S sequence, P head dimension, H heads (of queries or keys).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moectl.parity.case import Case, positions_of
from moectl.parity.compare import compare_tensor
from moectl.parity.hypotheses.kinds import Look
from moectl.parity.tape import Tape


def fitted_thetas(look: Look) -> list[float]:
    """Bases that the candidate's tables, or its rotated queries, were made with; empty if it shows neither."""
    found: list[float] = []
    for case, tape in zip(look.cases, look.shown, strict=True):
        for angles_SP in _angles(case, tape):
            theta = _theta(case, angles_SP)
            if theta is not None and all(abs(theta / other - 1) > 1e-6 for other in found):
                found.append(theta)
    return [_rounded(theta) for theta in found[:3]]


def fitted_offsets(look: Look) -> list[int]:
    """By how much all positions are shifted, where tables or rotated queries show it."""
    found: list[int] = []
    for case, tape in zip(look.cases, look.shown, strict=True):
        for angles_SP in _angles(case, tape):
            offset = _offset(case, angles_SP, look.formula.attention.rope_theta)
            if offset and offset not in found:
                found.append(offset)
    return found[:3]


def fitted_window(look: Look) -> int | None:
    """How many tokens are seen, if later positions differ and earlier ones do not; None where it is not so.

    Whoever sees ``w`` tokens agrees at positions 0 .. w - 1, which have no more before them.
    """
    first = look.first
    for case, reference, shown in zip(look.cases, look.reference, look.shown, strict=True):
        if first is None or case.inputs.attention_mask is not None or case.inputs.doc_ids is not None:
            continue
        if first not in shown or first not in reference or shown[first].dim() != 3:
            continue
        right_BSD, theirs_BSD = reference[first], shown[first]
        for position in range(right_BSD.shape[1]):
            row = compare_tensor(first, right_BSD[:, position], theirs_BSD[:, position], case)
            if row.ok is False:
                return position or None
    return None


def _angles(case: Case, tape: Tape) -> Iterator[Tensor]:
    """Angles ``[S, P/2]``, each modulo 2π, of the first row of the batch, for pairs (i, i + P/2)."""
    if case.inputs.chunks is not None:
        return
    if "rope.cos" in tape and "rope.sin" in tape and tape["rope.cos"].dim() == 3:
        cos_SP, sin_SP = tape["rope.cos"][0].double(), tape["rope.sin"][0].double()
        half = cos_SP.shape[-1] // 2
        yield torch.atan2(sin_SP[:, :half], cos_SP[:, :half])
    for name in tape:
        if name.endswith("attn.q") and f"{name}_rotated" in tape:
            before, after = (_complex(tape[key][0, 0].double()) for key in (name, f"{name}_rotated"))
            yield torch.angle(after / before)
            return


def _complex(x_SP: Tensor) -> Tensor:
    first, second = x_SP.chunk(2, dim=-1)
    return torch.complex(first, second)


def _theta(case: Case, angles_SP: Tensor) -> float | None:
    """The base, from the second frequency at position 1 (below one full turn there for every base above 1)."""
    positions_S = positions_of(case.inputs)[0]
    rows = (positions_S == 1).nonzero().flatten()
    pairs = angles_SP.shape[-1]
    if len(rows) == 0 or pairs < 2:
        return None
    angle = float(angles_SP[rows[0], 1])
    if not 0 < angle < 1:
        return None
    theta = angle ** (-pairs)
    expected_P = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return theta if torch.allclose(angles_SP[rows[0]], expected_P, rtol=1e-3, atol=1e-6) else None


def _offset(case: Case, angles_SP: Tensor, theta: float) -> int:
    """The shift among all that the longest position allows whose table fits best, if it fits; else 0."""
    pairs = angles_SP.shape[-1]
    frequencies_P = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    positions_S = positions_of(case.inputs)[0].double()
    reach = int(case.config.get("max_position_embeddings", 64))
    best, error = 0, math.inf
    for offset in range(-min(reach, 128), min(reach, 4096) + 1):
        difference = torch.polar(
            torch.ones_like(angles_SP), angles_SP - (positions_S[:, None] + offset) * frequencies_P
        )
        distance = float((difference - 1).abs().max())
        if distance < error:
            best, error = offset, distance
    return best if error < 1e-4 else 0


def _rounded(theta: float) -> float:
    """The whole number that was meant, where one is within rounding."""
    return float(round(theta)) if abs(theta / max(round(theta), 1) - 1) < 1e-5 else theta

"""Two tapes of one case, tensor by tensor, in model order.

Rows of padding tokens are compared nowhere: what a model computes there reaches nobody, and
implementations differ in it.

Shape suffixes: B batch, S sequence, T tokens, N compared tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moectl.parity.case import Case, Level
from moectl.parity.routes import Flip, flips
from moectl.parity.tape import Tape, model_order
from moectl.parity.tolerance import allowed

Verdict = Literal["ok", "differs", "tie", "not compared"]
#: What a component is for: a comparison without it has compared nothing that matters.
OUTPUT: Mapping[Level, tuple[str, ...]] = {
    "model": ("logits",),
    "layer": ("mlp.residual",),
    "moe": ("mlp.output",),
    "attention": ("attn.output",),
    "router": ("mlp.chosen", "mlp.weights"),
}
_BY_HEAD = ("q", "k", "v", "q_rotated", "k_rotated")
_BY_TOKEN = ("router_logits", "chosen", "weights", "expert_outputs")
_SCALARS = ("loss", "balance_loss")


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        name: on the tape.
        shape: of the reference's tensor.
        max_abs: largest absolute difference over what was compared; None where nothing was.
        max_rel: that, over the largest absolute value of the reference.
        tolerance: what ``max_abs`` may be.
        verdict: a tie is a choice that rounding made; "not compared" says why in ``note``.
        note: what else there is to know.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float | None
    max_rel: float | None
    tolerance: float | None
    verdict: Verdict
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """True for a tie too; None where nothing was compared."""
        return None if self.verdict == "not compared" else self.verdict != "differs"

    @property
    def ratio(self) -> float:
        """Error over tolerance: above 1 it differs; 0 where nothing was compared."""
        if self.max_abs is None or self.tolerance is None:
            return 0.0
        if math.isnan(self.max_abs):
            return math.inf
        return self.max_abs / self.tolerance if self.tolerance else (math.inf if self.max_abs else 0.0)


@dataclass(frozen=True)
class Comparison:
    """Every tensor of a case.

    Attributes:
        rows: in model order.
        ties: tokens whose choice of experts rounding made, and made differently.
        level: of the component, which says what its output is.
    """

    rows: tuple[Row, ...]
    ties: tuple[Flip, ...] = ()
    level: Level = "model"

    @property
    def missing(self) -> tuple[str, ...]:
        """The component's own outputs, if they were not compared, and no tie is the reason."""
        compared = {row.name for row in self.rows if row.ok is not None}
        return () if self.ties else tuple(name for name in OUTPUT[self.level] if name not in compared)

    @property
    def ok(self) -> bool:
        """No tensor differs, and the component's output was among those compared."""
        return all(row.ok is not False for row in self.rows) and self.compared > 0 and not self.missing

    @property
    def compared(self) -> int:
        return sum(row.ok is not None for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first tensor that differs, in model order."""
        return next((row for row in self.rows if row.ok is False), None)


def compare(reference: Tape, candidate: Tape, case: Case, *, bounds: Mapping[str, float] | None = None) -> Comparison:
    """Hold ``candidate`` against ``reference``.

    Where the two chose other experts for a token and rounding explains it, the token is left out of
    ``mlp.weights``, ``mlp.routed`` and ``mlp.output`` of that layer, and what mixes it with others is not
    compared: :func:`after_injection` compares that.

    Args:
        bounds: largest error by name, in place of the dtype's tolerance; in bfloat16 of every name.
    """
    names = sorted(reference, key=model_order)
    tied, tied_at = _first_flips(reference, candidate, case, bounds)
    rows = []
    for name in names:
        if name not in candidate:
            rows.append(_not_compared(name, reference[name], "the candidate shows no such tensor"))
        elif tied and (name == tied_at or _follows(name, tied_at)):
            rows.append(_after_tie(reference, candidate, case, name, tied, bounds))
        else:
            rows.append(compare_tensor(name, reference[name], candidate[name], case, bounds=bounds))
    for name in candidate:
        if name not in reference:
            rows.append(_not_compared(name, candidate[name], "the reference has no such tensor"))
    return Comparison(tuple(rows), tuple(tied), case.level)


def after_injection(free: Comparison, injected: Comparison) -> Comparison:
    """Rows up to the first tie from a candidate that ran freely; the rest from one given the reference's routes.

    With the routes given, later choices are not the candidate's own, and say nothing.
    """
    tied_at = next(row.name for row in free.rows if row.verdict == "tie")
    given = {row.name: row for row in injected.rows}
    own = (tied_at, tied_at.replace("chosen", "weights"))
    rows = []
    for row in free.rows:
        if row.name in own or not _follows(row.name, tied_at):
            rows.append(row)
        elif row.name.endswith(("mlp.chosen", "mlp.weights")):
            why = "the reference's routes are given from the first tie on"
            rows.append(replace(row, max_abs=None, max_rel=None, tolerance=None, verdict="not compared", note=why))
        else:
            rows.append(given.get(row.name, row))
    return Comparison(tuple(rows), free.ties, free.level)


def compare_tensor(
    name: str,
    reference: Tensor,
    candidate: Tensor,
    case: Case,
    *,
    bounds: Mapping[str, float] | None = None,
    leave_out: Tensor | None = None,
) -> Row:
    """One row.

    Args:
        bounds: as in :func:`compare`.
        leave_out: ``[T]`` bool, tokens that are not compared.
    """
    shape = tuple(reference.shape)
    if candidate.shape != reference.shape:
        note = f"shape {list(candidate.shape)}, where the reference has {list(shape)}"
        return Row(name, shape, None, None, None, "differs", note)
    kept_N = _kept(name, case, leave_out)
    theirs, ours = (_wide(_tokens(name, side, kept_N)) for side in (reference, candidate))
    if not theirs.numel():
        return _not_compared(name, reference, "every token is at a tie" if leave_out is not None else "it is empty")
    scale = float(theirs.abs().max())
    if name.endswith("mlp.chosen"):
        limit = 0.0
    else:
        limit = bounds[name] if bounds is not None and name in bounds else allowed(case.dtype, scale)
    broken = _not_finite(theirs, ours)
    if broken:
        return Row(name, shape, math.nan, math.nan, limit, "differs", broken)
    error = (ours - theirs).abs()
    worst = float(error.max())
    relative = worst / scale if scale else (math.inf if worst else 0.0)
    if worst <= limit:
        return Row(name, shape, worst, relative, limit, "ok", _dtype_note(reference, candidate))
    return Row(name, shape, worst, relative, limit, "differs", _worst_place(name, error, theirs, ours))


def largest(name: str, tensor: Tensor, case: Case) -> float:
    """The largest absolute value among real tokens; 0 where there are none."""
    values = _wide(_tokens(name, tensor, _kept(name, case, None)))
    return float(values.abs().max()) if values.numel() else 0.0


def real_tokens(case: Case) -> Tensor | None:
    """``[B, S]`` bool, False for padding; None where there is none."""
    mask = case.inputs.attention_mask
    return None if mask is None or bool(mask.all()) else mask.bool()


def _first_flips(
    reference: Tape, candidate: Tape, case: Case, bounds: Mapping[str, float] | None
) -> tuple[list[Flip], str]:
    """Ties in the first layer whose choices differ, if all of its differences are ties."""
    for name in sorted(reference, key=model_order):
        if not name.endswith("mlp.chosen") or name not in candidate:
            continue
        logits = name.replace("chosen", "router_logits")
        if candidate[name].shape != reference[name].shape or logits not in reference:
            continue
        # Two logits, each off by the bound: what a softmax makes of their difference, relatively.
        low = case.dtype == torch.bfloat16 and bounds is not None
        tolerance = -math.expm1(-2 * bounds[logits]) if low and bounds is not None else None
        found = flips(reference, candidate, case, name, tolerance=tolerance)
        if found:
            return (found, name) if all(flip.tie for flip in found) else ([], "")
    return [], ""


def _follows(name: str, tied_at: str) -> bool:
    """Whether the choice ``tied_at`` reaches the tensor ``name``."""
    if name.startswith("rope.") or (name.endswith("mlp.expert_outputs") and name.split("mlp.")[0] == tied_at[:-10]):
        return False
    return model_order(name) > model_order(tied_at)


def _after_tie(
    reference: Tape,
    candidate: Tape,
    case: Case,
    name: str,
    tied: list[Flip],
    bounds: Mapping[str, float] | None,
) -> Row:
    """A row that the tied tokens reach."""
    prefix = "" if tied[0].layer is None else f"layers.{tied[0].layer}."
    place = name.removeprefix(prefix)
    within = ("mlp.chosen", "mlp.weights", "mlp.routed", "mlp.output", "mlp.residual", "mlp.shared")
    if place not in within:
        return _not_compared(name, reference[name], f"follows from a tie in {prefix}mlp.chosen")
    tokens_T = torch.zeros(len(reference[f"{prefix}mlp.chosen"]), dtype=torch.bool)
    if place != "mlp.shared":
        tokens_T[[flip.token for flip in tied]] = True
    row = compare_tensor(name, reference[name], candidate[name], case, bounds=bounds, leave_out=tokens_T)
    if place != "mlp.chosen" or row.ok is False:
        return replace(row, note=row.note or f"without {_count(tied)} at a tie") if place != "mlp.shared" else row
    worst = max(flip.margin for flip in tied)
    note = f"{_count(tied)} at a tie (margin up to {worst:.1e}) chose otherwise"
    return replace(row, max_abs=0.0, max_rel=0.0, tolerance=0.0, verdict="tie", note=note)


def _kept(name: str, case: Case, leave_out: Tensor | None) -> Tensor | None:
    """``[T]`` bool, the tokens to compare; None for all, and for tensors that have no tokens."""
    if name in _SCALARS or (name.startswith("grad.") and name != "grad.input"):
        return None
    real_BS = real_tokens(case)
    kept_N = None if real_BS is None else real_BS.flatten()
    if leave_out is not None:
        kept_N = ~leave_out if kept_N is None else kept_N & ~leave_out
    return kept_N


def _tokens(name: str, tensor: Tensor, kept_N: Tensor | None) -> Tensor:
    """The compared tokens' values, tokens first."""
    if kept_N is None:
        return tensor
    last = name.rpartition(".")[2]
    if "attn." in name and last in _BY_HEAD and not name.startswith("grad."):
        tensor = tensor.movedim(2, 1)
    if last not in _BY_TOKEN and tensor.dim() > 2:
        tensor = tensor.flatten(0, 1)
    return tensor[kept_N]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _not_finite(theirs: Tensor, ours: Tensor) -> str:
    sides = {"candidate": ours, "reference": theirs}
    found = [
        f"{int((~side.isfinite()).sum())} in the {name}" for name, side in sides.items() if not side.isfinite().all()
    ]
    return f"NaN or infinite values: {', '.join(found)}" if found else ""


def _dtype_note(reference: Tensor, candidate: Tensor) -> str:
    if candidate.dtype == reference.dtype:
        return ""
    return f"{candidate.dtype} where the reference has {reference.dtype}".replace("torch.", "")


def _worst_place(name: str, error: Tensor, theirs: Tensor, ours: Tensor) -> str:
    if name.endswith("mlp.chosen"):
        return f"{int(error.flatten(1).any(dim=1).sum())} of {len(error)} tokens chose other experts"
    flat = int(error.argmax())
    return f"{float(ours.flatten()[flat]):.6g} where the reference has {float(theirs.flatten()[flat]):.6g}"


def _count(tied: list[Flip]) -> str:
    return f"{len(tied)} token" + "s" * (len(tied) != 1)


def _not_compared(name: str, tensor: Tensor, why: str) -> Row:
    return Row(name, tuple(tensor.shape), None, None, None, "not compared", why)

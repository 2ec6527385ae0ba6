"""Whether an exported checkpoint is the model: logits of the files, as transformers loads them, beside our own.

In float64 both compute exactly, norms and rotary tables included: what differs there is another function. In
float32 it is what a user will see. Rows of tokens at which a router nearly ties are drawn anew: which of two
equal experts is taken is then a matter of rounding, and no fault of either.

Shape suffixes: B rows, S tokens of a row, T all tokens, E experts, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl.hf.exact import exact_copy
from moectl.hf.export import Plan, reload
from moectl.hf.language_model import HFLanguageModel
from moectl.models.language_model import LanguageModel
from moectl.models.modes import eval_mode
from moectl.parity.lift import lifted
from moectl.routers.sigmoid import SigmoidRouter

ROWS, LENGTH, DRAWS = 4, 48, 16
#: Of logits up to 1, relative to the largest of larger ones; or so many times what float32 rounds our own logits by,
#: where a model's own numbers (sharp attention, say) make that more: two such roundings, each as far as it may be.
TOLERANCE_32, ROUNDINGS = 1e-5, 4.0
#: In float64 nothing but the order of sums differs: about 1e-14.
TOLERANCE_64 = 1e-10
#: Two experts nearly tie where their scores differ by less than this part of the largest: ten roundings of float32.
TIE = 1e-6


@dataclass(frozen=True)
class Checked:
    """What the comparison found.

    Attributes:
        float32, float64: max |Δlogit|.
        rounding: of our own model: how far its float32 logits are from its float64 ones.
        largest_logit: of our own model, for scale.
        tokens: compared.
        redrawn: rows left out because a router nearly tied in them.
        cast: max |Δlogit| and the share of tokens with the same most likely next one, after the weights were cast to
            another dtype; None where they were not.
    """

    float32: float
    float64: float
    rounding: float
    largest_logit: float
    tokens: int
    redrawn: int
    cast: tuple[float, float] | None = None

    @property
    def holds(self) -> bool:
        """Whether it is the same function."""
        scale = max(1.0, self.largest_logit)
        within = max(TOLERANCE_32 * scale, ROUNDINGS * self.rounding)
        return self.float32 <= within and self.float64 <= TOLERANCE_64 * scale

    def to_json(self) -> dict[str, Any]:
        plain = {
            "float32": self.float32,
            "float64": self.float64,
            "own_rounding": self.rounding,
            "largest_logit": self.largest_logit,
            "tokens": self.tokens,
            "redrawn_rows": self.redrawn,
            "tolerance": {"float32": TOLERANCE_32, "float64": TOLERANCE_64, "own_roundings": ROUNDINGS},
            "holds": self.holds,
        }
        return plain if self.cast is None else {**plain, "cast": {"logits": self.cast[0], "same_top1": self.cast[1]}}

    def sentence(self) -> str:
        """For a reader."""
        redrawn = f"; {self.redrawn} rows with a near tie drawn anew" if self.redrawn else ""
        said = (
            f"max |Δlogit| {self.float32:.2g} in float32, {self.float64:.2g} in float64 (float32 itself rounds"
            f" the model's by {self.rounding:.2g}; largest logit {self.largest_logit:.3g}, {self.tokens}"
            f" tokens{redrawn})"
        )
        if self.cast is None:
            return said
        return (
            f"{said}; casting the weights then moved logits by up to {self.cast[0]:.2g}, and"
            f" {100 * self.cast[1]:.1f} % of tokens keep their most likely next one"
        )


@dataclass(frozen=True)
class Expected:
    """Our own model's logits ``[B, S, V]`` for ``ids [B, S]``, by dtype."""

    ids: Tensor
    float32: Tensor
    float64: Tensor
    redrawn: int


def expected(model: LanguageModel, *, seed: int = 0) -> Expected:
    """What the exported model must compute. Takes memory for a float64 copy of the model while it runs."""
    ids, float64, redrawn = _without_ties(model, seed)
    with eval_mode(model):  # type: ignore[arg-type]
        plain = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        float32 = (model if plain else exact_copy(model, torch.float32))(ids)
    return Expected(ids, float32, float64, redrawn)


def check(plan: Plan, folder: Path, wanted: Expected) -> Checked:
    """Load ``folder`` as transformers does and compare.

    Raises:
        CheckError: it does not load whole.
    """
    loaded = reload(plan, folder, torch.float32)
    with torch.no_grad():
        error32 = _largest(loaded(input_ids=wanted.ids).logits - wanted.float32)
        with lifted():
            logits_BSV = _in_float64(loaded)(input_ids=wanted.ids).logits
        error64 = _largest(logits_BSV - wanted.float64)
    rounding = _largest(wanted.float32 - wanted.float64)
    return Checked(error32, error64, rounding, _largest(wanted.float64), wanted.ids.numel(), wanted.redrawn)


def cast_error(plan: Plan, folder: Path, wanted: Expected) -> tuple[float, float]:
    """What casting the weights in ``folder`` did, computed in float32: as :attr:`Checked.cast`."""
    with torch.no_grad():
        logits_BSV = reload(plan, folder, torch.float32)(input_ids=wanted.ids).logits
    same = (logits_BSV.argmax(-1) == wanted.float32.argmax(-1)).double().mean()
    return _largest(logits_BSV - wanted.float32), float(same)


def _largest(difference: Tensor) -> float:
    """NaN where any number is."""
    return float(difference.abs().max())


def _without_ties(model: LanguageModel, seed: int) -> tuple[Tensor, Tensor, int]:
    """Rows of random tokens at which no router nearly ties, their exact logits, and how many rows were left out."""
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, model.max_length or LENGTH)
    exact = _in_float64(model)
    kept: list[tuple[Tensor, Tensor]] = []
    last: list[tuple[Tensor, Tensor]] = []
    redrawn = 0
    for _ in range(DRAWS):
        row = torch.randint(0, model.vocab_size, (1, length), generator=generator)
        with lifted(), torch.no_grad():
            logits = exact(row)
        last = [*last, (row, logits)][-ROWS:]
        if _nearly_ties(exact):
            redrawn += 1
            continue
        kept.append((row, logits))
        if len(kept) == ROWS:
            break
    # A model of equal experts, say, ties everywhere, and it does not matter.
    chosen = kept or last
    return torch.cat([row for row, _ in chosen]), torch.cat([logits for _, logits in chosen]), redrawn


def _nearly_ties(model: LanguageModel) -> bool:
    """Whether the last call's routers had anywhere a last chosen expert that the first not chosen nearly equals."""
    for layer in model.moe_layers().values():
        router = layer.router
        assert layer.routing is not None
        scores_TE = layer.routing.router_logits
        if isinstance(router, SigmoidRouter):
            scores_TE = scores_TE.sigmoid() + router.expert_bias
        if router.top_k < router.num_experts:
            best = scores_TE.topk(router.top_k + 1, dim=-1).values
            if bool(((best[:, -2] - best[:, -1]) < TIE * scores_TE.abs().max()).any()):
                return True
    return False


def _in_float64(model: Any) -> Any:
    """A float64 copy, in eval mode, to be called under :func:`lifted`: whatever asks for float32 gets float64 too."""
    exact = copy.deepcopy(model).double().eval()
    inner = exact.model if isinstance(exact, HFLanguageModel) else exact
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("eager")  # the others have no float64 everywhere
    with lifted():
        _exact_rotary(exact)
    return exact


def _exact_rotary(model: nn.Module) -> None:
    """Rotary frequencies, which transformers keeps in float32, computed anew as they are now: in float64."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(getattr(child, "inv_freq", None), Tensor) and hasattr(child, "config"):
                setattr(parent, name, type(child)(child.config))

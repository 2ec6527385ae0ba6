"""Where a piece of the reference finds its weights, and where it writes what it computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from moectl.parity.case import Reroute, Unsupported
from moectl.parity.formula import Formula, NormFormula
from moectl.parity.reference.numerics import rms_norm
from moectl.parity.tape import Tape


@dataclass(frozen=True)
class Scope:
    """A place within the model.

    Attributes:
        formula: of the whole decoder.
        weights: by canonical name.
        tape: takes what is computed.
        weights_prefix: of the names in ``weights`` here, ``"model.layers.0.self_attn."``.
        tape_prefix: of the names on the tape here, ``"layers.0.attn."``.
        layer: which one; 0 in a lone component.
        reroute: another side's choice of experts, in place of the router's.
    """

    formula: Formula
    weights: Mapping[str, Tensor]
    tape: Tape
    weights_prefix: str = ""
    tape_prefix: str = ""
    layer: int = 0
    reroute: Reroute | None = None

    def inside(self, weights: str = "", tape: str = "") -> Scope:
        """The scope of a part, by what its names begin with."""
        return replace(self, weights_prefix=self.weights_prefix + weights, tape_prefix=self.tape_prefix + tape)

    def weight(self, name: str) -> Tensor:
        """Raises :class:`Unsupported` where the formula needs a weight that was not given."""
        full = self.weights_prefix + name
        if full not in self.weights:
            raise Unsupported(f"there is no weight '{full}', which this formula needs")
        return self.weights[full]

    def record(self, name: str, tensor: Tensor) -> None:
        self.tape.record(self.tape_prefix + name, tensor)

    def linear(self, x: Tensor, name: str, *, role: str = "", bias: bool = False) -> Tensor:
        """``x · Wᵀ + b``; where ``role`` is among the reshaped, ``x · W.reshape(in, out)``."""
        weight = self.weight(f"{name}.weight")
        if role in self.formula.reshaped:
            weight = weight.reshape(weight.shape[1], weight.shape[0]).T
        return F.linear(x, weight, self.weight(f"{name}.bias") if bias else None)

    def passed(self, x: Tensor, place: str) -> Tensor:
        """``x``, through which no gradient passes where the formula says so."""
        return x.detach() if place in self.formula.detached else x

    def norm(self, x: Tensor, name: str, role: str) -> Tensor:
        """The norm of ``role`` (attn, mlp, q, k, final) with the weight called ``name``."""
        rule = self.norm_formula(role)
        weight = None if rule.weight == "none" or rule.kind == "identity" else self.weight(f"{name}.weight")
        return rms_norm(x, weight, rule, self.formula.casts)

    def norm_formula(self, role: str) -> NormFormula:
        return dict(self.formula.norms).get(role, self.formula.norm)

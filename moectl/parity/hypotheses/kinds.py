"""What a hypothesis is: the reference with one thing changed, and the codes of the mistake that changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from moectl.parity.case import Case, Inputs, Level
from moectl.parity.formula import Formula
from moectl.parity.tape import Tape

Component = Literal["attention", "router", "experts", "norm", "model"]

#: Where a component is: hypotheses on others are not tried.
LEVELS: Mapping[Component, tuple[Level, ...]] = {
    "attention": ("attention", "layer", "model"),
    "router": ("router", "moe", "layer", "model"),
    "experts": ("moe", "layer", "model"),
    "norm": ("attention", "layer", "model"),
    "model": ("layer", "model"),
}


class Look(NamedTuple):
    """What a hypothesis may look at to find its own number: a theta, a permutation, a capacity.

    Attributes:
        formula: the reference's.
        cases: what was computed.
        reference: the tapes of the reference, or of what has been explained so far, in the order of ``cases``.
        shown: the candidate's tapes.
        first: the first tensor in which they differ, or None.
    """

    formula: Formula
    cases: tuple[Case, ...]
    reference: tuple[Tape, ...]
    shown: tuple[Tape, ...]
    first: str | None


@dataclass(frozen=True)
class Variant:
    """One way to make a mistake, as what must be done to the reference for it to make the same one.

    Attributes:
        label: what is done, for people: ``rope_theta 10000``.
        formula: of the formula, for one case (a capacity may depend on its tokens).
        weights: of the canonical weights.
        inputs: of the inputs: a mask or document ids that are not looked at.
        either: tensors that a candidate making this mistake may still show as the reference has them, because
            the mistake lies between its router and its experts.
        shown_as: tensors that hooks read elsewhere in a candidate making this mistake: name -> what they are here,
            or nothing where they are nothing that is computed here.
    """

    label: str
    formula: Callable[[Formula, Case], Formula] | None = None
    weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    inputs: Callable[[Inputs], Inputs] | None = None
    either: tuple[str, ...] = ()
    shown_as: Mapping[str, str] = field(default_factory=dict)

    def then(self, other: Variant) -> Variant:
        """Both mistakes, this one first."""
        return Variant(
            label=f"{self.label}; {other.label}" if self.label else other.label,
            formula=_chain_formula(self.formula, other.formula),
            weights=_chain(self.weights, other.weights),
            inputs=_chain(self.inputs, other.inputs),
            either=self.either + other.either,
            shown_as={**self.shown_as, **other.shown_as},
        )


#: The reference itself.
NOTHING = Variant("")


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that people make.

    Attributes:
        name: short and unique, for tables.
        codes: of the catalogue.
        title: what is wrong, as one would say it to its author.
        component: where it sits; hypotheses of one component are tried in pairs.
        variants: the ways to make it that fit this family's formula; may look at what the candidate shows.
        evidence: more about a variant that explains, in a clause; or nothing.
    """

    name: str
    codes: tuple[str, ...]
    title: str
    component: Component
    variants: Callable[[Look], Iterable[Variant]] = field(repr=False)
    evidence: Callable[[Look], str] | None = field(default=None, repr=False)


def attention(label: str, **fields: Any) -> Variant:
    """A variant with other fields in :class:`~moectl.parity.formula.AttentionFormula`."""
    return Variant(label, lambda formula, _: replace(formula, attention=replace(formula.attention, **fields)))


def router(label: str, **fields: Any) -> Variant:
    """A variant with other fields in :class:`~moectl.parity.formula.RouterFormula`."""
    return Variant(label, lambda formula, _: replace(formula, router=replace(formula.router, **fields)))


def experts(label: str, **fields: Any) -> Variant:
    """A variant with other fields in :class:`~moectl.parity.formula.ExpertsFormula`."""
    return Variant(label, lambda formula, _: replace(formula, experts=replace(formula.experts, **fields)))


def whole(label: str, **fields: Any) -> Variant:
    """A variant with other fields in :class:`~moectl.parity.formula.Formula` itself."""
    return Variant(label, lambda formula, _: replace(formula, **fields))


def _chain_formula(
    first: Callable[[Formula, Case], Formula] | None, second: Callable[[Formula, Case], Formula] | None
) -> Callable[[Formula, Case], Formula] | None:
    if first is None or second is None:
        return first or second
    return lambda formula, case: second(first(formula, case), case)


def _chain(first: Callable[..., Any] | None, second: Callable[..., Any] | None) -> Callable[..., Any] | None:
    if first is None or second is None:
        return first or second
    return lambda value: second(first(value))

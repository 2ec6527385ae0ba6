"""Which of a candidate's tensors is which canonical weight, guessed by names and shapes, and shown.

A name gives the role (:mod:`moectl.parity.candidate.words`), the shape the orientation. Where a square tensor
could be either way round, where two names claim one role, or where no name is known, nothing is guessed: it is listed.

Sizes: D hidden, F expert intermediate, E experts, H heads, G key/value heads, P head dimension, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moectl.parity.candidate.expressions import ExpressionError, Source, evaluate, unread
from moectl.parity.candidate.roles import Named, named_tensors
from moectl.parity.candidate.sizes import Piece, pieces_of, sizes_of
from moectl.parity.case import Level
from moectl.parity.formula import Formula

Shape = tuple[int, ...]


class Mapped(NamedTuple):
    """One line of the mapping as it is shown.

    Attributes:
        name: the candidate's.
        source: an expression over canonical names.
        remark: what was assumed, or None.
    """

    name: str
    source: Source
    remark: str | None = None


@dataclass(frozen=True)
class Guess:
    """What was found.

    Attributes:
        mapped: the candidate's tensors with a source.
        roles: candidate's name -> (layer, role, expert), of all whose role is known.
        extra: parameters that no canonical weight belongs to, with their shapes.
        missing: canonical weights that nothing takes: name -> number of entries not taken.
        unclear: sentences on what could be meant in several ways.
        tied: pairs of names that are one tensor.
    """

    mapped: tuple[Mapped, ...]
    roles: dict[str, Named] = field(default_factory=dict)
    extra: dict[str, Shape] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    unclear: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    @property
    def sources(self) -> dict[str, Source]:
        return {each.name: each.source for each in self.mapped}


def guess_mapping(module: nn.Module, formula: Formula, level: Level, shapes: Mapping[str, Shape]) -> Guess:
    """Guess for ``module`` and the canonical ``shapes`` of ``level``."""
    sizes = sizes_of(formula)
    canonical = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    pieces = {(piece.layer, piece.role): piece for piece in pieces_of(shapes, formula)}
    named = named_tensors(module, level, sizes)
    finder = _Finder(pieces, canonical, sizes, tied_in_config="lm_head.weight" not in shapes and level == "model")
    claims: dict[tuple[object, ...], list[Mapped]] = defaultdict(list)
    for each in named.found.values():
        source = finder.source(each)
        if source is not None:
            claims[(each.layer, each.role, each.expert, each.head)].append(source)
    mapped, unclear = [], list(named.unclear) + finder.unclear
    for lines in claims.values():
        if len(lines) == 1:
            mapped += lines
        else:
            names = " and ".join(line.name for line in lines)
            unclear.append(f"{names} both look like {lines[0].source}")
    order = {name: place for place, name in enumerate(named.found)}
    mapped.sort(key=lambda line: order[line.name])
    done = {line.name for line in mapped}
    parameters = dict(module.named_parameters())
    extra = {name: tuple(tensor.shape) for name, tensor in parameters.items() if name not in done}
    left = {name: torch.empty(shape) for name, shape in shapes.items()}
    missing = unread({line.name: line.source for line in mapped}, left, sizes)
    return Guess(tuple(mapped), named.found, extra, missing, tuple(unclear), named.tied)


class _Finder:
    """Finds the expression for one tensor of known role."""

    def __init__(
        self,
        pieces: Mapping[tuple[int | None, str], Piece],
        canonical: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        *,
        tied_in_config: bool,
    ) -> None:
        self.pieces, self.canonical, self.sizes = pieces, canonical, sizes
        self.tied_in_config = tied_in_config
        self.unclear: list[str] = []

    def source(self, named: Named) -> Mapped | None:
        """The line for ``named``, or None: no such weight in this family, or unclear (which is noted)."""
        if named.role is None:
            return None
        options: list[tuple[str, str | None]] = []
        for base, remark in self._bases(named):
            options += [(option, remark) for option in self._ways(base, named)]
        fitting = [(option, remark) for option, remark in options if self._shape(option) == named.shape]
        if not fitting:
            wanted = sorted({str(list(self._shape(option) or ())) for option, _ in options})
            if wanted:
                self.unclear.append(
                    f"{named.name} {list(named.shape)} looks like {named.role.replace('_', ' ')}, "
                    f"whose shape is {' or '.join(wanted[:4])}"
                )
            return None
        if len({option for option, _ in fitting}) > 1 and not named.linear:
            both = " or ".join(option for option, _ in fitting[:2])
            self.unclear.append(f"{named.name} {list(named.shape)} is square: it could be {both}")
            return None
        option, remark = fitting[0]
        return Mapped(named.name, option, "; ".join(filter(None, [named.remark, remark])) or None)

    def _bases(self, named: Named) -> Iterator[tuple[str, str | None]]:
        """Expressions in the orientation [out, in] (or [E, out, in]) for the role, before turning."""
        at, role = named.layer, named.role or ""
        tail = ".bias" if role.endswith(".bias") else ""
        plain = role.removesuffix(".bias")
        piece = self.pieces.get((at, role))
        if plain in ("gate_up", "up_gate", "shared_gate_up", "qkv", "kv"):
            yield from self._fused(named, plain, tail)
        elif piece is None and role == "router.bias" and (at, "choice_bias") in self.pieces:
            yield self.pieces[(at, "choice_bias")].source, "the bias that only chooses"
        elif piece is None:
            return
        elif piece.stacked:
            yield (_indexed(piece.source, named.expert) if named.expert is not None else piece.source), None
        elif named.head is not None and plain in ("q", "k", "v"):
            yield f"{piece.source}[{named.head}*P:{named.head + 1}*P]", None
        elif plain in ("q_norm", "k_norm"):
            yield piece.source, None
            yield f"{piece.source}.repeat({'H' if plain == 'q_norm' else 'G'})", "one head's weight, repeated for all"
        else:
            yield piece.source, None

    def _fused(self, named: Named, plain: str, tail: str) -> Iterator[tuple[str, str | None]]:
        parts = {
            "qkv": ("q", "k", "v"), "kv": ("k", "v"), "gate_up": ("gate", "up"), "up_gate": ("up", "gate"),
            "shared_gate_up": ("shared_gate", "shared_up"),
        }[plain]  # fmt: skip
        found = [self.pieces.get((named.layer, part + tail)) for part in parts]
        whole = self.pieces.get((named.layer, f"gate_up{tail}"))
        if whole is not None and plain == "gate_up":
            yield (_indexed(whole.source, named.expert) if named.expert is not None else whole.source), None
        elif all(found):
            sources = [piece.source for piece in found if piece is not None]
            if found[0] is not None and found[0].stacked:
                dim = 0 if named.expert is not None else 1
                sources = [_indexed(s, named.expert) if named.expert is not None else s for s in sources]
                yield f"cat([{', '.join(sources)}], {dim})", None
            else:
                order = f"{', '.join(parts)} one after the other: assumed" if plain in ("qkv", "kv") else None
                yield f"cat([{', '.join(sources)}])", order

    def _ways(self, base: str, named: Named) -> list[str]:
        """``base`` as it is and turned; stacks also flattened over experts."""
        shape = self._shape(base)
        if shape is None or len(shape) == 1:
            return [base]
        ways = [base] if named.linear else [base, f"{base}.mT"]
        if len(shape) == 3:
            ways += [f"{way}.flatten(0, 1)" for way in (base, f"{base}.mT")]
            if len(named.shape) == 2 and not named.linear:  # [D, E·F]: experts side by side
                ways += [f"{way}.flatten(0, 1).mT" for way in (base, f"{base}.mT")]
        return [way for way in ways if len(self._shape(way) or ()) == len(named.shape)]

    def _shape(self, source: str) -> Shape | None:
        try:
            return tuple(evaluate(source, self.canonical, self.sizes).shape)
        except ExpressionError:
            return None


def _indexed(source: str, expert: int) -> str:
    """The expression of one expert of a stacked one: ``w[:, :F]`` becomes ``w[3, :F]``."""
    name, bracket, rest = source.partition("[:")
    if bracket:
        return f"{name}[{expert}{rest}"
    turned = source.removesuffix(".mT")
    return f"{turned}[{expert}]{'.mT' if turned != source else ''}"

"""Tensors as they are seen, put together to a tape: in the tape's shapes, a cached run's pieces joined.

Shape suffixes: B batch, S sequence, T = B·S tokens, H heads, P head dimension, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moectl.parity.candidate.shapes import Orientations, as_heads, as_rope_table, as_sequence
from moectl.parity.candidate.watching import Watch
from moectl.parity.formula import Formula
from moectl.parity.tape import Tape


class Pieces:
    """What one run shows, by the tape's names.

    Attributes:
        leading: batch and sequence of the call that runs.
        watch: sleeps while moectl itself computes.
        told: names that an adapter reads itself.
    """

    def __init__(self, formula: Formula, orientations: Orientations, watch: Watch) -> None:
        self.formula, self.orientations, self.watch = formula, orientations, watch
        self.leading = (1, 1)
        self._pieces: dict[str, tuple[list[Tensor], int]] = {}
        self.told: set[str] = set()
        self._done = 0  # positions of earlier calls

    def next_call(self, leading: tuple[int, int], *, first: bool) -> None:
        """Another call begins: of a cached run's next piece, or the only one."""
        self._done = 0 if first else self._done + self.leading[1]
        self.leading = leading

    def put(self, name: str, tensor: Tensor | None, dim: int = 1, *, told: bool = False) -> None:
        """Keep one piece.

        Args:
            name: on the tape.
            tensor: None where it could not be read.
            dim: along which the pieces of a cached run are joined; -1: tokens ``[T, ...]``.
            told: by the adapter, whose word is taken for the names that it reads itself.
        """
        if tensor is None or (name in self.told and not told):
            return
        kept = tensor.detach().clone()
        if dim == -1 and len(kept) != self.leading[0] * self.leading[1]:
            return  # of other tokens than this call's: a whole sequence computed again
        if dim == -1:
            kept = kept.reshape(*self.leading, *kept.shape[1:])
        self._pieces.setdefault(name, ([], dim))[0].append(kept)

    def put_as(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that an adapter or a router gave, in the tape's shape for ``name``."""
        attention, last = self.formula.attention, name.rpartition(".")[2]
        with self.asleep():
            if last in ("q", "k", "v", "q_rotated", "k_rotated"):
                count = attention.num_heads if last[0] == "q" else attention.num_kv_heads
                self.put_heads(name, tensor, count, told=True)
            elif last in ("router_logits", "chosen", "weights"):
                self.put(name, tensor.reshape(self.leading[0] * self.leading[1], -1), -1, told=True)
            elif last == "expert_outputs":
                self.put(name, tensor.reshape(self.leading[0] * self.leading[1], -1, tensor.shape[-1]), -1, told=True)
            elif last in ("cos", "sin"):
                self.put(name, as_rope_table(tensor, self.leading, attention.head_dim), told=True)
            else:
                self.put(name, as_sequence(tensor, self.leading), told=True)

    def put_heads(self, name: str, tensor: Tensor, count: int, *, told: bool = False) -> None:
        """Keep ``[B, H, S, P]``, however the heads are arranged; what is no such is left out."""
        key, head_dim = name.rpartition("attn.")[2], self.formula.attention.head_dim
        heads = as_heads(tensor, self.leading, count, head_dim, key=key, known=self.orientations)
        self.put(name, heads, 2, told=told)

    def put_scalar(self, name: str, tensor: Tensor) -> None:
        """Keep a loss."""
        self._pieces[name] = ([tensor.detach().clone()], 0)

    def once(self, name: str, tensor: Tensor | None, dim: int = 1) -> None:
        """Keep it unless something that shows it better already has, in this call."""
        if not self.shown(name):
            self.put(name, tensor, dim)

    def shown(self, name: str) -> bool:
        """Whether this call's part of it is there."""
        pieces, dim = self._pieces.get(name, ([], 1))
        return sum(piece.shape[2 if dim == 2 else 1] for piece in pieces) >= self._done + self.leading[1]

    def write(self, tape: Tape) -> None:
        """Onto ``tape``, in the order in which it was seen."""
        for name, (pieces, dim) in self._pieces.items():
            whole = torch.cat(pieces, dim=1 if dim == -1 else dim) if len(pieces) > 1 else pieces[0]
            tape.record(name, whole.flatten(0, 1) if dim == -1 else whole)

    def forget(self, *names: str) -> None:
        """Take away what was kept under these names."""
        for name in names:
            self._pieces.pop(name, None)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """What moectl itself computes is not looked at, nor put on the graph."""
        self.watch.asleep += 1
        try:
            with torch.no_grad():
                yield
        finally:
            self.watch.asleep -= 1

"""What the checks look at: one model, whatever it came from, and one batch of tokens.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moectl.corpus.loader import IGNORED
from moectl.doctor.report import NotMade
from moectl.models.modes import eval_mode

SEED = 0


class Tokens(NamedTuple):
    """A batch: ``input_ids``, ``labels`` (-100: not scored) and ``doc_ids`` or None ``[B, S]``; ``domain_ids [B]``.

    Attributes:
        origin: where they come from, for the reader.
        drawn: whether they are random, and so say little of what real text would do.
    """

    input_ids: Tensor
    labels: Tensor
    doc_ids: Tensor | None
    domain_ids: Tensor
    origin: str
    drawn: bool

    @property
    def number(self) -> int:
        return self.input_ids.numel()

    def rows(self, count: int) -> Tokens:
        """The first ``count`` rows."""
        cut = [None if t is None else t[:count] for t in (self.input_ids, self.labels, self.doc_ids, self.domain_ids)]
        return self._replace(input_ids=cut[0], labels=cut[1], doc_ids=cut[2], domain_ids=cut[3])  # type: ignore[arg-type]

    def columns(self, count: int) -> Tokens:
        """The first ``count`` tokens of each row."""
        cut = [None if t is None else t[:, :count] for t in (self.input_ids, self.labels, self.doc_ids)]
        return self._replace(input_ids=cut[0], labels=cut[1], doc_ids=cut[2])  # type: ignore[arg-type]

    def padded(self, left: int, right: int) -> tuple[Tokens, Tensor]:
        """With padding (token 0, of the neighbour's document), and the mask ``[B, S]`` of the real tokens."""

        def pad(values: Tensor, fill: int | None) -> Tensor:
            edges = (values[:, :1], values[:, -1:])
            sides = [
                edge.expand(-1, width) if fill is None else torch.full((len(values), width), fill)
                for edge, width in zip(edges, (left, right), strict=True)
            ]
            return torch.cat([sides[0], values, sides[1]], dim=1)

        mask_BS = pad(torch.ones_like(self.input_ids), 0).bool()
        doc_ids = None if self.doc_ids is None else pad(self.doc_ids, None)
        ids, labels = pad(self.input_ids, 0), pad(self.labels, IGNORED)
        return self._replace(input_ids=ids, labels=labels, doc_ids=doc_ids), mask_BS


def drawn_tokens(vocab_size: int, rows: int, length: int, why: str) -> Tokens:
    """Random token ids from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=generator)
    origin = f"{rows * length:,} random token ids ({why})"
    return Tokens(ids[:, :-1], ids[:, 1:].clone(), None, torch.zeros(rows, dtype=torch.int64), origin, True)


class Route(NamedTuple):
    """One layer's decisions: ``indices`` and ``weights [T, K]``, ``keep [T, K]`` or None, ``logits [T, E]`` or None."""

    indices: Tensor
    weights: Tensor
    keep: Tensor | None
    logits: Tensor | None

    def plan(self, num_experts: int) -> Tensor:
        """Combine weights by expert ``[T, E]``, which do not depend on the order of slots."""
        weights = self.weights.detach()
        weights = weights if self.keep is None else weights.masked_fill(~self.keep, 0.0)
        plan_TE = torch.zeros(len(weights), num_experts, dtype=weights.dtype)
        return plan_TE.scatter_add(1, self.indices, weights)

    def counts(self, num_experts: int) -> Tensor:
        """Assignments ``[E]``."""
        chosen = self.indices if self.keep is None else self.indices[self.keep]
        return torch.bincount(chosen.reshape(-1), minlength=num_experts)


class Seen(NamedTuple):
    """One pass: ``output [B, S, ·]``; by layer its route and input ``[B, S, D]``; balance values by name."""

    output: Tensor
    routes: dict[int, Route]
    inputs: dict[int, Tensor]
    balance: dict[str, float]
    dropped: dict[int, int] = {}


class Losses(NamedTuple):
    """With their graphs: the language-model loss, and the balance loss as it is added (None: there is none)."""

    lm: Tensor
    balance: Tensor | None
    no_balance: str = ""


@dataclass(frozen=True)
class Layer:
    """One MoE layer.

    Attributes:
        number: of the layer.
        block: ``[B, S, D] -> [B, S, D]``.
        router, gate: the router, and its weight ``[E, D]``.
        router_name: its name in the model.
        experts: parameter name -> stacked ``[E, ...]``.
        top_k: experts per token.
        learns: whether the gate is meant to learn.
        limited: whether an expert's room is bounded in eval.
    """

    number: int
    block: nn.Module
    router: nn.Module
    gate: nn.Parameter
    router_name: str
    experts: Mapping[str, Tensor]
    top_k: int
    learns: bool = True
    limited: bool = False

    @property
    def num_experts(self) -> int:
        return int(self.gate.shape[0])

    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter."""
        return {f"{self.router_name}.{name}": parameter for name, parameter in self.router.named_parameters()}


@dataclass(frozen=True)
class Training:
    """How a model was trained, as far as that is known.

    Attributes:
        groups: the optimizer's: ``{"params": [names], "weight_decay": …}`` as saved; None where unknown.
        built: the same as the optimizer would be built today; None where unknown.
        start: parameter name -> value at step 0; None where it is gone.
        step: optimizer steps done; None where unknown.
        copied: whether the experts started as copies of a dense MLP.
        why: what to say of what is unknown.
        frozen: parameters that the run's config keeps as they are.
        frozen_experts: experts by layer whose rows it keeps, in tensors of which others move.
    """

    groups: Sequence[Mapping[str, Any]] | None = None
    built: Sequence[Mapping[str, Any]] | None = None
    start: Mapping[str, Tensor] | None = None
    step: int | None = None
    copied: bool = False
    why: str = ""
    frozen: Collection[str] = ()
    frozen_experts: Mapping[int, Collection[int]] = field(default_factory=dict)


@dataclass
class Audited(ABC):
    """A model, its MoE layers, and a batch.

    Attributes:
        title: what it is, for the reader.
        model: on the CPU, in float32 at least.
        layers: by number; empty for a dense model.
        tokens: the batch.
        dtypes: name -> dtype of parameters and buffers as they were stored.
        training: how it was trained.
        layer_total: layers with and without experts.
        notes: what is to be said beside the report.
        kept: what one check has computed and another needs too, by name.
    """

    title: str
    model: nn.Module
    layers: Mapping[int, Layer]
    tokens: Tokens
    dtypes: Mapping[str, torch.dtype]
    training: Training
    layer_total: int
    notes: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def look(self, tokens: Tokens, mask: Tensor | None = None) -> Seen:
        """One pass in the model's present mode; ``mask [B, S]`` marks real tokens."""

    @abstractmethod
    def losses(self, tokens: Tokens) -> Losses:
        """The losses of the batch in the model's present mode, with their graphs."""

    @cached_property
    def seen(self) -> Seen:
        """The batch, in eval mode."""
        with eval_mode(self.model), seeded():
            return self.look(self.tokens)

    @cached_property
    def trained(self) -> Seen:
        """The batch, in training mode: with noise, dropout and schedules."""
        with training_mode(self.model), torch.no_grad():
            return self.look(self.tokens)

    def routed_layers(self) -> dict[int, Layer]:
        """The MoE layers.

        Raises:
            NotMade: there are none.
        """
        if not self.layers:
            raise NotMade("dense: it has no experts, so there is nothing to route")
        return dict(self.layers)


@contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """torch's generator at a fixed seed inside, and as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode with gradients; afterwards modes and buffers are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    try:
        with torch.enable_grad(), seeded():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

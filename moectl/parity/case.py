"""One thing to compare: a component, its config, its inputs; and who can be asked to compute it.

Shape suffixes: B batch, S sequence, D hidden, T tokens, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moectl.parity.tape import Tape

Level = Literal["model", "layer", "moe", "attention", "router"]
#: Weights by canonical name: Hugging Face's module names with fused experts, relative to the component.
Weights = Mapping[str, Tensor]
#: ``reroute(layer, router_logits [T, E]) -> (weights [T, K], indices [T, K])``: another side's choice, injected.
Reroute = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    """What goes in. A model takes ``input_ids``, every other component ``hidden``.

    Attributes:
        input_ids: ``[B, S]`` int64.
        hidden: ``[B, S, D]`` in the case's dtype; a router is called with it as ``[T, D]``.
        attention_mask: ``[B, S]`` bool, True for real tokens; None: all real.
        positions: ``[B, S]`` int64; None: 0, 1, 2, ... (with left padding: counted from the first real token).
        doc_ids: ``[B, S]`` int64; attention stays within a document; None: one document.
        labels: ``[B, S]`` int64 as Hugging Face takes them (not yet shifted; -100 is not scored), models only.
        cotangent: ``[B, S, D]``, for a component: the objective is ``(output * cotangent).sum()``. A router's output
            is its ``mlp.weights``, and its cotangent ``[T, E]``. Without labels or a cotangent there are no gradients.
        chunks: lengths of the pieces in which a model is fed with a cache; None: all at once, without one.
    """

    input_ids: Tensor | None = None
    hidden: Tensor | None = None
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    doc_ids: Tensor | None = None
    labels: Tensor | None = None
    cotangent: Tensor | None = None
    chunks: tuple[int, ...] | None = None


def positions_of(inputs: Inputs) -> Tensor:
    """``inputs.positions``, or what None stands for: ``[B, S]`` int64.

    Counted from each row's first real token; padding before it is at 0, padding behind goes on counting.
    Hand these to every side: Hugging Face's own default counts left padding, its ``generate`` does not.
    """
    given = inputs.input_ids if inputs.input_ids is not None else inputs.hidden
    assert given is not None
    batch, length = given.shape[:2]
    if inputs.positions is not None:
        return inputs.positions.expand(batch, length)
    counted = torch.arange(length, device=given.device).expand(batch, length)
    if inputs.attention_mask is None:
        return counted
    first_real = inputs.attention_mask.long().argmax(dim=-1, keepdim=True)
    return (counted - first_real).clamp(min=0)


@dataclass(frozen=True)
class Case:
    """A probe made concrete.

    Attributes:
        probe: its name.
        level: the component.
        config: the family's config as a plain dict, in the form of config.json.
        weights: canonical names, in ``dtype``.
        inputs: in ``dtype``.
        dtype: of weights and activations. In float64 both sides run under :func:`moectl.parity.lift.lifted`.
        training: both sides in training mode (nothing random is on: dropout and noise are 0).
        gradients: whether ``grad.*`` is wanted.
        compiled: the candidate under ``torch.compile``.
    """

    probe: str
    level: Level
    config: dict[str, Any]
    weights: Weights
    inputs: Inputs
    dtype: torch.dtype = torch.float64
    training: bool = False
    gradients: bool = True
    compiled: bool = False
    notes: tuple[str, ...] = field(default=())


class Subject(Protocol):
    """A side of the comparison."""

    name: str

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        """Compute the case; leave no trace in ``case``'s tensors.

        Raises:
            Unsupported: this side has no such component or cannot take such inputs, and why.
            MoectlError: it failed.
        """
        ...


class Unsupported(Exception):
    """A probe does not apply to a side; the text says why. Reported as 'not compared', never skipped in silence."""

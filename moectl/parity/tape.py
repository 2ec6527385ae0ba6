"""What one side of a comparison computed: named tensors in model order."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from torch import Tensor


class Tape(Mapping[str, Tensor]):
    """Tensors by name, in the order in which they were first recorded.

    A tensor is copied as it is recorded, so that an in-place change further down does not reach it.
    Names are the same on every side. ``B`` batch, ``S`` sequence, ``T`` = B·S tokens, ``D`` hidden, ``H``
    heads, ``G`` key/value heads, ``P`` head dimension, ``E`` experts, ``V`` vocabulary:

    ==========================  =============  ==================================================================
    ``embeddings``              ``[B, S, D]``  of the tokens; the input of layer 0
    ``rope.cos``, ``rope.sin``  ``[B, S, P]``  the rotary tables
    ``attn.input``              ``[B, S, D]``  after the norm before attention
    ``attn.q``, ``attn.k``      ``[B, H, S, P]``, ``[B, G, S, P]``  after q/k norm, before the rotation
    ``attn.v``                  ``[B, G, S, P]``
    ``attn.q_rotated``, ``attn.k_rotated``  as above, after the rotation
    ``attn.heads``              ``[B, S, H·P]``  what the output projection is given
    ``attn.output``             ``[B, S, D]``  before it is added to the residual stream
    ``attn.residual``           ``[B, S, D]``  after it is added
    ``mlp.input``               ``[B, S, D]``  after the norm before the MLP
    ``mlp.router_logits``       ``[T, E]``     raw: before any softmax or bias that only chooses
    ``mlp.chosen``              ``[T, E]``     bool: which experts each token visits
    ``mlp.weights``             ``[T, E]``     combine weights, 0 where not chosen: slot order does not matter
    ``mlp.expert_outputs``      ``[T, E, D]``  every expert's own, unweighted output on every token
    ``mlp.routed``              ``[B, S, D]``  the weighted sum over the chosen experts
    ``mlp.shared``              ``[B, S, D]``  what shared experts add, where the family has them
    ``mlp.output``              ``[B, S, D]``  before it is added to the residual stream
    ``mlp.residual``            ``[B, S, D]``  after it is added
    ``final_norm``              ``[B, S, D]``
    ``logits``                  ``[B, S, V]``
    ``loss``                    scalar         mean next-token loss in nats over the labels
    ``balance_loss``            scalar         as the family's own implementation computes it
    ``grad.input``              ``[B, S, D]``  of the objective, in the embeddings or the component's input
    ``grad.NAME``               as NAME        of the objective, in the parameter of that canonical name
    ==========================  =============  ==================================================================

    In a whole model ``attn.*`` and ``mlp.*`` of layer 3 are ``layers.3.attn.*`` and ``layers.3.mlp.*``; in a lone
    component they stand bare. What a side cannot show is not on its tape.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def record(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of ``tensor``. Recorded twice, the first stays: cached decoding sees later calls."""
        if name not in self._tensors:
            self._tensors[name] = tensor.detach().clone()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def model_order(name: str) -> tuple[int, ...]:
    """A sort key that puts names in the order in which a model computes them, gradients last.

    Unknown names come after all known ones of their layer. Gradients: the input's, the embedding's, then by layer.
    """
    if name.startswith("grad."):
        return (4, *_gradient_order(name.removeprefix("grad.")))
    layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("-1", "", name)
    within = _WITHIN.get(rest, len(_WITHIN))
    stage = 0 if rest in _BEFORE else 3 if rest in _AFTER else 1
    return (stage, int(layer), within)


def _gradient_order(name: str) -> tuple[int, int]:
    if name in ("input", "model.embed_tokens.weight"):
        return (-1, int(name != "input"))
    before, found, rest = name.partition("layers.")
    if found and before in ("", "model."):
        return (int(rest.partition(".")[0]), 0)
    return (sys.maxsize, 0)


_BEFORE = ("embeddings", "rope.cos", "rope.sin")
_LAYER = (
    "attn.input attn.q attn.k attn.v attn.q_rotated attn.k_rotated attn.heads attn.output attn.residual mlp.input "
    "mlp.router_logits mlp.chosen mlp.weights mlp.expert_outputs mlp.routed mlp.shared mlp.output mlp.residual"
).split()
_AFTER = ("final_norm", "logits", "loss", "balance_loss")
_WITHIN = {name: place for place, name in enumerate((*_BEFORE, *_LAYER, *_AFTER))}

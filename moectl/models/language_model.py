"""What the trainer, evaluation, inspection and checkpoints ask of a language model, whoever wrote it.

Shapes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moectl.config.schema import MoEConfig
from moectl.moe.layer import MoELayer


@runtime_checkable
class LanguageModel(Protocol):
    """A decoder with a language-model head; an ``nn.Module`` besides.

    Attributes:
        kind: who computes it: moectl's own ``decoder``, or ``hf``, a model of transformers.
        training: the mode.
    """

    training: bool

    @property
    def kind(self) -> Literal["decoder", "hf"]: ...

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""

    @property
    def head_weight(self) -> Tensor:
        """The output embedding ``[V, D]``: logits are final hidden states times its transpose."""

    @property
    def num_layers(self) -> int:
        """Transformer layers, dense ones and those with experts."""

    @property
    def moe(self) -> MoEConfig | None:
        """What it was given experts with; None for a dense model."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where the model has none."""

    @property
    def max_length(self) -> int | None:
        """Positions that the model was made for; None for no limit."""

    def hidden_states(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, token_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Normed final hidden states ``[B, S, D]`` for ``input_ids [B, S]``.

        Args:
            doc_ids: ``[B, S]``; attention never crosses from one document to another.
            token_mask: ``[B, S]`` bool, real tokens; padding is neither attended to nor routed.
            cache: keys and values of earlier positions, of the model's own kind; extended in place.
        """

    def forward(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, token_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Logits ``[B, S, V]``."""

    def __call__(
        self, input_ids: Tensor, doc_ids: Tensor | None = None, token_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor: ...

    def lm_loss_sum(
        self, input_ids: Tensor, labels: Tensor, doc_ids: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Summed next-token loss in nats against ``labels [B, S]`` (-100: not scored): a 0-d tensor."""

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """In training, keep each layer's input alone, and compute the rest again in the backward pass."""

    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by layer number, in model order; empty for a dense model."""

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``input_ids [B, S]`` continued: ``[B, S + new]``; greedy at temperature 0."""

    def describe(self) -> dict[str, Any]:
        """The architecture without weights, as JSON; :func:`moectl.hf.folder.build_described` makes the model of it."""

    # What is used of nn.Module.

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def float(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

"""A transformers model, dense or upcycled, as the language model that moectl trains and measures.

Shape suffixes: B batch, S sequence, D hidden, N flattened positions.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moectl.config.schema import MoEConfig
from moectl.hf.dense import family_of
from moectl.hf.upcycle import MASK, upcycled_with
from moectl.models.cross_entropy import linear_cross_entropy
from moectl.models.generation import choose_token, continue_text
from moectl.moe.checkpointing import contexts
from moectl.moe.layer import MoELayer


class HFLanguageModel(nn.Module):
    """A model of transformers behind :class:`moectl.models.language_model.LanguageModel`.

    Packed documents are kept apart as transformers itself does it: positions restart with each of them, and
    from that it makes a block-diagonal mask for whatever attention the model uses. A document is a run of one
    id; padding ends it.

    Args:
        model: a causal language model of a family that moectl upcycles, dense or upcycled. It is not copied.

    Raises:
        ConfigError: another family, or no language-model head.
    """

    kind: Literal["decoder", "hf"] = "hf"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.family = family_of(model)
        self.family.backbone_of(model)
        self.model = model

    @property
    def config(self) -> Any:
        """transformers' own."""
        return self.model.config

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def head_weight(self) -> Tensor:
        return self._head.weight

    @property
    def num_layers(self) -> int:
        return len(self.family.layers_of(self.model))

    @property
    def moe(self) -> MoEConfig | None:
        return upcycled_with(self.model)

    @property
    def eos_token_id(self) -> int | None:
        """The first, where a model has several."""
        given = self.model.config.eos_token_id
        if isinstance(given, (list, tuple)):
            given = given[0] if given else None
        return None if given is None else int(given)

    @property
    def max_length(self) -> int | None:
        given = getattr(self.model.config, "max_position_embeddings", None)
        return None if given is None else int(given)

    def hidden_states(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Normed final hidden states ``[B, S, D]`` for ``input_ids [B, S]``.

        Args:
            doc_ids: ``[B, S]``; attention never crosses from one document to another.
            token_mask: ``[B, S]`` bool, real tokens; padding is neither attended to nor routed.
            cache: one of transformers' caches; extended in place.

        Raises:
            ValueError: ``doc_ids`` or a ``token_mask`` together with a cache; more positions than the model has.
        """
        if cache is not None and (doc_ids is not None or token_mask is not None):
            raise ValueError("cached decoding takes neither doc_ids nor a token_mask: decode rows of equal length")
        length = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"the model has {self.max_length} positions, not {length}: cut texts shorter")
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        if doc_ids is not None:
            given["position_ids"] = document_positions(doc_ids, token_mask)
            if token_mask is not None and upcycled_with(self.model) is not None:
                given[MASK] = token_mask
        elif token_mask is not None:
            given["attention_mask"] = token_mask.long()
            given["position_ids"] = (token_mask.long().cumsum(1) - 1).clamp(min=0)
        hidden_BSD: Tensor = self.family.backbone_of(self.model)(input_ids=input_ids, **given).last_hidden_state
        return hidden_BSD

    def forward(
        self,
        input_ids: Tensor,
        doc_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits ``[B, S, V]``; arguments as for :meth:`hidden_states`."""
        return self._head(self.hidden_states(input_ids, doc_ids, token_mask, cache))

    def lm_loss_sum(
        self, input_ids: Tensor, labels: Tensor, doc_ids: Tensor | None = None, token_mask: Tensor | None = None
    ) -> Tensor:
        """Summed next-token loss in nats against ``labels [B, S]`` (-100: not scored), logits never made whole."""
        hidden_ND = self.hidden_states(input_ids, doc_ids, token_mask).flatten(0, 1)
        return linear_cross_entropy(hidden_ND, self._head.weight, labels.flatten())

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """In training, keep each layer's input alone, and compute the rest again in the backward pass."""
        # transformers newer than 5.17 calls it activation checkpointing; the older name still works, with a warning.
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        if enabled:
            again = {"use_reentrant": False, "context_fn": contexts([self])}
            getattr(self.model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": again})
        else:
            getattr(self.model, f"{kind}_checkpointing_disable")()

    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by layer number, in model order."""
        layers = enumerate(self.family.layers_of(self.model))
        found = ((number, getattr(layer, self.family.mlp)) for number, layer in layers)
        return {number: mlp for number, mlp in found if isinstance(mlp, MoELayer)}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue ``input_ids [B, S]`` with a key/value cache: ``[B, S + new]``; as :meth:`Decoder.generate`.

        transformers' own ``model.generate`` works as well, and knows more ways to sample.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        return continue_text(
            lambda step_ids: self._head(self.hidden_states(step_ids, cache=cache)[:, -1]),
            input_ids,
            max_new_tokens,
            eos_token_id=self.eos_token_id,
            choose=lambda logits_BV: choose_token(logits_BV, temperature, top_k, generator),
        )

    def describe(self) -> dict[str, Any]:
        """The architecture without weights, as JSON: transformers' config, and what it was upcycled with."""
        moe = upcycled_with(self.model)
        return {
            "kind": self.kind,
            "config": json.loads(self.model.config.to_json_string(use_diff=False)),
            "moe": None if moe is None else moe.model_dump(mode="json"),
            "moe_layers": list(self.moe_layers()),
        }

    @property
    def _head(self) -> nn.Linear:
        head: nn.Linear = self.model.get_output_embeddings()
        return head


def document_positions(doc_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """``[B, S]``: positions that start from 0 with every document; each token of padding is one of its own."""
    fresh_BS = torch.ones_like(doc_ids, dtype=torch.bool)
    fresh_BS[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    if token_mask is not None:
        fresh_BS |= ~token_mask
        fresh_BS[:, 1:] |= ~token_mask[:, :-1]
    counted_BS = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    starts_BS = torch.where(fresh_BS, counted_BS, torch.zeros_like(counted_BS)).cummax(1).values
    return counted_BS - starts_BS

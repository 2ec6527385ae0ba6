"""Hugging Face's eager attention with a listener: what goes into it is seen, what comes out is unchanged.

transformers looks an attention function up by the name in ``config._attn_implementation``. The name registered
here runs the ``eager_attention_forward`` of the module's own file, on the mask that transformers makes for eager.

Shape suffixes: B batch, S sequence, C cached and new positions, H heads, G key/value heads, P head dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask, eager_mask
from transformers.modeling_utils import AttentionInterface

#: Called with the attention module, queries ``[B, H, S, P]`` and keys ``[B, G, C, P]``, both rotated.
Listener = Callable[[nn.Module, Tensor, Tensor], None]

LISTENED = "moectl_eager_listened"
_listeners: list[Listener] = []


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    for listener in _listeners:
        listener(module, query, key)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    outcome: tuple[Tensor, Tensor] = eager(module, query, key, value, mask, **options)
    return outcome


AttentionInterface.register(LISTENED, _attention)
AttentionMaskInterface.register(LISTENED, eager_mask)


@contextmanager
def listened(config: Any, listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every attention call of the modules that share ``config``, while the context lasts."""
    before = config._attn_implementation
    config._attn_implementation = LISTENED
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
        config._attn_implementation = before


def new_cache(config: Any) -> Any:
    """An empty cache of keys and values for a model of this config."""
    return DynamicCache(config=config)


def causal_mask(config: Any, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask that a whole model of this config would hand to its layers.

    Args:
        config: a transformers config.
        hidden: ``[B, S, D]``: its shape, dtype and device count.
        attention_mask: ``[B, S]`` bool, or ``[B, 1, S, C]`` ready-made, which is returned.

    Returns:
        ``[B, 1, S, S]``: 0 where a query may look, the dtype's least number where not.
    """
    mask = create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None)
    assert isinstance(mask, Tensor), "eager attention has a mask of its own"
    return mask


def document_mask(doc_ids: Tensor, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A causal mask that keeps attention within a document: block-diagonal.

    Args:
        doc_ids: ``[B, S]``.
        attention_mask: ``[B, S]`` bool, True for real tokens; None: all.
        dtype: of the mask.

    Returns:
        ``[B, 1, S, S]`` as transformers' eager attention adds it to the scores.
    """
    length = doc_ids.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=doc_ids.device).tril()
    allowed_BSS = causal_SS & (doc_ids[:, :, None] == doc_ids[:, None, :])
    if attention_mask is not None:
        allowed_BSS = allowed_BSS & attention_mask.bool()[:, None, :]
    least = torch.finfo(dtype).min
    return torch.zeros(allowed_BSS.shape, dtype=dtype, device=doc_ids.device).masked_fill(~allowed_BSS, least)[:, None]

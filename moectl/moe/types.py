"""What routers return. Shape suffixes: T tokens, E experts, K slots per token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """One routing decision for ``T`` flattened tokens. A NamedTuple, so that pytrees see its leaves.

    Attributes:
        topk_indices: ``[T, K]`` int64, chosen experts, always in ``[0, E)``, padding included.
        topk_weights: ``[T, K]`` combine weights; they carry the router's gradient.
        router_logits: ``[T, E]`` raw, noise-free logits; the z-loss is computed from these.
        router_probs: ``[T, E]`` post-noise distribution over experts; load balancing uses these.
        router_probs_clean: ``[T, E]`` noise-free distribution; entropy, inspection and logs use these.
        entropy: ``[T]`` entropy of the clean distribution, nats.
        keep: ``[T, K]`` bool, the slots in use, or None for all. Unused slots carry weight 0.
    """

    topk_indices: Tensor
    topk_weights: Tensor
    router_logits: Tensor
    router_probs: Tensor
    router_probs_clean: Tensor
    entropy: Tensor
    keep: Tensor | None = None

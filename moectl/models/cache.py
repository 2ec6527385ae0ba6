"""Keys and values of earlier positions, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Grows by concatenation; ``length`` is the number of positions that every layer has seen.

    Shapes: ``[B, G, C, P]`` per layer, G key/value heads, C positions, P head dimension.

    Attributes:
        token_mask: ``[B, C]`` bool, which positions are real tokens; None while all are.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self.token_mask: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions of one layer and return all of them."""
        earlier = self._layers[layer]
        if earlier is not None:
            keys, values = torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)
        self._layers[layer] = keys, values
        return keys, values

    def extend_mask(self, token_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """Append which of the new positions ``input_ids [B, S]`` are real; return the mask of all of them.

        Called before :meth:`extend` and before ``length`` moves.
        """
        if token_mask is None and self.token_mask is None:
            return None
        new = torch.ones_like(input_ids, dtype=torch.bool) if token_mask is None else token_mask
        earlier = new.new_ones(new.shape[0], self.length) if self.token_mask is None else self.token_mask
        self.token_mask = torch.cat([earlier, new], dim=1)
        return self.token_mask

"""Keys and values of earlier positions, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Grows by concatenation; ``length`` is the number of positions that every layer has seen.

    Shapes: ``[B, G, C, P]`` per layer, G key/value heads, C positions, P head dimension.
    """

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions of one layer and return all of them."""
        earlier = self._layers[layer]
        if earlier is not None:
            keys, values = torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)
        self._layers[layer] = keys, values
        return keys, values

"""Cases that tell mistakes apart: several rows, several lengths, padding; random, so that nothing agrees by chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moectl.parity.case import Case, Inputs

#: (batch, sequence, whether there is padding). Lengths that are no multiple of anything.
SHAPES = ((2, 11, False), (1, 17, False), (3, 7, True))


def separating_cases(case: Case) -> Iterator[Case]:
    """The same component, config and weights as ``case``, on other inputs."""
    longest = int(case.config.get("max_position_embeddings", 64))
    for seed, (batch, length, padded) in enumerate(SHAPES):
        inputs = _inputs(case, batch, min(length, longest), seed)
        if padded and case.level in ("attention", "layer", "model"):
            real_BS = torch.ones(batch, length, dtype=torch.bool)
            real_BS[0, length // 2 :] = False
            real_BS[1, : length // 2] = False  # on the left: what a causal mask does not hide
            inputs = inputs._replace(attention_mask=real_BS)
        yield replace(case, probe=f"separating {seed}", inputs=inputs, gradients=False, compiled=False)


def _inputs(case: Case, batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(1000 + seed)
    if case.inputs.input_ids is not None:
        vocabulary = int(case.config["vocab_size"])
        return Inputs(input_ids=torch.randint(vocabulary, (batch, length), generator=generator))
    size = int(case.config["hidden_size"])
    hidden = torch.randn(batch, length, size, generator=generator, dtype=torch.float64)
    return Inputs(hidden=hidden.to(case.dtype))

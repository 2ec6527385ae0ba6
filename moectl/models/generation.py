"""Continuing text with a key/value cache, whatever model it is.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moectl.moe.router import at_least_float32


@torch.no_grad()
def continue_text(
    last_logits: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    eos_token_id: int | None,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Continue ``input_ids [B, S]``: ``[B, S + new]``.

    Ends early once every row has produced the end-of-text token; a row that has ended goes on with it.

    Args:
        last_logits: takes the ids that are new since its last call and returns the logits ``[B, V]`` after them.
        choose: a token per row ``[B]`` from logits ``[B, V]``.
    """
    ended_B = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    step_ids, output = input_ids, [input_ids]
    for _ in range(max_new_tokens):
        next_B = choose(at_least_float32(last_logits(step_ids)))
        if eos_token_id is not None:
            next_B = torch.where(ended_B, eos_token_id, next_B)
            ended_B = ended_B | (next_B == eos_token_id)
        step_ids = next_B[:, None]
        output.append(step_ids)
        if bool(ended_B.all()):
            break
    return torch.cat(output, dim=1)


def choose_token(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token per row ``[B]``: the most likely at temperature 0, else sampled from the top k.

    Raises:
        ValueError: a negative temperature, or ``top_k`` below 1.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be >= 0 and top_k >= 1 or None, not {temperature} and {top_k}")
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    if top_k is not None:
        kth = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -math.inf)
    return torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1, generator=generator).squeeze(1)

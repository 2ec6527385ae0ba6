"""Continuing text with a key/value cache, whatever model it is: all at once, or token by token.

Shape suffixes: B batch, S sequence, V vocabulary, T tokens of a call, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moectl.errors import MoectlError
from moectl.moe.router import at_least_float32, entropy

#: What half a character decodes to.
REPLACEMENT = "\ufffd"
#: A character has at most so many bytes, and so many tokens.
CHARACTER = 4
#: Tokens before the first new one that its text may depend on (a leading space, say).
CONTEXT = 6


class Route(NamedTuple):
    """Routing of one call, in one layer.

    Attributes:
        experts, weights: ``[T, K]``: whom each token visited, and their weights.
        probs: ``[T, E]``, noise-free.
        keep: ``[T, K]`` bool, the slots in use; None for all.
    """

    experts: Tensor
    weights: Tensor
    probs: Tensor
    keep: Tensor | None = None

    def last(self) -> Visit:
        """The last token's."""
        used = range(self.experts.shape[1]) if self.keep is None else self.keep[-1].nonzero().flatten().tolist()
        chosen = sorted(((float(self.weights[-1, slot]), -int(self.experts[-1, slot])) for slot in used), reverse=True)
        return Visit(tuple(-expert for _, expert in chosen), float(entropy(self.probs[-1:].double())))


class Visit(NamedTuple):
    """Where one token went in one layer: its experts, the heaviest first, and the entropy of its choice in nats."""

    experts: tuple[int, ...]
    entropy: float


class Said(NamedTuple):
    """One generated token, and who computed it, by layer (nothing where the model ended with it)."""

    token: int
    visits: dict[int, Visit]


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


@torch.no_grad()
def speak(
    last_logits: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    ends: Collection[int],
    choose: Callable[[Tensor], Tensor],
    routes: Callable[[], dict[int, Route]] = dict,
    max_length: int | None = None,
) -> Iterator[Said]:
    """Continue ``input_ids [1, S]`` token by token, until one of ``ends`` (which is not said) or the last position.

    A token is said once the model has read it, so that its own routing is known; the last position's is not read.

    Args:
        last_logits: as for :func:`continue_text`.
        choose: a token per row ``[B]`` from logits ``[B, V]``.
        routes: routing of the last call of ``last_logits``, by layer.
        max_length: positions of the model.

    Raises:
        MoectlError: logits that are no numbers: the model is broken.
    """
    logits_BV, length = last_logits(input_ids), input_ids.shape[1]
    for _ in range(max_new_tokens):
        if bool(logits_BV.isnan().any()) or bool((logits_BV == math.inf).any()):
            raise MoectlError(
                f"the model's logits are no finite numbers at position {length}",
                "It is broken, or in a precision too low for it: see `moectl doctor`.",
            )
        next_B = choose(at_least_float32(logits_BV))
        token = int(next_B)
        if token in ends or (max_length is not None and length >= max_length):
            return
        length += 1
        if length == max_length:
            yield Said(token, {})
            return
        logits_BV = last_logits(next_B[:, None])
        yield Said(token, {layer: route.last() for layer, route in routes().items()})


class TextStream:
    """Token ids one by one into text, never half a character.

    A character may be of several tokens, and a token of a sentence's first word lacks the space that it has
    elsewhere: each new piece is what the decoded text has gained, and waits while it ends within a character.

    Args:
        decode: ids into text.
        before: ids of what stands before, a prompt.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-CONTEXT:])
        self._start, self._read = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that is whole with this token; empty while a character is not."""
        self._ids.append(token)
        return self._gained(whole=True)

    def end(self) -> str:
        """What is left, without the half of a character at its end."""
        return self._gained(whole=False).rstrip(REPLACEMENT)

    def _gained(self, *, whole: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text, end = self._decode(self._ids[self._start :]), len(self._ids)
        if whole and text.endswith(REPLACEMENT):
            if end - self._read < CHARACTER:
                return ""
            end = self._read + 1  # so old a token completes no character any more: it is broken
            text = self._decode(self._ids[self._start : end])
        if len(text) <= len(known):
            return ""
        self._start, self._read = self._read, end
        return text[len(known) :]

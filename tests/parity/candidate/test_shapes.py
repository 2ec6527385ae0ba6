"""Tensors of somebody's code in the tape's shapes."""

from __future__ import annotations

import pytest
import torch

from moectl.parity.candidate.shapes import as_heads, as_rope_table, as_sequence, unrepeated

B, S, H, G, P = 3, 5, 4, 2, 8
HEADS = torch.arange(B * H * S * P).reshape(B, H, S, P)


@pytest.mark.parametrize(
    "given",
    [
        HEADS,
        HEADS.transpose(1, 2),
        HEADS.transpose(1, 2).reshape(B, S, H * P),
        HEADS.transpose(1, 2).reshape(B * S, H * P),
    ],
    ids=["BHSP", "BSHP", "BSD", "TD"],
)
def test_heads_come_before_positions(given: torch.Tensor) -> None:
    found = as_heads(given, (B, S), H, P, key="q", known={})
    assert found is not None and torch.equal(found, HEADS)


def test_as_many_heads_as_positions_are_as_they_were_before() -> None:
    square, known = torch.arange(B * H * H * P).reshape(B, H, H, P), dict[str, str]()
    assert as_heads(square, (B, H), H, P, key="q", known=known) is None
    as_heads(HEADS.transpose(1, 2), (B, S), H, P, key="q", known=known)
    found = as_heads(square, (B, H), H, P, key="q", known=known)
    assert found is not None and torch.equal(found, square.transpose(1, 2))
    as_heads(HEADS, (B, S), H, P, key="k", known=known)
    assert as_heads(square, (B, H), H, P, key="k", known=known) is square


def test_what_has_other_sizes_is_no_heads() -> None:
    for shape in ((B, S, H, P + 1), (B, H, P, S), (B, S, H * P // 2), (B * S * H, P)):
        assert as_heads(torch.zeros(shape), (B, S), H, P, key="q", known={}) is None


def test_repeated_keys_are_taken_back_in_either_order() -> None:
    keys = torch.arange(B * G * S * P).reshape(B, G, S, P)
    for repeated in (keys, keys.repeat_interleave(2, dim=1), keys.repeat(1, 2, 1, 1)):
        found = unrepeated(repeated, H, G)
        assert found is not None and torch.equal(found, keys)
    assert unrepeated(HEADS, H, G) is None


def test_rope_tables_are_spread_over_the_batch() -> None:
    table = torch.arange(S * P).reshape(S, P)
    for given in (table, table[None], table[None, None], table[None, :, None], table.expand(B, S, P)):
        found = as_rope_table(given, (B, S), P)
        assert found is not None and torch.equal(found, table.expand(B, S, P))
    one = as_rope_table(table[:1], (B, 1), P)
    assert one is not None and torch.equal(one, table[:1].expand(B, 1, P))
    for other in (table[:, : P // 2], torch.zeros(64, P), torch.zeros(S, P, dtype=torch.complex64)):
        assert as_rope_table(other, (B, S), P) is None


def test_sequences() -> None:
    tokens = torch.arange(B * S * 6).reshape(B * S, 6)
    for given in (tokens, tokens.reshape(B, S, 6), tokens.reshape(B, S, 2, 3)):
        found = as_sequence(given, (B, S))
        assert found is not None and torch.equal(found, tokens.reshape(B, S, 6))
    assert as_sequence(tokens[1:], (B, S)) is None

"""Token by token: the same tokens as all at once, text without half a character, and who computed what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moectl.errors import MoectlError
from moectl.models.generation import Route, Said, TextStream, choose_token, speak


def greedy(logits_BV: Tensor) -> Tensor:
    return choose_token(logits_BV, 0.0, None, None)


def counting(vocabulary: int = 10) -> tuple[list[list[int]], object]:
    """A "model" whose next token is the last one plus one, and what it was asked."""
    asked: list[list[int]] = []

    def last_logits(ids_BS: Tensor) -> Tensor:
        asked.append(ids_BS[0].tolist())
        logits_BV = torch.zeros(1, vocabulary)
        logits_BV[0, (int(ids_BS[0, -1]) + 1) % vocabulary] = 1.0
        return logits_BV

    return asked, last_logits


def tokens(start: list[int], count: int, ends: set[int], max_length: int | None = None) -> tuple[list[int], list]:
    asked, last_logits = counting()
    said = list(
        speak(last_logits, torch.tensor([start]), count, ends=ends, choose=greedy, max_length=max_length)  # type: ignore[arg-type]
    )
    return [each.token for each in said], asked


def test_the_cache_is_given_what_is_new_only() -> None:
    assert tokens([1, 2, 3], 3, set()) == ([4, 5, 6], [[1, 2, 3], [4], [5], [6]])


def test_any_of_the_ends_ends_it_and_is_not_said() -> None:
    assert tokens([3], 9, {6, 8})[0] == [4, 5]
    assert tokens([3], 9, {4})[0] == []


def test_the_last_position_is_written_and_not_read() -> None:
    """A model of five positions takes five tokens: three given, two new, of which the last is never an input."""
    assert tokens([1, 2, 3], 9, set(), max_length=5) == ([4, 5], [[1, 2, 3], [4]])
    assert tokens([1, 2, 3], 9, set(), max_length=3)[0] == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told(bad: float) -> None:
    with pytest.raises(MoectlError, match="no finite numbers at position 2"):
        list(speak(lambda ids: torch.tensor([[0.0, bad]]), torch.tensor([[0, 1]]), 3, ends=(), choose=greedy))


def test_closed_tokens_are_no_fault() -> None:
    logits = torch.tensor([[-float("inf"), 1.0]])
    said = list(speak(lambda ids: logits, torch.tensor([[0]]), 2, ends=(), choose=greedy))
    assert [each.token for each in said] == [1, 1]


def test_a_visit_is_the_last_tokens_heaviest_first() -> None:
    experts = torch.tensor([[0, 1], [2, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    visit = Route(experts, weights, probs).last()
    assert visit.experts == (0, 2)
    assert visit.entropy == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item())
    keep = torch.tensor([[True, True], [True, False]])
    assert Route(experts, weights, probs, keep).last().experts == (2,)
    assert Route(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]]), probs).last().experts == (1, 3)  # ties: the lower


# --- text


def byte_decode(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, before: str = "") -> list[str]:
    stream = TextStream(byte_decode, list(before.encode()))
    found = [stream.add(byte) for byte in text.encode()]
    return [*found, stream.end()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語テキスト", "👩‍🚀 ok", "mixed é日👍x", ""])
def test_every_piece_is_of_whole_characters(text: str) -> None:
    found = pieces(text)
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces("é!") == ["", "é", "!", ""]
    assert pieces("日") == ["", "", "日", ""]


def test_half_a_character_at_the_end_is_left_out() -> None:
    stream = TextStream(byte_decode)
    assert [stream.add(byte) for byte in "a日".encode()[:-1]] == ["a", "", ""]
    assert stream.end() == ""


def test_a_replacement_character_of_the_text_itself_is_kept_once_more_follows() -> None:
    assert "".join(pieces("a\ufffdb")) == "a\ufffdb"


def test_bytes_that_are_no_text_do_not_hold_it_up() -> None:
    stream = TextStream(byte_decode)
    found = [stream.add(byte) for byte in b"\xff\xff\xff\xff\xff" + "日x".encode()]
    assert found[3] == "\ufffd" and "".join([*found, stream.end()]) == 5 * "\ufffd" + "日x"


def test_a_prompt_decides_about_leading_spaces() -> None:
    """As sentencepiece does it: a word's space is dropped where it begins the text."""

    words = {1: " the", 2: " sea", 3: "s"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[token] for token in ids).removeprefix(" ")

    alone, after = TextStream(decode), TextStream(decode, [1])
    assert [alone.add(token) for token in (2, 3)] == ["sea", "s"]
    assert [after.add(token) for token in (2, 3)] == [" sea", "s"]


def test_said_is_a_token_and_its_visits() -> None:
    assert Said(3, {}).visits == {}

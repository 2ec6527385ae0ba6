from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from moectl.corpus.tokenization import (
    END_OF_TEXT,
    encode,
    end_id,
    load_tokenizer,
    parse_spec,
    train_bpe,
    vocab_size,
)
from moectl.errors import ConfigError, MoectlError, NotFoundError

TEXTS = ["def f(x):\n\treturn x + 1\r\n", "the quick brown fox", "∑ é “quoted” 🙂 naïve"] * 5
BPE = train_bpe(TEXTS, 300)


def word_piece() -> Tokenizer:
    """Not byte-level: lower-cases, strips accents and white space, has unknown words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    return tokenizer


WORD_PIECE = word_piece()


def test_training_is_deterministic_and_puts_end_of_text_first() -> None:
    again = train_bpe(iter(TEXTS), 300)
    assert again.to_str() == BPE.to_str()
    assert end_id(BPE) == 0
    assert 257 < vocab_size(BPE) <= 300


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=8))
def test_bytes_add_up_and_text_comes_back(texts: list[str]) -> None:
    for text, encoded in zip(texts, encode(BPE, texts), strict=True):
        assert BPE.decode(encoded.ids.tolist(), skip_special_tokens=False) == text
        assert int(encoded.byte_counts.sum()) == len(text.encode())
        assert len(encoded.ids) == len(encoded.byte_counts)
        assert not text or encoded.byte_counts.min() > 0


@settings(max_examples=80, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_bytes_add_up_for_a_tokenizer_that_is_not_byte_level(text: str) -> None:
    (encoded,) = encode(WORD_PIECE, [text])
    if len(encoded.ids):  # control characters alone give no token at all
        assert int(encoded.byte_counts.sum()) == len(text.encode())


def test_offsets_give_each_token_its_own_bytes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, "é": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (encoded,) = encode(tokenizer, ["ab é ab  "])
    assert encoded.ids.tolist() == [0, 1, 0]
    assert encoded.byte_counts.tolist() == [2, 3, 5]


def test_a_prefix_space_does_not_count_as_text() -> None:
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (encoded,) = encode(tokenizer, ["the fox"])
    assert int(encoded.byte_counts.sum()) == len("the fox")


def test_a_written_end_of_text_is_text() -> None:
    text = f"before {END_OF_TEXT} after"
    (encoded,) = encode(BPE, [text])
    assert 0 not in encoded.ids
    assert int(encoded.byte_counts.sum()) == len(text)


def test_an_existing_tokenizer_loses_truncation_and_padding(tmp_path: Path) -> None:
    cut = Tokenizer.from_str(BPE.to_str())
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(tmp_path / "tokenizer.json"))
    (encoded,) = encode(load_tokenizer(tmp_path / "tokenizer.json"), ["the quick brown fox"])
    assert np.array_equal(encoded.ids, next(encode(BPE, ["the quick brown fox"])).ids)


def test_the_configured_end_of_text_wins(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(BPE.to_str())
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    spec = parse_spec(str(tmp_path))
    assert spec.end == "<stop>"
    assert end_id(tokenizer, spec.end) == tokenizer.token_to_id("<stop>") != 0
    with pytest.raises(ConfigError, match="no end-of-text token"):
        end_id(BPE, "<stop>")


def test_gaps_in_the_ids_count_as_vocabulary() -> None:
    assert vocab_size(Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))) == 10


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-5", "bpe:8k", "bpe:99999999", "bpe:²"])
def test_a_size_out_of_range_is_a_usage_error(spec: str) -> None:
    with pytest.raises(ConfigError, match="size must be a number from 257"):
        parse_spec(spec)


def test_a_path_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no tokenizer"):
        parse_spec(str(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        parse_spec(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"not": "one"}')
    with pytest.raises(MoectlError, match="is not a tokenizer") as caught:
        parse_spec(str(tmp_path))
    assert caught.value.exit_code == 1

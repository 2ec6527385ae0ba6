"""The tokenizer of a dataset: a byte-level BPE trained on its training split, or an existing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moectl.corpus.manifest import MANIFEST_FILE, TOKENIZER_FILE
from moectl.errors import ConfigError, MoectlError, NotFoundError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
_MIN_SIZE, _MAX_SIZE = 257, 1_000_000
_MAX_TOKEN_CHARS = 64
_BATCH = 256


class TokenizerSpec(NamedTuple):
    """``bpe_size`` to train one, or ``data`` and ``end`` (end-of-text token) of an existing one.

    ``key`` is what a dataset's identity depends on: the size, or the file's SHA-256.
    """

    text: str
    key: str
    bpe_size: int | None = None
    data: bytes = b""
    end: str | None = None


class Encoded(NamedTuple):
    """Token ids of one text (uint32), and the UTF-8 bytes of it that each stands for (uint16)."""

    ids: npt.NDArray[np.uint32]
    byte_counts: npt.NDArray[np.uint16]


def parse_spec(spec: str) -> TokenizerSpec:
    """Read ``bpe:SIZE``, the path of a ``tokenizer.json`` or of a folder with one, or the name of a base with one:
    ``smollm2``, a GGUF file, an id on the hub.

    Raises:
        ConfigError: a size out of range, or something else altogether (exit 2).
        NotFoundError: the path does not exist, or the base was not fetched (exit 4).
    """
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not (size.isascii() and size.isdigit() and _MIN_SIZE <= int(size) <= _MAX_SIZE):
            raise ConfigError(
                f"tokenizer '{spec}': the size must be a number from {_MIN_SIZE} (256 bytes and end-of-text) "
                f"to {_MAX_SIZE}",
                "For example --tokenizer bpe:8192",
            )
        return TokenizerSpec(spec, f"bpe:{int(size)}", bpe_size=int(size))
    path = _place(spec)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "Give bpe:SIZE to train one, or a tokenizer.json or a folder with one."
        if path.is_dir():
            hint = "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one."
        raise NotFoundError(f"there is no tokenizer at {file}", hint) from error
    except OSError as error:
        raise MoectlError(f"cannot read {file}: {error.strerror or error}", "Check its permissions.") from error
    tokenizer = read_tokenizer(data, str(file))
    return TokenizerSpec(spec, hashlib.sha256(data).hexdigest(), data=data, end=_configured_end(file.parent, tokenizer))


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, set up as by :func:`read_tokenizer`."""
    return read_tokenizer(file.read_bytes(), str(file))


def read_tokenizer(data: bytes, name: str) -> Tokenizer:
    """A tokenizer set up for whole texts: no truncation, no padding, and a special token that
    stands written in a text is text.

    Raises:
        MoectlError: not a tokenizer; ``name`` says which (exit 1).
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoectlError(f"{name} is not a tokenizer ({reason})", "A tokenizer.json is needed.") from error
    return _for_texts(tokenizer)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most ``size`` tokens, end-of-text first (id 0) (Radford et al. 2019).

    Deterministic: equal texts give an equal tokenizer. Fewer tokens come out when the texts hold
    too few different pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=_MAX_TOKEN_CHARS,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _for_texts(tokenizer)


def end_id(tokenizer: Tokenizer, configured: str | None = None) -> int:
    """The id of the end-of-text token: the configured one, else the first of the usual names."""
    for name in (configured,) if configured else _KNOWN_ENDS:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ConfigError(
        f"the tokenizer has no end-of-text token ({configured or ', '.join(_KNOWN_ENDS)})",
        "Put a tokenizer_config.json with the right 'eos_token' beside tokenizer.json.",
    )


def vocab_size(tokenizer: Tokenizer) -> int:
    """The highest token id plus one: what an embedding needs, also when ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Encoded]:
    """Encode texts in order; the byte counts of a text add up to its UTF-8 length.

    A byte-level token stands for as many bytes as it has letters of the byte alphabet. Any other
    tokenizer is asked for character offsets: a token stands for what lies between the end of the
    one before and its own end, the last for all the rest.
    """
    table = _byte_table(tokenizer)
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        if table is None:
            yield from (_by_offsets(tokenizer, text) for text in batch)
            continue
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            ids = np.asarray(encoding.ids, dtype=np.uint32)
            counts = table[ids]
            # A normaliser or an added leading space makes the two lengths differ.
            whole = int(counts.sum()) == len(text.encode())
            yield Encoded(ids, counts.astype(np.uint16)) if whole else _by_offsets(tokenizer, text)


def _by_offsets(tokenizer: Tokenizer, text: str) -> Encoded:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, dtype=np.uint32)
    if not len(ids):
        return Encoded(ids, np.empty(0, dtype=np.uint16))
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(bytes_before[[end for _, end in encoding.offsets]])
    ends[-1] = bytes_before[-1]
    counts = np.diff(ends, prepend=0)
    if counts.max() > np.iinfo(np.uint16).max:
        raise MoectlError(
            f"one token stands for {counts.max()} bytes of a text, over {np.iinfo(np.uint16).max}",
            "This tokenizer cannot read the text; use bpe:SIZE.",
        )
    return Encoded(ids, counts.astype(np.uint16))


def _byte_table(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Bytes per token id of a byte-level tokenizer; None for any other."""
    layout: dict[str, Any] = json.loads(tokenizer.to_str())
    decoder = layout.get("decoder") or {}
    if "ByteLevel" not in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}:
        return None
    table = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        table[index] = len(token)
    for added in layout["added_tokens"]:
        table[added["id"]] = len(added["content"].encode())
    return table


def _for_texts(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _place(spec: str) -> Path:
    """The path that a spec means; that of a base's folder where it names one."""
    path = Path(spec).expanduser()
    is_gguf = path.suffix == ".gguf"
    if path.exists() and not is_gguf:
        return path
    from moectl.hf.bases import base_folder, known_bases  # which load torch: for names alone

    is_id = spec.count("/") == 1 and path.suffix != ".json" and not spec.startswith((".", "~", "/"))
    return base_folder(spec, weights=False) if spec in known_bases() or is_gguf or is_id else path


def _configured_end(folder: Path, tokenizer: Tokenizer) -> str | None:
    """The end-of-text token that is said beside a ``tokenizer.json``: by its own settings, by the manifest of a
    dataset that was prepared with it, or by the config of its model."""
    end = _read_json(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if isinstance(end, str):
        return end
    config = _read_json(folder / "config.json")
    for settings, key in (
        (_read_json(folder / MANIFEST_FILE), "eos_id"),
        (config, "eos_token_id"),
        (config.get("config"), "eos_token_id"),  # of a folder that upcycling wrote
        (config.get("decoder"), "eos_token_id"),
    ):
        number = settings.get(key) if isinstance(settings, dict) else None
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and (token := tokenizer.id_to_token(number)) is not None:
            return str(token)
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

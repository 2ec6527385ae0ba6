"""From raw text to an immutable, content-addressed dataset folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import moectl
from moectl import paths
from moectl.config.schema import DataConfig
from moectl.corpus.manifest import (
    FORMAT,
    SPLITS,
    TOKENIZER_FILE,
    Manifest,
    TokenizerEntry,
    verify,
)
from moectl.corpus.packing import Packed, balanced, pack
from moectl.corpus.sources import check_sources, read_domain
from moectl.corpus.splitting import Split, SplitDomain, split
from moectl.corpus.store import publish, touch
from moectl.corpus.texts import DomainTexts, texts_hash
from moectl.corpus.tokenization import (
    TokenizerSpec,
    encode,
    end_id,
    parse_spec,
    read_tokenizer,
    train_bpe,
    vocab_size,
)
from moectl.corpus.writing import PackedDomain, domain_entry, write_files
from moectl.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMBALANCE = 1.5
MAX_DOMAINS = 255
_ID_LENGTH = 12
Progress = Callable[[str], None]


class PrepareResult(NamedTuple):
    """The dataset, and whether this call made it (False: it was there, and was verified)."""

    folder: Path
    manifest: Manifest
    created: bool


def prepare(config: DataConfig, *, progress: Progress | None = None) -> PrepareResult:
    """Read, split, tokenize, pack, balance and write the dataset that ``config`` asks for.

    The folder is named by the content of the texts and by every setting that shapes the result;
    if it exists it is verified and returned. Either way it is the newest from now on. ``progress``
    is called with a line per stage.

    Raises:
        ConfigError: unknown domain, bad tokenizer, a block size that the data cannot fill (exit 2).
        CheckError: the dataset exists and was edited (exit 3).
        NotFoundError: a source or tokenizer is not there (exit 4).
        MoectlError: text that cannot be used, or a place that cannot be written (exit 1).
    """
    say = progress or (lambda _: None)
    check_sources(config)
    if len(config.domains) > MAX_DOMAINS:
        raise ConfigError(f"{len(config.domains)} domains; at most {MAX_DOMAINS} fit", "Merge some.")
    spec = parse_spec(config.tokenizer)
    sources = []
    for name in config.domains:
        say(f"reading {name}")
        sources.append(read_domain(config, name))
    dataset_id = _identity(config, spec, sources)
    folder = paths.data_dir() / dataset_id
    if folder.exists():
        say(f"verifying {dataset_id}")
        verify(folder)
        touch(folder)
        return PrepareResult(folder, Manifest.load(folder), created=False)

    with publish(folder) as temporary:  # first of all: a place that cannot be written is known at once
        _build(temporary, dataset_id, config, (spec, sources), say)
    verify(folder)  # also when another process was quicker
    touch(folder)
    return PrepareResult(folder, Manifest.load(folder), created=True)


def _build(
    folder: Path,
    dataset_id: str,
    config: DataConfig,
    inputs: tuple[TokenizerSpec, Sequence[DomainTexts]],
    say: Progress,
) -> None:
    """Everything between the texts and the files, manifest last."""
    spec, sources = inputs
    splits = split(sources, config.seed)
    tokenizer, data, eos = _tokenizer(spec, splits, say)
    size = vocab_size(tokenizer)
    how = _Packing(tokenizer, eos, "uint16" if size <= 1 << 16 else "uint32", config.block_size)
    domains: list[PackedDomain] = []
    for source, parts in zip(sources, splits, strict=True):
        say(f"packing {source.name}")
        first_id = sum(len(domain.encoded) for domain in domains)
        domains.append(_pack_domain(source, parts, first_id, how))
    _check_blocks(domains, config)
    whole = [domain.packed["train"] for domain in domains]
    kept = balanced(whole, config.domains, config.seed) if config.balance_tokens else whole
    say("writing")
    files = write_files(folder, domains, kept, data)
    Manifest(
        format=FORMAT,
        id=dataset_id,
        created=datetime.now(UTC).isoformat(),
        moectl_version=moectl.__version__,
        config=config.model_dump(mode="json"),
        vocab_size=size,
        eos_id=eos,
        block_size=config.block_size,
        dtype=how.dtype,
        tokenizer=TokenizerEntry(spec=spec.text, sha256=files[TOKENIZER_FILE].sha256),
        domains=tuple(domain_entry(domain, train) for domain, train in zip(domains, kept, strict=True)),
        files=files,
        warnings=tuple(_warnings(domains, config, spec, size)),
    ).save(folder)


def _identity(config: DataConfig, spec: TokenizerSpec, sources: Sequence[DomainTexts]) -> str:
    """12 hex digits over the texts and all settings that shape the result, not over where the texts lie."""
    content = {
        "format": FORMAT,
        "domains": [[source.name, texts_hash(source.texts)] for source in sources],
        "tokenizer": [spec.key, spec.end],
        "block_size": config.block_size,
        "balance_tokens": config.balance_tokens,
        "seed": config.seed,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_ID_LENGTH]


def _tokenizer(spec: TokenizerSpec, splits: Sequence[SplitDomain], say: Progress) -> tuple[Tokenizer, bytes, int]:
    """The tokenizer, the bytes of its file, and the id of its end-of-text token."""
    if spec.bpe_size is not None:
        say(f"training a tokenizer of {spec.bpe_size} on the training split")
        train = (item.text.text for part in splits for item in part.placed if item.split == "train")
        tokenizer = train_bpe(train, spec.bpe_size)
        return tokenizer, tokenizer.to_str(pretty=True).encode(), end_id(tokenizer)
    tokenizer = read_tokenizer(spec.data, spec.text)
    return tokenizer, spec.data, end_id(tokenizer, spec.end)


class _Packing(NamedTuple):
    tokenizer: Tokenizer
    eos_id: int
    dtype: Literal["uint16", "uint32"]
    block_size: int


def _pack_domain(texts: DomainTexts, parts: SplitDomain, first_id: int, how: _Packing) -> PackedDomain:
    """Encode all texts of a domain and pack each side."""
    encoded = list(encode(how.tokenizer, [item.text.text for item in parts.placed]))
    packed: dict[Split, Packed] = {}
    for name in SPLITS:
        documents = [
            (first_id + row, tokens)
            for row, (item, tokens) in enumerate(zip(parts.placed, encoded, strict=True))
            if item.split == name
        ]
        packed[name] = pack(documents, block_size=how.block_size, eos_id=how.eos_id, dtype=how.dtype)
    return PackedDomain(texts, parts, encoded, first_id, packed)


def _check_blocks(domains: Sequence[PackedDomain], config: DataConfig) -> None:
    """Every domain must fill a block on both sides."""
    for domain in domains:
        for side, packed in (("training", domain.packed["train"]), ("held-out", domain.packed["eval"])):
            if packed.num_blocks == 0:
                fits = min(part.available for item in domains for part in item.packed.values())
                hint = "Give the domain more text."
                if fits >= 8:
                    hint = f"Use --block-size {1 << (fits.bit_length() - 1)} or less, or give the domain more text."
                raise ConfigError(
                    f"domain '{domain.texts.name}': its {packed.available} {side} tokens "
                    f"do not fill one block of {config.block_size}",
                    hint,
                )


def _warnings(domains: Sequence[PackedDomain], config: DataConfig, spec: TokenizerSpec, size: int) -> list[str]:
    found = []
    for domain in domains:
        if domain.texts.empty:
            found.append(f"{domain.texts.name}: {domain.texts.empty} empty texts were left out")
    if spec.bpe_size is not None and size < spec.bpe_size:
        found.append(f"the tokenizer has {size} tokens, not {spec.bpe_size}: the training text gives no more")
    by_size = sorted(domains, key=lambda domain: domain.packed["train"].num_blocks)
    least, most = by_size[0], by_size[-1]
    ratio = most.packed["train"].num_blocks / least.packed["train"].num_blocks
    if ratio > IMBALANCE:
        consequence = (
            f"balancing cut all domains to {least.texts.name}'s"
            if config.balance_tokens
            else "training will see more of it (--balance-tokens evens them out)"
        )
        found.append(
            f"{most.texts.name} has {ratio:.1f} times the training tokens of {least.texts.name}; {consequence}"
        )
    return found

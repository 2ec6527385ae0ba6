"""What several tests need."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moectl.config.schema import DataConfig, MoEConfig
from moectl.corpus.prepare import prepare
from moectl.models.config import DecoderConfig

WORDS = {
    "fish": "salt tide net gull hull mast reef kelp cod oar foam sail".split(),
    "sums": "one two three plus minus times equals sum root half zero ten".split(),
}


def write_corpus(folder: Path) -> Path:
    """Two domains of 24 small files each, with words of their own."""
    rng = random.Random(0)
    for domain, words in WORDS.items():
        (folder / domain).mkdir(parents=True)
        for number in range(24):
            text = " ".join(rng.choice(words) for _ in range(120))
            (folder / domain / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return folder


def prepare_tiny(home: Path, texts: Path, *domains: str, tokenizer: str = "bpe:300") -> tuple[Path, DataConfig]:
    """A prepared dataset of blocks of 16 tokens under ``home``: its folder, and its config."""
    config = DataConfig(domains=domains, source=str(write_corpus(texts)), tokenizer=tokenizer, block_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(home))
        return prepare(config).folder, config


def tiny_shape(vocab_size: int, moe: MoEConfig | None) -> DecoderConfig:
    """Two layers of width 16."""
    shape = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    return shape.with_moe(moe)


def of_the_clock(metric: str) -> bool:
    """Whether a metric is a time or made of one: no two runs agree in it."""
    return "per_second" in metric or metric == "train/mfu" or metric.startswith("time/")

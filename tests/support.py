"""What several tests need."""

from __future__ import annotations

import random
from pathlib import Path

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

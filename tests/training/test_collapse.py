"""What a collapse check says."""

from __future__ import annotations

import torch

from moectl.config.schema import CollapseConfig
from moectl.training.collapse import CollapseDetector


def test_checks_are_counted_in_plain_english() -> None:
    detector = CollapseDetector(CollapseConfig())
    said = [str(detector.check({3: torch.tensor([1000, 0])}, tokens=1000, top_k=1)[0]) for _ in range(2)]
    assert said == [
        "layer 3 warning: expert 0 takes 100.0% of tokens (1 check)",
        "layer 3 warning: expert 0 takes 100.0% of tokens (2 checks in a row)",
    ]

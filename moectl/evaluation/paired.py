"""Two models on the same held-out text: by how much their losses differ, text by text, and how sure that is.

Pure language-model loss, as :mod:`moectl.evaluation.losses` takes it. The interval is over groups of texts, drawn
again within their domain, of the *difference*: what makes a text hard for both models cancels. It says nothing of
what another seed would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moectl.corpus.loader import IGNORED, PackedDataset, targets
from moectl.errors import MoectlError
from moectl.evaluation.losses import EvalReport, _GroupSums, token_losses
from moectl.marks import marks_of
from moectl.models.modes import eval_mode
from moectl.resampling import Interval, centred_interval, group_weights, smallest_stratum

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Difference:
    """Mean loss per token of ``other`` less that of ``baseline``, nats; negative: ``other`` is lower.

    ``interval`` is 95 %, None where a domain has a single group.
    """

    mean: float
    interval: Interval | None

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and (self.interval.low > 0.0 or self.interval.high < 0.0)


@dataclass(frozen=True)
class Measured:
    """One model's losses on the whole held-out split, and the sums by group of texts that they come from."""

    report: EvalReport
    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]
    domains: NDArray[np.int64]


def measure(model: Any, dataset: PackedDataset, *, batch_size: int = 16, progress: Progress | None = None) -> Measured:
    """The losses that ``moectl eval`` gives, with what :func:`difference` needs beside them.

    Raises:
        MoectlError: the held-out split is empty.
    """
    split = dataset.eval
    if split.num_blocks == 0:
        raise MoectlError("the held-out split is empty", "Prepare the data again with more text.")
    device = next(model.parameters()).device
    sums = _GroupSums(dataset)
    with eval_mode(model):
        for start in range(0, split.num_blocks, batch_size):
            batch = split.batch(range(start, min(start + batch_size, split.num_blocks)))
            labels = targets(batch)
            logits = model(batch.input_ids.to(device), doc_ids=batch.doc_ids.to(device))
            losses = token_losses(logits[:, :-1], labels.to(device)).cpu()
            sums.add(losses, labels != IGNORED, batch.byte_counts[:, 1:], batch.doc_ids[:, 1:])
            if progress is not None:
                progress(min(start + batch_size, split.num_blocks), split.num_blocks)
    report = replace(sums.report(tuple(dataset.domains), 1000, split.num_blocks, True), marks=marks_of(model))
    return Measured(report, sums.nll, sums.tokens, sums.domains)


def difference(baseline: Measured, other: Measured, *, draws: int = 1000) -> Difference:
    """Of two models measured on the same dataset.

    Raises:
        ValueError: they were not: other tokens were scored.
    """
    if not np.array_equal(baseline.tokens, other.tokens):
        raise ValueError("the two were not measured on the same tokens")
    seen = baseline.tokens > 0
    apart, tokens, strata = (other.nll - baseline.nll)[seen], baseline.tokens[seen], baseline.domains[seen]
    mean, groups = float(apart.sum() / tokens.sum()), smallest_stratum(strata)
    if groups < 2:
        return Difference(mean, None)
    weights = group_weights(strata, draws, seed=0)
    return Difference(mean, centred_interval(mean, (weights @ apart) / (weights @ tokens), groups))

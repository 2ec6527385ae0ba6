"""The language-model loss on the held-out split: nats per token, perplexity, bits per byte, by domain.

Pure LM loss, never with auxiliary losses. Every domain and the whole are weighted by token, over
all scored tokens: those with an earlier token of their own document before them. End-of-text is
scored like any token; it stands for 0 bytes, so the bits of ending a text count in bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moectl.corpus.loader import IGNORED, PackedDataset, targets
from moectl.errors import MoectlError
from moectl.marks import marks_of
from moectl.models.modes import eval_mode
from moectl.resampling import Interval, centred_interval, group_weights, smallest_stratum

#: Called with (blocks done, blocks in all).
Progress = Callable[[int, int], None]
_CHUNK = 16_000_000  # logits turned into losses at a time: 64 MB in float32


@dataclass(frozen=True)
class LossReport:
    """Loss over some scored tokens.

    Attributes:
        nll: summed negative log-likelihood, nats.
        tokens: scored tokens.
        bytes: UTF-8 bytes of text behind them.
        groups: groups they come from.
        interval: 95 % of the loss, bootstrap by group; None where a domain has a single group.
    """

    nll: float
    tokens: int
    bytes: int
    groups: int
    interval: Interval | None

    @property
    def lm_loss(self) -> float:
        """Nats per token; NaN for no tokens."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss; infinite when that overflows."""
        return math.exp(self.lm_loss) if not self.lm_loss > 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of the scored tokens per byte of their text: comparable over tokenizers. NaN for no bytes."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "lm_loss": self.lm_loss,
            "lm_loss_interval": None if self.interval is None else list(self.interval),
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "groups": self.groups,
        }


@dataclass(frozen=True)
class EvalReport:
    """The whole split and each domain.

    ``complete`` is false when only some blocks were read; ``marks`` are the model's own, which every
    number here must be read with.
    """

    overall: LossReport
    domains: dict[str, LossReport]
    blocks: int
    complete: bool
    marks: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """By the names that runs are logged under."""
        values = {
            "eval/lm_loss": self.overall.lm_loss,
            "eval/perplexity": self.overall.perplexity,
            "eval/bits_per_byte": self.overall.bits_per_byte,
        }
        for name, report in self.domains.items():
            values[f"eval/{name}/lm_loss"] = report.lm_loss
            values[f"eval/{name}/perplexity"] = report.perplexity
            values[f"eval/{name}/bits_per_byte"] = report.bits_per_byte
        return values

    def to_dict(self) -> dict[str, Any]:
        """Stable keys for JSON."""
        return {
            "split": "eval",
            "blocks": self.blocks,
            "complete": self.complete,
            "marks": list(self.marks),
            **self.overall.to_dict(),
            "domains": {name: report.to_dict() for name, report in self.domains.items()},
        }


def evaluate(
    model: Any,
    dataset: PackedDataset,
    *,
    batch_size: int = 16,
    max_blocks: int | None = None,
    bootstrap: int = 1000,
    progress: Progress | None = None,
) -> EvalReport:
    """Loss of ``model`` on the held-out split.

    The model is put into eval mode (no noise, dropless unless its capacity says otherwise) and left
    as it was found.

    Args:
        model: takes ``(input_ids, doc_ids=...)`` and returns logits ``[B, S, V]``.
        dataset: its ``eval`` split is read, whole unless ``max_blocks`` is set.
        batch_size: blocks per forward pass; it does not change the result, unless tokens compete for
            experts (``expert-choice``, a capacity that applies in evaluation).
        max_blocks: read this many blocks only, spread evenly over the split.
        bootstrap: resamples of the groups for the intervals; 0 for none.
        progress: told after every batch.

    Raises:
        MoectlError: the held-out split is empty.
    """
    split = dataset.eval
    if split.num_blocks == 0:
        raise MoectlError("the held-out split is empty", "Prepare the data again with more text.")
    chosen = np.arange(split.num_blocks)
    if max_blocks is not None and max_blocks < split.num_blocks:
        chosen = np.unique(np.linspace(0, split.num_blocks - 1, max_blocks).round().astype(np.int64))
    device = next(model.parameters()).device
    sums = _GroupSums(dataset)
    with eval_mode(model):
        for start in range(0, len(chosen), batch_size):
            batch = split.batch(chosen[start : start + batch_size])
            logits = model(batch.input_ids.to(device), doc_ids=batch.doc_ids.to(device))
            labels = targets(batch)
            losses = token_losses(logits[:, :-1], labels.to(device)).cpu()
            sums.add(losses, labels != IGNORED, batch.byte_counts[:, 1:], batch.doc_ids[:, 1:])
            if progress is not None:
                progress(min(start + batch_size, len(chosen)), len(chosen))
    report = sums.report(tuple(dataset.domains), bootstrap, len(chosen), len(chosen) == split.num_blocks)
    return replace(report, marks=marks_of(model))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, nats: ``[B, S, V]`` and ``[B, S]`` to ``[B, S]``.

    Computed in float32 at the least; 0 where the label is -100. In pieces, so that no second
    array of the size of the logits is made.
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    step = max(1, _CHUNK // logits.shape[-1])
    pieces = [
        F.cross_entropy(
            piece if piece.dtype == torch.float64 else piece.float(), label, ignore_index=IGNORED, reduction="none"
        )
        for piece, label in zip(flat.split(step), wanted.split(step), strict=True)
    ]
    return torch.cat(pieces).reshape(labels.shape)


class _GroupSums:
    """Sums of loss, tokens and bytes for each group of the dataset, in float64."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.groups_of_documents = np.asarray(dataset.group_ids, dtype=np.int64)
        size = int(self.groups_of_documents.max()) + 1
        self.nll, self.tokens, self.bytes = np.zeros(size), np.zeros(size), np.zeros(size)
        self.domains = np.zeros(size, dtype=np.int64)
        number = {name: index for index, name in enumerate(dataset.domains)}
        for document, group in zip(dataset.documents, self.groups_of_documents, strict=True):
            self.domains[group] = number[document.domain]

    def add(self, losses: Tensor, scored: Tensor, byte_counts: Tensor, doc_ids: Tensor) -> None:
        groups = self.groups_of_documents[doc_ids[scored].numpy()]
        for sums, values in ((self.nll, losses[scored].double()), (self.bytes, byte_counts[scored].double())):
            sums += np.bincount(groups, weights=values.numpy(), minlength=len(sums))
        self.tokens += np.bincount(groups, minlength=len(self.tokens))

    def report(self, names: tuple[str, ...], bootstrap: int, blocks: int, complete: bool) -> EvalReport:
        seen = self.tokens > 0
        domains = {name: self._loss(seen & (self.domains == index), bootstrap) for index, name in enumerate(names)}
        return EvalReport(self._loss(seen, bootstrap), domains, blocks, complete)

    def _loss(self, chosen: NDArray[np.bool_], bootstrap: int) -> LossReport:
        nll, tokens, strata = self.nll[chosen], self.tokens[chosen], self.domains[chosen]
        interval = None
        groups = smallest_stratum(strata)
        if bootstrap and groups > 1:
            weights = group_weights(strata, bootstrap, seed=0)
            interval = centred_interval(float(nll.sum() / tokens.sum()), (weights @ nll) / (weights @ tokens), groups)
            interval = interval._replace(low=max(interval.low, 0.0))  # no loss is below 0
        return LossReport(
            float(nll.sum()), int(tokens.sum()), int(self.bytes[chosen].sum()), int(chosen.sum()), interval
        )

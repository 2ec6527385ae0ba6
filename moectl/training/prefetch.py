"""Micro-batches read ahead by a thread, pinned for CUDA; the order of the data is the sampler's alone.

Reading ahead changes no number: the thread draws from a copy of the sampler, and the run's own sampler, whose
position a checkpoint holds, moves only when a micro-batch is handed out. Where that position was set meanwhile
(a restored or rolled back run), what was read ahead is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moectl.corpus.loader import Batch, BlockSampler, PackedSplit, targets


class MicroBatch(NamedTuple):
    """A micro-batch on the run's device, its labels, and how many of them are scored (a plain number: no sync)."""

    batch: Batch
    labels: Tensor
    scored: int


class Loader:
    """Hands out the micro-batches that ``sampler`` orders.

    Args:
        split: where blocks are read from.
        sampler: the run's own.
        device: where micro-batches go to.
        ahead: how many are read ahead; 0: each is read when it is asked for.
    """

    def __init__(self, split: PackedSplit, sampler: BlockSampler, device: torch.device, *, ahead: int) -> None:
        self.split, self.sampler, self.device, self.ahead = split, sampler, device, ahead
        self._reader: _Reader | None = None

    def next(self) -> MicroBatch:
        """The next one; whatever stopped the thread from reading it is raised here."""
        if self.ahead == 0:
            read = self._read(self.sampler)
        else:
            if self._reader is None or self._reader.position != self.sampler.position:
                self.close()
                self._reader = _Reader(self, self.sampler)
            try:
                read = self._reader.take()
            except BaseException:
                self.close()
                raise
            self.sampler.next()
        return MicroBatch(self._moved(read.batch), read.labels.to(self.device, non_blocking=True), read.scored)

    def at(self, blocks: Sequence[int]) -> Batch:
        """These blocks, beside the order; on the device."""
        return self._moved(self.split.batch(blocks))

    def close(self) -> None:
        """End the thread; what it has read is forgotten. The next :meth:`next` starts another."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _moved(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _read(self, sampler: BlockSampler) -> MicroBatch:
        batch = self.split.batch(sampler.next())
        labels = targets(batch)
        scored = int((labels >= 0).sum())
        if self.device.type == "cuda":
            batch, labels = Batch(*(tensor.pin_memory() for tensor in batch)), labels.pin_memory()
        return MicroBatch(batch, labels, scored)


class _Reader:
    """One thread, reading on from where a sampler stands.

    Attributes:
        position: of the sampler, before what :meth:`take` gives next.
    """

    def __init__(self, loader: Loader, sampler: BlockSampler) -> None:
        self.position = sampler.position
        self._loader = loader
        self._sampler = BlockSampler(sampler.num_blocks, batch_size=sampler.batch_size, seed=sampler.seed)
        self._sampler.position = sampler.position
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moectl-loader")
        self._read = deque(self._one_more() for _ in range(loader.ahead))

    def take(self) -> MicroBatch:
        """The next one; another is read meanwhile."""
        self._read.append(self._one_more())
        found = self._read.popleft().result()
        self.position += self._sampler.batch_size
        return found

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _one_more(self) -> Future[MicroBatch]:
        return self._thread.submit(self._loader._read, self._sampler)  # one thread: in the order of asking

"""Running out of memory: known for what it is, explained, and undone so that a step can be tried again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from moectl.config.schema import TrainConfig
from moectl.corpus.loader import Batch
from moectl.errors import MoectlError
from moectl.moe.layer import MoELayer
from moectl.training.protocol import RunLogger
from moectl.training.rng import restore_rng, rng_state

Done = TypeVar("Done")
Work = list[tuple[Batch, Tensor]]
"""The micro-batches of a step, each with its labels."""

# How torch's CPU allocator, the C++ library and oneDNN say it. torch's CUDA allocator has an exception of its own;
# a failing call of the driver (a kernel's own scratch, the context) and CUDA's libraries have a text only.
_SIGNS = (
    "can't allocate memory", "not enough memory", "bad alloc", "bad_alloc", "could not create a memory object",
    "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


class OutOfMemory(MoectlError):
    """The device's memory, or what this process may have of it, is used up."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is any of the ways in which memory runs out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    if isinstance(error, MoectlError):  # a router's own error: what was it made of?
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(doing: str, hint: str) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory that says while ``doing`` what, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory while {doing}", hint) from error


class Halving:
    """Micro-batches cut in two, again and again, where memory runs out (``train.halve_on_oom``).

    A halved step is the step of a run with half the batch size and twice the accumulation, from the same state,
    to the last bit. Against the step that did not fit, sums are in another order and noise is drawn in other
    shapes; and what is per micro-batch (``balance_scope: micro``, capacity) is over fewer tokens.

    Args:
        train: batch size, and whether to halve.
        model: its buffers are put back before a second attempt.
        layers: MoE layers by layer number, which hold the graph of the last call.
        logger: is told of each halving.

    Attributes:
        pieces: that each of the config's micro-batches is cut into; part of a checkpoint.
        unsaved: halved since the last checkpoint. One is due soon, so that a resumed run need not meet it again.
    """

    def __init__(self, train: TrainConfig, model: nn.Module, layers: Mapping[int, MoELayer], logger: RunLogger) -> None:
        self.train, self.model, self.layers, self.logger = train, model, layers, logger
        self.pieces = 1
        self.unsaved = False

    @property
    def blocks(self) -> int:
        """Blocks of a micro-batch now."""
        return self.train.batch_size // self.pieces

    def cut(self, work: Work) -> Work:
        """Each micro-batch and its labels in ``pieces`` equal parts, in order: the same blocks, fewer at a time."""
        if self.pieces == 1:
            return work
        parts: Work = []
        for batch, labels in work:
            columns = [tensor.chunk(self.pieces) for tensor in (*batch, labels)]
            parts += [(Batch(*row[:-1]), row[-1]) for row in zip(*columns, strict=True)]
        return parts

    def fit(self, attempt: Callable[[], Done], step: int) -> Done:
        """What ``attempt`` returns; where memory runs out and halving is allowed, of an attempt with half as much.

        Raises:
            OutOfMemory: it is not allowed, or a micro-batch is an odd number of blocks.
        """
        while True:
            undo = Undo(self.model, self.layers) if self.train.halve_on_oom else None
            said = f"out of memory at step {step}, with micro-batches of {self.blocks} block(s)"
            try:
                return attempt()
            except (MemoryError, RuntimeError, MoectlError) as error:
                if not is_out_of_memory(error):
                    raise
                if undo is None or self.blocks % 2:
                    raise OutOfMemory(said, self._what_to_change()) from error
            undo()  # only here is the failed attempt's graph free: the exception held it
            self.pieces *= 2
            self.unsaved = True
            said = f"{said}: from here on they are halved, to {self.blocks}, and twice as many"
            # `at`, not `step`: it has happened, and stays in the record of a run that takes the step back.
            self.logger.event("out_of_memory", said, at=step, micro_batch=self.blocks)

    def _what_to_change(self) -> str:
        if self.blocks % 2:
            return (
                f"Micro-batches of {self.blocks} cannot be halved. Use a smaller model, fewer experts, shorter blocks"
                " (data.block_size), train.activation_checkpointing=true or"
                " train.precision=bfloat16."
            )
        accumulated = self.train.grad_accum * self.pieces * 2
        return (
            f"Set train.batch_size={self.blocks // 2} and train.grad_accum={accumulated}, which keeps the tokens per"
            " step, or train.halve_on_oom=true, which does so when it must; or train.activation_checkpointing=true,"
            " which keeps the micro-batch and takes up to a third more time."
        )


class Undo:
    """What gradients are computed from beside weights and data: generators and buffers, as they are now."""

    def __init__(self, model: nn.Module, layers: Mapping[int, MoELayer]) -> None:
        self.model, self.layers = model, layers
        self.drawn = rng_state()
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def __call__(self) -> None:
        """Put them back, and drop gradients and graphs."""
        for parameter in self.model.parameters():
            parameter.grad = None
        for layer in self.layers.values():
            layer.routing = layer.token_mask = layer.dropped = None
        for buffer, before in self.buffers:
            buffer.copy_(before)
        restore_rng(self.drawn)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

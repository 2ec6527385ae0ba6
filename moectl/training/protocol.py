"""What the training loop asks of whoever keeps its records. It knows nothing of files or databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from moectl.corpus.loader import Batch
from moectl.models.language_model import LanguageModel

Status = Literal["finished", "interrupted", "collapsed", "failed"]
#: Scores the model on held-out text: metric name to value. Pure language-model losses only. Called with the
#: model and whether this is the final evaluation; scores in eval mode and leaves the model as it found it.
Evaluate = Callable[[LanguageModel, bool], Mapping[str, float]]


class ObjectiveSums(NamedTuple):
    """What one micro-batch is trained on, summed over its scored tokens.

    Attributes:
        total: what is differentiated (routing's own losses are added elsewhere).
        lm: the pure language-model loss, in nats.
        parts: further terms by name, unweighted, for the record: ``train/NAME_loss``.
    """

    total: Tensor
    lm: Tensor
    parts: Mapping[str, Tensor] = {}


class Objective(Protocol):
    """What a model is trained to do with a micro-batch; by default :func:`language_modelling`."""

    def __call__(self, model: LanguageModel, batch: Batch, labels: Tensor) -> ObjectiveSums: ...


def language_modelling(model: LanguageModel, batch: Batch, labels: Tensor) -> ObjectiveSums:
    """Next tokens: ``labels [B, S]`` (-100: not scored) for ``batch.input_ids [B, S + 1]``."""
    lm = model.lm_loss_sum(batch.input_ids[:, :-1], labels, batch.doc_ids[:, :-1])
    return ObjectiveSums(lm, lm)


class RunLogger(Protocol):
    """Takes metrics, events and routing counts, durably and in order.

    ``position`` says how far the record goes and that it is on the disk; ``rewind`` forgets what came after a
    position, and routing counts after its step. So a checkpoint knows its place in the record, and what is
    done again after it is recorded once.
    """

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None: ...

    def event(self, kind: str, message: str, **details: Any) -> None: ...

    def routing(self, step: int, payload: Mapping[str, Any]) -> None: ...

    def position(self) -> Mapping[str, int]: ...

    def rewind(self, step: int, position: Mapping[str, int]) -> None: ...


class Progress(Protocol):
    """Shows where the run is; called after every optimizer step."""

    def __call__(self, step: int, values: Mapping[str, float]) -> None: ...


class Ending(NamedTuple):
    """Why a run is over, in one sentence for people."""

    status: Status
    reason: str


class Best(NamedTuple):
    """The lowest held-out LM loss so far: of which metric (a part of the split is another one), at which step."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class Speed:
    """How fast one process trained.

    Attributes:
        precision: that was computed in; not what was asked for where the device has it not.
        seconds: by part: data, forward, backward, optimizer, checkpoint, evaluation.
        flops_per_token: of forward and backward, with the parameters that a token uses; None where nobody said.
        mfu: share of the device's peak over all training steps; None where that is not known.
        peak: FLOP/s that ``mfu`` is a share of. about: where that comes from.
        graphs: compiled; None without ``train.compile``, 0 where that failed at once. late_graphs: after the second
            step.
    """

    precision: str
    seconds: dict[str, float]
    flops_per_token: float | None = None
    mfu: float | None = None
    peak: float | None = None
    about: str | None = None
    graphs: int | None = None
    late_graphs: int | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        status: ``finished``, ``interrupted`` (a checkpoint was written), ``collapsed`` (early stop) or ``failed``.
        reason: one sentence for people.
        step: optimizer steps done.
        tokens: training tokens seen.
        metrics: the last value of every metric.
        train_seconds: time in optimizer steps only, this process (no evaluation, no checkpoints).
        train_tokens: tokens trained on in that time.
        best: the lowest held-out LM loss, whose checkpoint is kept.
        speed: what this process computed with and how fast, for the record.
    """

    status: Status
    reason: str
    step: int
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    train_tokens: int = 0
    best: Best | None = None
    speed: Speed | None = None

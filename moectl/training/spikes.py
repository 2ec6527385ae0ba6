"""The loss-spike rule: what a step's LM loss may be, given the steps before it.

Skipping a batch whose loss jumps, and going back to a checkpoint to train on with other data, are what PaLM's
authors did by hand (arXiv:2204.02311, section 5.1). The rule sees numbers that the run logs anyway, and its
state is part of a checkpoint, so that a resumed run finds the same spikes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moectl.config.guards import SpikeConfig

FLAT = 1e-6
"""Share of the mean that a spike is above it at the least."""


@dataclass(frozen=True)
class Spike:
    """A step whose loss jumped.

    Attributes:
        step: the optimizer step.
        loss: its LM loss, before any weight moved.
        mean: of the losses in the window.
        bound: what it had to stay under, ``mean + std · deviation``.
        action: ``report``, ``skip`` or ``rollback``; ``fail`` where the limit is used up.
    """

    step: int
    loss: float
    mean: float
    bound: float
    action: str

    def __str__(self) -> str:
        answers = {
            "report": "reported only",
            "skip": "the step moves no weight",
            "rollback": "going back to the newest checkpoint, with the data that comes next",
            "fail": "train.spike.limit is used up",
        }
        return (
            f"the LM loss of step {self.step} jumped to {self.loss:.4f}, above {self.bound:.4f}"
            f" (mean {self.mean:.4f}): {answers[self.action]}"
        )

    def details(self) -> dict[str, Any]:
        """The fields, for an event's record; the step as ``spiked``, for the event may be of another one."""
        fields = asdict(self)
        return {"spiked": fields.pop("step"), **fields}


class SpikeRule:
    """Watches the LM loss of every step.

    The window holds the last ``window`` losses of steps that moved the weights: a skipped step's loss is not in
    it, a reported one is, so that a loss that stays high is soon normal. The deviation is the sample's
    (``n - 1``), and at least a millionth of the mean: a loss that is flat to the last bits has no spikes in them.
    A loss that is not finite is no spike but a failure, and is told elsewhere.

    Attributes:
        used: skips or rollbacks since the last whole window without a spike.
        clean: steps without one since then. Steps that a rollback has done again are not new ones: they count from
            ``furthest`` on.
        furthest: the highest step that had a spike; ``used`` and it are what a rollback does not take back.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.used = self.clean = self.furthest = 0

    def look(self, step: int, loss: float) -> Spike | None:
        """Take the loss of step ``step`` in; the spike that it is, or None."""
        if self.config.action == "off":
            return None
        spike = self._judge(step, loss)
        if spike is None or spike.action == "report":
            self.losses.append(loss)
        if spike is None:
            self.clean += step > self.furthest
            if self.clean >= self.config.window:
                self.used = 0
            return None
        self.clean, self.furthest = 0, max(self.furthest, step)
        self.used += spike.action in ("skip", "rollback")
        return spike

    def _judge(self, step: int, loss: float) -> Spike | None:
        if len(self.losses) < self.config.window:
            return None
        mean, deviation = self._mean_and_deviation()
        bound = mean + max(self.config.std * deviation, FLAT * abs(mean))
        if not loss > bound:
            return None
        acts = self.config.action != "report"
        action = "fail" if acts and self.used >= self.config.limit else self.config.action
        return Spike(step, loss, mean, bound, action)

    def _mean_and_deviation(self) -> tuple[float, float]:
        """Of the window, in float64 and two passes: 0.1 ms for ten thousand losses, where exact sums take 3."""
        losses = np.fromiter(self.losses, dtype=np.float64, count=len(self.losses))
        return float(losses.mean()), float(losses.std(ddof=1))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self.losses), "used": self.used, "clean": self.clean, "furthest": self.furthest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's window and counts.

        Raises:
            KeyError, TypeError, ValueError: they are not what ``state_dict`` gives.
        """
        losses = [float(loss) for loss in state["losses"] if not isinstance(loss, str)]
        if len(losses) != len(state["losses"]):
            raise TypeError("a loss of the spike rule's window is no number")
        self.losses = deque(losses, maxlen=self.config.window)
        self.used, self.clean, self.furthest = (int(state[key]) for key in ("used", "clean", "furthest"))

"""The loss-spike rule: what a step's LM loss may be, given the steps before it.

Skipping a batch whose loss jumps, and going back to a checkpoint to train on with other data, are what PaLM's
authors did by hand (arXiv:2204.02311, section 5.1). The rule sees numbers that the run logs anyway, and its
state is part of a checkpoint, so that a resumed run finds the same spikes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moectl.config.guards import SpikeConfig


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
    (``n - 1``). A loss that is not finite is no spike but a failure, and is told elsewhere.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.window)
        self.used = 0
        """Skips or rollbacks since the last whole window without a spike."""
        self.clean = 0

    def look(self, step: int, loss: float) -> Spike | None:
        """Take the loss of step ``step`` in; the spike that it is, or None."""
        if self.config.action == "off":
            return None
        spike = self._judge(step, loss)
        if spike is None or spike.action == "report":
            self.losses.append(loss)
        if spike is None:
            self.clean += 1
            if self.clean >= self.config.window:
                self.used = 0
            return None
        self.clean = 0
        self.used += spike.action in ("skip", "rollback")
        return spike

    def _judge(self, step: int, loss: float) -> Spike | None:
        if len(self.losses) < self.config.window:
            return None
        mean = statistics.fmean(self.losses)
        bound = mean + self.config.std * statistics.stdev(self.losses, mean)
        if not loss > bound:
            return None
        acts = self.config.action != "report"
        action = "fail" if acts and self.used >= self.config.limit else self.config.action
        return Spike(step, loss, mean, bound, action)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self.losses), "used": self.used, "clean": self.clean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's window and counts."""
        self.losses = deque(state["losses"], maxlen=self.config.window)
        self.used, self.clean = state["used"], state["clean"]

"""The gradients of one optimizer step: micro-batch by micro-batch, with the losses that make them.

The language-model loss is a mean over all scored tokens of the step, so that it does not depend on how the step is
cut; the auxiliary losses are added to what is differentiated and never to what is reported as the language-model
loss. Nothing here waits for the device: losses stay tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moectl.corpus.loader import Batch
from moectl.models.language_model import LanguageModel
from moectl.training.compiled import Compiled, is_compile_error
from moectl.training.memory import Halving, Undo, Work
from moectl.training.precision import Precision
from moectl.training.protocol import Objective
from moectl.training.rehearsal import rehearsal
from moectl.training.routing import StepRouting
from moectl.training.timing import Clock

Losses = dict[str, Tensor]
"""By metric name, in float64."""


class GradientPass:
    """Computes the gradients of a step's micro-batches, one after the other.

    Args:
        model: in training mode; its gradients are set.
        objective: what a micro-batch is trained on, beside routing's own losses; compiled or not.
        precision: of the forward pass, and the scale of the loss.
        halving: how many pieces a micro-batch is cut into.
        clock: takes the time.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        *,
        precision: Precision,
        halving: Halving,
        clock: Clock,
    ) -> None:
        self.model: Any = model
        self.layers = model.moe_layers()
        self.precision, self.objective, self.halving, self.clock = precision, objective, halving, clock

    def __call__(
        self, work: Work, scored: int, new_routing: Callable[[], StepRouting | None], step: int
    ) -> tuple[Losses, StepRouting | None]:
        """The step's losses and its routing; its gradients are in the parameters.

        Where compiled code fails, it is given up and the step is done again eagerly, from the same state.

        Args:
            work: micro-batches and their labels.
            scored: labels of the step that are scored.
            new_routing: makes what collects a step's routing; None for a dense model.
            step: its number, for messages.
        """
        compiled = self.objective if isinstance(self.objective, Compiled) and self.objective.active else None
        undo = None if compiled is None else Undo(self.model, self.layers)
        try:
            return self._all(work, scored, new_routing())
        except RuntimeError as error:
            if compiled is None or not is_compile_error(error):
                raise
            compiled.give_up(error, step)
        assert undo is not None
        undo()
        return self._all(work, scored, new_routing())

    def _all(self, work: Work, scored: int, routing: StepRouting | None) -> tuple[Losses, StepRouting | None]:
        self.model.zero_grad(set_to_none=True)
        work = self.halving.cut(work)
        if routing is not None and routing.two_passes:
            self._count([batch for batch, _ in work], routing)
        totals: Losses = {}
        for batch, labels in work:
            with self.clock.part("forward"):
                loss, parts = self._micro_batch(batch, labels, max(scored, 1), routing)
            with self.clock.part("backward"):
                self.precision.backward(loss)
            for name, part in {"train/loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + part.detach().double()
        return totals, routing

    def forward(self, batch: Batch) -> None:
        """Through all layers, as in training."""
        with self.precision.context():
            self.model.hidden_states(batch.input_ids[:, :-1], batch.doc_ids[:, :-1])

    def _micro_batch(
        self, batch: Batch, labels: Tensor, scored: int, routing: StepRouting | None
    ) -> tuple[Tensor, Losses]:
        """This micro-batch's part of the step's loss, and what it is made of, by metric name and unweighted."""
        with self.precision.context():
            sums = self.objective(self.model, batch, labels)
        loss = sums.total / scored
        parts = {"train/lm_loss": sums.lm / scored}
        parts |= {f"train/{name}_loss": value / scored for name, value in sums.parts.items()}
        if routing is None:
            return loss, parts
        auxiliary, losses = routing.losses(batch.domain_ids)
        return loss + auxiliary, parts | {f"train/{name}_loss": value for name, value in losses.items()}

    def _count(self, batches: Sequence[Batch], routing: StepRouting) -> None:
        """The first of two passes over a step's batches; the second draws the same noise and takes the same routes."""
        with self.clock.part("forward"), rehearsal(self.model):
            for batch in batches:
                self.forward(batch)
                routing.count()

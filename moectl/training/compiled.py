"""``torch.compile`` of a step's forward pass and loss, counted, and given up with a word where it fails.

The backward is compiled with it (AOTAutograd). Shapes are those of a micro-batch, always the same, so that after
the second step nothing should be compiled again; each time that it is, the run's record says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moectl.corpus.loader import Batch
from moectl.models.language_model import LanguageModel
from moectl.training.protocol import Objective, ObjectiveSums, RunLogger

SETTLED = 2
"""Steps in which compiling is expected: gradients of the second may lie in other memory than those of the first."""


class Compiled:
    """An objective, compiled.

    Args:
        objective: what is compiled.
        backend: one of torch's.
        logger: is told of every late compilation, and of a failure.

    Attributes:
        active: not given up.
        graphs: compiled so far, forward graphs of one call counted each.
        late: of these, after step :data:`SETTLED` of this process.
    """

    def __init__(self, objective: Objective, backend: str, logger: RunLogger) -> None:
        self.objective, self.backend, self.logger = objective, backend, logger
        self.active = True
        self.graphs = self.late = self.steps = self._before = 0
        self._call = torch.compile(objective, backend=self._count_and_compile, dynamic=False)

    def __call__(self, model: LanguageModel, batch: Batch, labels: Tensor) -> ObjectiveSums:
        """The objective's value, by compiled code as long as that works."""
        sums: ObjectiveSums = (self._call if self.active else self.objective)(model, batch, labels)
        return sums

    def stepped(self, step: int) -> None:
        """After optimizer step ``step``: whether something was compiled that late."""
        self.steps += 1
        new, self._before = self.graphs - self._before, self.graphs
        if new and self.steps > SETTLED:
            self.late += new
            said = f"{new} graph(s) compiled again at step {step}: a shape or a setting of the model has changed"
            self.logger.event("recompiled", said, step=step, graphs=new)

    def give_up(self, error: BaseException, step: int) -> None:
        """Run eagerly from now on."""
        self.active = False
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        said = f"torch.compile failed ({type(error).__name__}: {first}): the run goes on without it"
        self.logger.event("compile_failed", said, step=step, backend=self.backend)

    def _count_and_compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if self.backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            # Noise as eager code draws it: the counting pass of balance_exact is eager, and must take the same routes.
            made: Any = compile_fx(graph, inputs, config_patches={"fallback_random": True})
        else:
            made = torch._dynamo.lookup_backend(self.backend)(graph, inputs)
        return made


def is_compile_error(error: BaseException) -> bool:
    """Whether the compiler, and not what it compiled, raised ``error``."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))

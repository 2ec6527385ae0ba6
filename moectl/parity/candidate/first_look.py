"""The first runs of somebody's module: how it is called, what its router returns, and whether it behaves.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moectl.parity import reference
from moectl.parity.adapter import Adapter
from moectl.parity.candidate.built import Built
from moectl.parity.candidate.calls import plan_of
from moectl.parity.candidate.outputs import RouterReading, read_router
from moectl.parity.candidate.problems import Problem
from moectl.parity.candidate.run import Run
from moectl.parity.candidate.trial import BATCH, LENGTH, find_plan, trial_inputs
from moectl.parity.case import Case, Inputs
from moectl.parity.families import random_weights
from moectl.parity.tape import Tape

if TYPE_CHECKING:
    from moectl.parity.candidate.side import Candidate

#: Two runs of the same, or the block's output made again from expert outputs and weights: sums in another order
#: differ by 1e-16 of their size (float32: 1e-7) times a few; dropout, noise and wrong readings by far more.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-5}
_COARSE = 1e-2  # of answers in half precision, where they are not asked for


def first_look(candidate: Candidate, built: Built, dtype: torch.dtype) -> None:
    """Find out, and tell the candidate.

    Raises:
        CandidateError: it cannot be called, or fails.
        AdapterError: the adapter does.
    """
    level, formula = candidate.level, built.formula
    if type(candidate.adapter).call is Adapter.call:
        candidate.plan = find_plan(built.module, level, formula, dtype)
    else:
        candidate.plan = plan_of(built.module, level, formula.attention, strict=False)
    layer = formula.moe_layers[0] if formula.moe_layers else 0
    weights = random_weights(formula, level, seed=0, dtype=dtype, layer=layer)
    inputs = trial_inputs(level, formula, dtype)
    case = Case("first look", level, candidate.adapter.config, weights, inputs, dtype, gradients=False)
    _read_routers(candidate, built, case)
    first, second = Run(candidate, built, case).tape(), Run(candidate, built, case).tape()
    _deterministic(candidate, first, second)
    _trust(candidate, built, first, case)


def _read_routers(candidate: Candidate, built: Built, case: Case) -> None:
    """Recognise what each router module returns, from a run whose tokens, experts and slots are different numbers."""
    router = built.formula.router
    returned: dict[str, Any] = {}
    handles = []
    for layer in built.wiring.layers:
        for path in layer.routers:
            module = built.module.get_submodule(path)
            if not isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(_keeper(returned, path)))
    try:
        Run(candidate, built, case).tape()
    finally:
        for handle in handles:
            handle.remove()
    for path, output in returned.items():
        reading = read_router(output, tokens=BATCH * LENGTH, num_experts=router.num_experts, top_k=router.top_k)
        if reading != RouterReading():
            candidate.learned.readings[path] = reading


def _keeper(returned: dict[str, Any], path: str) -> Any:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        returned[path] = out

    return keep


def _deterministic(candidate: Candidate, first: Tape, second: Tape) -> None:
    for name, tensor in first.items():
        other = second.get(name)
        if other is None or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            continue
        gap = float((tensor - other).abs().max()) if tensor.numel() else 0.0
        if gap > _SAME.get(tensor.dtype, _COARSE) * max(1.0, float(tensor.abs().max())):
            candidate.tell(
                Problem(
                    "MOE063",
                    "forward gives another answer every time, in eval mode",
                    f"the same input twice: {name} differs by {gap:.2g}",
                    "Look for F.dropout without training=self.training, and for noise that does not ask self.training.",
                )
            )
            return


def _trust(candidate: Candidate, built: Built, tape: Tape, case: Case) -> None:
    """Whether weights that were seen between functions, and asked experts, make up the block's output.

    What does not is not shown: a wrongly read tensor would blame code that is right. Experts that cannot be asked are
    taken from the reference.
    """
    for layer in built.wiring.layers:
        routed, weights_TE = (tape.get(f"{layer.at}mlp.{name}") for name in ("routed", "weights"))
        outputs_TED = tape.get(f"{layer.at}mlp.expert_outputs")
        explicit = any(candidate.learned.readings.get(path, RouterReading()).chooses for path in layer.routers)
        if not layer.has_experts or routed is None or weights_TE is None or (explicit and not layer.stack):
            continue
        expected = _reference_experts(built, layer.at, tape, case) if outputs_TED is None else outputs_TED
        if expected is None:
            continue
        again_TD = torch.einsum("te,ted->td", weights_TE.double(), expected.double())
        gap = float((again_TD - routed.reshape(again_TD.shape)).abs().max())
        if not gap <= _SAME.get(routed.dtype, _COARSE) * max(1.0, float(routed.abs().max())):
            candidate.learned.inline = explicit
            candidate.learned.fused = outputs_TED is None or not layer.stack
            return


def _reference_experts(built: Built, at: str, tape: Tape, case: Case) -> Tensor | None:
    """Each expert's output on this layer's own input, by the family's formula; None where the input is not shown."""
    under = {"model": f"model.{at}mlp.", "layer": "mlp."}.get(case.level, "")
    hidden = case.inputs.hidden if case.level == "moe" else tape.get(f"{at}mlp.input")
    if hidden is None:
        return None
    block = {name.removeprefix(under): tensor for name, tensor in case.weights.items() if name.startswith(under)}
    again = reference.run(built.formula, block, Inputs(hidden=hidden), level="moe", dtype=hidden.dtype)
    return again.get("mlp.expert_outputs")

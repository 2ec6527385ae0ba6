"""What a candidate is held against: the reference's tape of a case, and in bfloat16 the truth behind it.

bfloat16 has 8 significant bits, so both sides are wrong, and the reference is no standard by itself. The
truth is the reference's own formula in float64 on the same bfloat16 weights and inputs, with the experts
that the reference chose in bfloat16 (its weights for them from the truth's own logits). What the
reference is off from that truth is the measure of what a candidate may be off.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, Reroute, Subject, Weights
from moectl.parity.compare import compare_tensor, largest
from moectl.parity.hugging_face import HuggingFace, rerouted_by
from moectl.parity.tape import Tape
from moectl.parity.tolerance import allowed, bfloat16_bound

#: Tapes of tiny models are small; of large ones, the last few are enough.
_KEPT = 24


@dataclass(frozen=True)
class Standard:
    """What the candidate's tensors should be.

    Attributes:
        tape: the reference's tensors; in bfloat16 the truth's, in float64.
        reroute: the reference's choice of experts, to be injected; None where nothing is routed.
        bounds: largest error by name, where it is not the dtype's; in bfloat16 of every name.
        reference: the reference's own tensors in bfloat16; None elsewhere.
    """

    tape: Tape
    reroute: Reroute | None
    bounds: Mapping[str, float] | None = None
    reference: Tape | None = None


class Standards:
    """Hugging Face on any case, each case computed once.

    Args:
        family: whose modules.
    """

    def __init__(self, family: str) -> None:
        self.subject: Subject = HuggingFace(family)
        self.as_it_is: Subject = HuggingFace(family, lift=False)
        self._kept: OrderedDict[tuple[object, ...], tuple[Case, Standard]] = OrderedDict()

    def standard(self, case: Case, *, lifted: bool = True) -> Standard:
        """The standard of ``case``.

        Args:
            lifted: otherwise float64 cases are run as transformers casts them.

        Raises:
            Unsupported: the reference has no such component.
        """
        question = question_of(case)
        key = (lifted, *_key(question))
        if key not in self._kept:
            self._kept[key] = question, self._compute(question, lifted)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]

    def _compute(self, case: Case, lifted: bool) -> Standard:
        tape = (self.subject if lifted else self.as_it_is).run(case)
        reroute = rerouted_by(tape, case) if any(name.endswith("mlp.chosen") for name in tape) else None
        if not lifted:
            # Sums in float32, in an order of their own: no formula gives their last bits.
            sums = [name for name in ("loss", "balance_loss") if name in tape]
            return Standard(tape, reroute, {name: allowed(torch.float32, float(tape[name].abs())) for name in sums})
        if case.dtype != torch.bfloat16:
            return Standard(tape, reroute)
        exact = replace(
            case, dtype=torch.float64, weights=_double(case.weights), inputs=Inputs(*map(_doubled, case.inputs))
        )
        truth = self.subject.run(exact, reroute)
        return Standard(truth, reroute, _bounds(tape, truth, case), tape)


def question_of(case: Case) -> Case:
    """The case as the reference is asked it: in one piece, in plain memory, not compiled.

    So chunks and cached decoding are held against the full forward, and a strided input against its copy.
    """
    inputs = case.inputs._replace(chunks=None)
    plain: dict[str, Any] = {
        name: value.contiguous() for name, value in inputs._asdict().items() if isinstance(value, Tensor)
    }
    return replace(case, inputs=inputs._replace(**plain), compiled=False)


def _bounds(reference: Tape, truth: Tape, case: Case) -> dict[str, float]:
    """By name: what the reference is off from the truth in real tokens, a few times, with a floor.

    Which few roundings hit a small tensor hardest is luck. So errors are taken relative to each tensor's
    largest value, and the worst of its kind counts: the same tensor of all layers; all gradients.
    """
    off: dict[str, float] = {}
    scales = {name: largest(name, truth[name], case) for name in truth}
    for name, scale in scales.items():
        error = compare_tensor(name, truth[name], reference[name], case, bounds={name: math.inf}).max_abs
        if error is not None and scale:
            off[kind_of(name)] = max(off.get(kind_of(name), 0.0), error / scale)
    return {name: bfloat16_bound(off.get(kind_of(name), 0.0) * scale, scale) for name, scale in scales.items()}


def kind_of(name: str) -> str:
    """What tensors share a bound."""
    if name.startswith("grad."):
        return "grad"
    return name.partition(".")[2].partition(".")[2] if name.startswith("layers.") else name


def _key(case: Case) -> tuple[object, ...]:
    """Equal for equal questions. Weights by identity: the kept case keeps them alive."""
    parts: list[object] = [case.level, repr(sorted(case.config.items(), key=str)), case.dtype, case.training]
    parts += [case.gradients, tuple((name, id(tensor)) for name, tensor in case.weights.items())]
    for value in case.inputs:
        parts.append(_bytes(value) if isinstance(value, Tensor) else value)
    return tuple(parts)


def _bytes(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _double(weights: Weights) -> dict[str, Tensor]:
    return {name: _doubled(tensor) for name, tensor in weights.items()}


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

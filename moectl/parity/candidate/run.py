"""One run of somebody's module on one case.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.errors import MissingDependencyError
from moectl.parity.adapter import Adapter
from moectl.parity.candidate.built import Built
from moectl.parity.candidate.expressions import pull_back
from moectl.parity.candidate.hooks import Recorder
from moectl.parity.candidate.outputs import balance_loss_in, describe, main_output, routed
from moectl.parity.candidate.problems import Problem
from moectl.parity.candidate.sizes import sizes_of
from moectl.parity.candidate.trial import width_of
from moectl.parity.candidate.user_code import AdapterError, CandidateError, Failure, a_level, attempt
from moectl.parity.case import Case, Inputs, Reroute, Unsupported, positions_of
from moectl.parity.tape import Tape

if TYPE_CHECKING:
    from moectl.parity.candidate.side import Candidate

IGNORED = -100
_TAPE = {"model": "logits", "layer": "mlp.residual", "attention": "attn.output", "moe": "mlp.output"}
_IN_PLACE = "in-place operation"


class Run:
    """Everything about one run.

    Args:
        candidate: whose.
        built: its module, with the case's weights.
        case: what.
        reroute: another side's choice, to be put in.
    """

    def __init__(self, candidate: Candidate, built: Built, case: Case, reroute: Reroute | None = None) -> None:
        self.candidate, self.built, self.case, self.reroute = candidate, built, case, reroute
        self.module, self.adapter = built.module, candidate.adapter
        self.own_reroute = type(self.adapter).reroute is not Adapter.reroute
        inner = None if self.own_reroute or case.level == "router" else reroute
        self.recorder = Recorder(self.module, built.wiring, built.formula, learned=candidate.learned, reroute=inner)
        self.inputs, self.leaf = self._inputs()
        self.start = 0

    def tape(self) -> Tape:
        """What was computed."""
        self._refuse()
        before = {name: value.clone() for name, value in self.inputs._asdict().items() if isinstance(value, Tensor)}
        with torch.set_grad_enabled(self.case.gradients):
            output, main = self._in_chunks() if self.case.inputs.chunks else self._at_once(self.inputs)
        self._compare_inputs(before)
        tape, objective = Tape(), None
        self._read(output)
        if self.case.level == "router":
            objective = self._router(output)
        else:
            assert main is not None
            self._check(main)
            self.recorder.forget(_TAPE[self.case.level])
            self.recorder.next_call(_leading(self.inputs), first=True)
            self.recorder.put(_TAPE[self.case.level], main, told=True)
            objective = self._objective(main, output)
        self.recorder.forget(*(name for name, reader in self._readers().items() if reader is None))
        self.recorder.write(tape)
        if self.case.gradients and objective is not None:
            self._gradients(tape, objective)
        return tape

    def _refuse(self) -> None:
        if self.case.inputs.chunks is not None and self.case.level != "model":
            raise Unsupported(f"a lone {self.case.level} keeps no cache; chunks are for a model")
        if self.case.inputs.chunks is not None and self.reroute is not None:
            raise Unsupported("routes are not put into a model that is fed in chunks")
        if self.reroute is not None and self.case.level == "router" and not self.own_reroute:
            raise Unsupported("a lone router is its choice: there is nothing else to compare")
        if self.case.inputs.chunks is not None and self.case.inputs.attention_mask is not None:
            raise Unsupported("padding is not fed in chunks")

    def _inputs(self) -> tuple[Inputs, Tensor | None]:
        """Copies, so that nothing reaches the case; and the leaf whose gradient is asked for."""
        given: dict[str, Any] = {
            k: _copy(v) if isinstance(v, Tensor) else v for k, v in self.case.inputs._asdict().items()
        }
        leaf: Tensor | None = None
        if given["hidden"] is not None:
            leaf = given["hidden"].requires_grad_(self.case.gradients)
            given["hidden"] = leaf.clone() if leaf.clone().stride() == leaf.stride() else leaf
        elif self.case.gradients:
            ids = given["input_ids"]
            leaf = torch.zeros(
                *ids.shape, self.built.formula.experts.hidden_size, dtype=self.case.dtype, requires_grad=True
            )
        return Inputs(**given), leaf

    # Calling

    def _at_once(self, inputs: Inputs) -> tuple[Any, Tensor | None]:
        output = self._call(inputs, lambda module: self.adapter.call(module, inputs))
        return output, self._main(output, inputs)

    def _in_chunks(self) -> tuple[Any, Tensor]:
        lengths = self.case.inputs.chunks
        assert lengths is not None and self.inputs.input_ids is not None
        places, cache, pieces, output = positions_of(self.inputs), None, [], None
        for length in lengths:
            where = slice(self.start, self.start + length)
            piece = self.inputs._replace(
                input_ids=self.inputs.input_ids[:, where], positions=places[:, where], chunks=None, labels=None
            )
            if self.inputs.doc_ids is not None:
                raise Unsupported("documents are not fed in chunks")
            past = self.start
            answer = self._call(
                piece, lambda m, piece=piece, cache=cache, past=past: self.adapter.call_cached(m, piece, cache, past)
            )
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise AdapterError("the adapter's call_cached() does not return (output, cache)", "Return both.")
            output, cache = answer
            main = self._main(output, piece)
            assert main is not None
            pieces.append(main)
            self.start += length
        return output, torch.cat(pieces, dim=1)

    def _call(self, inputs: Inputs, action: Any) -> Any:
        """Run their forward with everything in place; its failure becomes an error of theirs."""

        def inner() -> Any:
            with ExitStack() as stack:
                self._add_leaf(stack)
                if self.own_reroute and self.reroute is not None:
                    stack.enter_context(self.adapter.reroute(self.module, self.reroute))
                if self.case.compiled:
                    return action(_compiled(self.module))
                stack.enter_context(self.recorder.watching(self._readers()))
                return action(self.module)

        self.recorder.next_call(_leading(inputs), first=self.start == 0)
        outcome = attempt(inner)
        if isinstance(outcome, Failure):
            raise self._explained(outcome)
        return outcome

    def _add_leaf(self, stack: ExitStack) -> None:
        """Zeros are added to the embeddings: their gradient is the embeddings', compiled or not."""
        path = self.built.wiring.modules.get("embed")
        if self.case.level != "model" or self.leaf is None or path is None:
            return
        leaf, start, length = self.leaf, self.start, self.recorder.leading[1]

        def add(module: nn.Module, args: Any, out: Any) -> Any:
            if not isinstance(out, Tensor) or out.dim() != 3:
                return out
            first = start if out.shape[1] == length else 0  # all again, in place of a cache
            piece = leaf[:, first : first + out.shape[1]]
            return out + piece if piece.shape == out.shape else out

        stack.callback(self.module.get_submodule(path).register_forward_hook(add).remove)

    def _explained(self, failure: Failure) -> Exception:
        if type(self.adapter).call is not Adapter.call and _within_adapter(failure, self.adapter):
            return AdapterError(f"the adapter's call() fails: {failure}", "Mend that line of the adapter.")
        name, text = self.candidate.name, str(failure.error)
        if _IN_PLACE in text and "leaf" in text:
            self._tell_in_place("torch refuses it: " + text.splitlines()[0], failure)
        if failure.of_devices:
            return CandidateError(
                f"{name} mixes devices: {failure}",
                "MOE013: register_buffer what is neither parameter nor buffer, so that it moves with the module.",
            )
        plain = [each.title for each in self.candidate.problems if each.code == "MOE013"]
        hint = f"See that line. {'; '.join(plain)}." if plain else "See that line; --debug shows the traceback."
        raised = CandidateError(
            f"{name} fails on the probe '{self.case.probe}' in {_dtype(self.case.dtype)}: {failure}", hint
        )
        raised.__cause__ = failure.error
        return raised

    # Reading

    def _readers(self) -> dict[str, Any]:
        if type(self.adapter).tensors is Adapter.tensors:
            return {}
        found = attempt(lambda: dict(self.adapter.tensors(self.module)))
        if isinstance(found, Failure):
            raise AdapterError(f"the adapter's tensors() fails: {found}", "Mend that line of the adapter.")
        return dict(found)

    def _read(self, output: Any) -> None:
        """What the adapter reads off the result itself."""
        for name, reader in self._readers().items():
            if callable(reader):
                found = attempt(partial(reader, output))
                if not isinstance(found, Tensor):
                    what = found if isinstance(found, Failure) else f"it gives a {type(found).__name__}"
                    raise AdapterError(f"the adapter's tensors() fails for '{name}': {what}", "It gives a tensor.")
                self.recorder.put_as(name, found)

    def _main(self, output: Any, inputs: Inputs) -> Tensor | None:
        if self.case.level == "router":
            return None
        found = main_output(output, _leading(inputs), width_of(self.case.level, self.built.formula))
        if found is None:
            shape = [*_leading(inputs), width_of(self.case.level, self.built.formula)]
            raise CandidateError(
                f"{self.candidate.name} returns {describe(output)} on the probe '{self.case.probe}'; "
                f"{a_level(self.case.level)} gives {shape}",
                "Return the whole sequence, or say in an adapter's call() where it is.",
            )
        return found

    def _router(self, output: Any) -> Tensor | None:
        """What a lone router returned; its objective."""
        reading = self.candidate.learned.readings.get("")
        if reading is None:
            return None
        seen = routed(output, reading, num_experts=self.built.formula.router.num_experts)
        for name, tensor in zip(("router_logits", "chosen", "weights"), seen, strict=True):
            if tensor is not None and f"mlp.{name}" not in self.recorder.told:
                self.recorder.forget(f"mlp.{name}")
                self.recorder.put_as(f"mlp.{name}", tensor)
        if seen.weights_TE is not None:
            self._check(seen.weights_TE)
        cotangent = self.case.inputs.cotangent
        return None if seen.weights_TE is None or cotangent is None else (seen.weights_TE * cotangent).sum()

    def _objective(self, main: Tensor, output: Any) -> Tensor | None:
        inputs = self.case.inputs
        if self.case.level != "model":
            return None if inputs.cotangent is None else (main * inputs.cotangent.reshape(main.shape)).sum()
        objective = None
        if inputs.labels is not None:
            scored_BS = F.pad(inputs.labels[:, 1:], (0, 1), value=IGNORED)
            objective = F.cross_entropy(main.flatten(0, 1).float(), scored_BS.flatten(), ignore_index=IGNORED)
            self.recorder.put_scalar("loss", objective)
        balance = balance_loss_in(output)
        if balance is not None:
            self.recorder.put_scalar("balance_loss", balance)
            if objective is not None and self.built.formula.balance_in_objective:
                objective = objective + self.built.formula.balance_coef * balance
        return objective

    def _gradients(self, tape: Tape, objective: Tensor) -> None:
        assert self.leaf is not None
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        frozen = {n: p for n, p in self.module.named_parameters() if not p.requires_grad and p.is_floating_point()}
        if not objective.requires_grad:
            self.candidate.tell(_no_gradient())
            objective = objective + 0.0 * self.leaf.sum()  # none is zero: a gradient that is compared
        leaves = [self.leaf, *parameters.values()]
        outcome = attempt(lambda: torch.autograd.grad(objective, leaves, allow_unused=True))
        if isinstance(outcome, Failure):
            if any(problem.code == "MOE062" for problem in self.candidate.problems):
                return  # that is why, and it has been told
            raise CandidateError(
                f"{self.candidate.name} cannot be differentiated: {outcome}",
                "Replace the operation in place (+=, index_put_) that changes what backward needs.",
            )
        of_input, *found = outcome
        tape.record("grad.input", torch.zeros_like(self.leaf) if of_input is None else of_input)
        by_name = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        } | {name: torch.zeros_like(p) for name, p in frozen.items()}
        sources = {name: s for name, s in self.built.sources.items() if name in by_name}
        weights = dict(self.case.weights)
        for name, gradient in pull_back(sources, by_name, weights, sizes_of(self.built.formula)).items():
            tape.record(f"grad.{name}", gradient)

    # Judging

    def _check(self, main: Tensor) -> None:
        case, name = self.case, self.candidate.name
        if main.dtype != case.dtype:
            self.candidate.tell(
                Problem(
                    None,
                    f"answers in {_dtype(main.dtype)} where it is given {_dtype(case.dtype)}",
                    f"probe '{case.probe}': the output of {name} is {_dtype(main.dtype)}",
                    "Cast back to the input's dtype where it computes in another; register tables as buffers.",
                )
            )
        if case.level != "router" and case.inputs.attention_mask is not None:
            main = main[case.inputs.attention_mask.bool()]
        finite = torch.isfinite(main.detach())
        if not bool(finite.all()):
            self.candidate.tell(
                Problem(
                    "MOE072",
                    "gives NaN or infinity on legal input",
                    f"probe '{case.probe}' in {_dtype(case.dtype)}: {int((~finite).sum())} of {main.numel()} entries",
                    "See the first tensor that is not finite: a softmax over nothing, 0/0, or a logarithm of 0.",
                )
            )

    def _compare_inputs(self, before: dict[str, Tensor]) -> None:
        for name, kept in before.items():
            now = getattr(self.inputs, name)
            if not torch.equal(now.detach(), kept.detach()):
                changed = int((now.detach() != kept.detach()).sum())
                self._tell_in_place(
                    f"probe '{self.case.probe}': {changed} of {kept.numel()} entries of {name} differ afterwards"
                )

    def _tell_in_place(self, evidence: str, failure: Failure | None = None) -> None:
        place = f" ({failure.place})" if failure is not None and failure.place else ""
        self.candidate.tell(
            Problem(
                "MOE062",
                "forward changes its input in place",
                evidence + place,
                "Write x = x + …, not x += …; copy before index_add_ and masked_fill_.",
            )
        )


def _no_gradient() -> Problem:
    return Problem(
        "MOE095",
        "its output has no gradient",
        "the objective does not depend on anything that requires gradients",
        "Look for torch.no_grad, .detach(), .item() or .data in forward.",
    )


def _leading(inputs: Inputs) -> tuple[int, int]:
    given = inputs.input_ids if inputs.input_ids is not None else inputs.hidden
    assert given is not None, "a case has input_ids or hidden"
    return (1, given.shape[0]) if given.is_floating_point() and given.dim() == 2 else (given.shape[0], given.shape[1])


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, also where there are gaps between the entries."""
    if 0 in tensor.stride() or tensor.numel() == 0:
        return tensor.detach().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _within_adapter(failure: Failure, adapter: Adapter) -> bool:
    code = getattr(type(adapter).call, "__code__", None)
    return (
        code is not None and failure.place is not None and code.co_filename.endswith(failure.place.rpartition(":")[0])
    )


def _compiled(module: nn.Module) -> Any:
    """``torch.compile`` with its own code generator, which wants a C++ compiler on a CPU."""
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise MissingDependencyError("torch.compile needs a C++ compiler on a CPU", "Install g++ or clang.")
    torch.compiler.reset()  # each case is one more specialisation of the same code, and there is a limit to them
    return torch.compile(module)

"""moectl's own modules as a side of a comparison: what our users train, held against the reference.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.models.cache import KVCache
from moectl.models.cross_entropy import linear_cross_entropy
from moectl.models.decoder import Attention, Decoder, DecoderLayer, attention_mask, rope_tables
from moectl.moe.losses import load_balancing_loss
from moectl.moe.types import RouterOutput
from moectl.parity.case import Case, Inputs, Reroute, Unsupported, positions_of
from moectl.parity.families import family_name
from moectl.parity.lift import lifted
from moectl.parity.own_build import Built, build
from moectl.parity.own_capture import Capture
from moectl.parity.tape import Tape

IGNORED = -100


class Own:
    """moectl's Decoder, DecoderLayer, MoELayer, Attention and routers.

    Args:
        family: whose weights and config a case brings.
        backend: how the experts are run: ``loop``, ``grouped`` or ``full``.
        frozen: parameters whose canonical name contains one of these get no gradient, and none is recorded: those
            of a published layer's experts take gigabytes.

    Attributes:
        name: for tables.
    """

    def __init__(self, family: str, backend: str = "grouped", *, frozen: tuple[str, ...] = ()) -> None:
        self.family, self.backend, self.frozen = family_name(family), backend, frozen
        self.name = f"moectl ({backend} experts)"

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        """Compute ``case`` with our own modules; see :class:`moectl.parity.case.Subject`.

        Raises:
            Unsupported: moectl has no such component, or it does not take such inputs; or a compiled case where
                no C++ compiler works.
            ConfigError: a config that our modules cannot express, or weights that do not fit.
        """
        exact = lifted() if case.dtype == torch.float64 else nullcontext()
        compiler = _compiler_needed() if case.compiled else nullcontext()
        with exact, compiler, torch.set_grad_enabled(case.gradients):
            built = build(self.family, case, self.backend)
            learning = {
                name: parameter.requires_grad_(not any(part in name for part in self.frozen))
                for name, parameter in built.parameters.items()
            }
            with Capture(built.module, reroute) as capture:
                run = _Model(built, case, capture) if case.level == "model" else _Component(built, case, capture)
                objective, later = run.compute()
            tape = capture.tape(run.batch)
            for name, tensor in later.items():
                tape.record(name, tensor)
            if objective is not None and case.gradients:
                _record_gradients(tape, objective, run.leaf, learning)
            return tape


class _Component:
    """A part of the decoder on hidden states."""

    def __init__(self, built: Built, case: Case, capture: Capture) -> None:
        assert case.inputs.hidden is not None
        self.module, self.built, self.capture, self.inputs = built.module, built, capture, case.inputs
        self.leaf = case.inputs.hidden.detach().requires_grad_(case.gradients)  # strides and all
        self.batch = self.leaf.shape[0]
        self.compiled = case.compiled

    def compute(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The objective, and what no hook has seen."""
        output = self._forward(_compiled(self.module) if self.compiled else self.module)
        if isinstance(output, RouterOutput):
            output = self.capture.seen["mlp.weights"][0]
        cotangent = self.inputs.cotangent
        return (None if cotangent is None else (output * cotangent.reshape(output.shape)).sum()), {}

    def _forward(self, module: Callable[..., Any]) -> Any:
        hidden_BSD, inputs = self.leaf, self.inputs
        token_mask = _token_mask(inputs)
        if self.built.config is None:
            by_token = isinstance(self.module, nn.Module) and hasattr(self.module, "route")
            return module(hidden_BSD.reshape(-1, hidden_BSD.shape[-1])) if by_token else module(hidden_BSD, token_mask)
        config = self.built.config
        rope = rope_tables(positions_of(inputs)[:, None], config.head_dim, config.rope_theta, hidden_BSD.dtype)
        mask = attention_mask(hidden_BSD.shape[1], 0, inputs.doc_ids, token_mask, hidden_BSD.device)
        if isinstance(self.module, Attention):
            return module(hidden_BSD, rope, mask, None)
        assert isinstance(self.module, DecoderLayer)
        return module(hidden_BSD, rope, mask, token_mask, None)


class _Model:
    """The whole decoder on token ids."""

    def __init__(self, built: Built, case: Case, capture: Capture) -> None:
        assert case.inputs.input_ids is not None and isinstance(built.module, Decoder)
        self.module, self.built, self.case, self.capture = built.module, built, case, capture
        self.ids = case.inputs.input_ids
        self.batch = self.ids.shape[0]
        # Added to the embeddings, so that their gradient can be had of a compiled model, too.
        size = self.module.config.hidden_size
        self.leaf = torch.zeros(*self.ids.shape, size, dtype=case.dtype, requires_grad=case.gradients)
        self.start = 0

    def compute(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """As :meth:`_Component.compute`: the logits and both losses are what hooks do not see."""
        handle = self.module.embed_tokens.register_forward_hook(self._add_leaf)
        try:
            return self._compute()
        finally:
            handle.remove()

    def _add_leaf(self, _: nn.Module, args: tuple[Any, ...], out_BSD: Tensor) -> Tensor:
        return out_BSD + self.leaf[:, self.start : self.start + out_BSD.shape[1]]

    def _compute(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        logits, loss_sum, labels = *self._forward(), _shifted(self.case.inputs.labels)
        found = {"logits": logits}
        objective = None
        if labels is not None and loss_sum is not None:
            objective = found["loss"] = loss_sum / (labels != IGNORED).sum()
        balance = self._balance_loss()
        if balance is not None:
            found["balance_loss"] = balance
            if objective is not None and self.built.formula.balance_in_objective:
                objective = objective + self.built.formula.balance_coef * balance
        return objective, found

    def _forward(self) -> tuple[Tensor, Tensor | None]:
        """Logits ``[B, S, V]``, and the summed loss where there are labels."""
        inputs, labels = self.case.inputs, _shifted(self.case.inputs.labels)
        given = {"doc_ids": inputs.doc_ids, "token_mask": _token_mask(inputs), "positions": _positions(inputs)}
        if inputs.chunks is not None:
            hidden_BSD = self._in_chunks(given)
            weight = self.module.lm_head.weight
            loss = None if labels is None else linear_cross_entropy(hidden_BSD.flatten(0, 1), weight, labels.flatten())
            return self.module.lm_head(hidden_BSD), loss
        if self.case.compiled:
            logits = _compiled(self.module)(self.ids, **given)
            if labels is None:
                return logits, None
            scored = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            return logits, scored
        if labels is None:
            return self.module(self.ids, **given), None
        loss = self.module.lm_loss_sum(self.ids, labels, **given)
        self.capture.on = False  # the same again, with the logits made whole
        with torch.no_grad():
            return self.module(self.ids, **given), loss

    def _in_chunks(self, given: dict[str, Tensor | None]) -> Tensor:
        """Final hidden states of pieces fed one after the other with a cache."""
        chunks = self.case.inputs.chunks
        assert chunks is not None
        if given["doc_ids"] is not None:
            raise Unsupported("moectl's cached decoding takes one document per row")
        cache, parts = KVCache(self.module.config.num_layers), []
        for length in chunks:
            span = slice(self.start, self.start + length)
            piece = {name: None if tensor is None else tensor[:, span] for name, tensor in given.items()}
            parts.append(self.module.hidden_states(self.ids[:, span], cache=cache, **piece))
            self.start += length
        return torch.cat(parts, dim=1)

    def _balance_loss(self) -> Tensor | None:
        """Hugging Face's number: ours of all layers' tokens as if they were one layer's, times k.

        They count assignments per token (Σf = k, where ours is 1), and pool the layers, which hides a
        collapse; moectl trains on one loss per layer instead.
        """
        calls = [out for _, layer in sorted(self.capture.routings.items()) for out in layer]
        if not calls:
            return None
        probs_TE = torch.cat([out.router_probs for out in calls])
        indices_TK = torch.cat([out.topk_indices for out in calls])
        mask = _token_mask(self.case.inputs)
        # Layer after layer, and chunk after chunk within a layer.
        pieces = () if mask is None else mask.split(self.case.inputs.chunks or mask.shape[1], dim=1)
        layers = len(self.capture.routings)
        real_T = torch.cat([piece.flatten() for piece in pieces] * layers) if pieces else None
        loss = load_balancing_loss(probs_TE, indices_TK, probs_TE.shape[-1], real_T)
        return indices_TK.shape[-1] * loss


def _record_gradients(tape: Tape, objective: Tensor, leaf: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """``grad.input`` and ``grad.NAME``; zero where the objective does not depend on a parameter."""
    tensors = {"input": leaf, **{name: tensor for name, tensor in parameters.items() if tensor.requires_grad}}
    found = torch.autograd.grad(objective, list(tensors.values()), allow_unused=True)
    for (name, tensor), grad in zip(tensors.items(), found, strict=True):
        tape.record(f"grad.{name}", torch.zeros_like(tensor) if grad is None else grad)


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """``torch.compile`` with its own code generator."""
    torch.compiler.reset()  # each case is one more specialisation of the same code, and there is a limit to them
    return torch.compile(module)


@contextmanager
def _compiler_needed() -> Iterator[None]:
    """On a CPU generated code is C++: where none can be compiled, that is the machine's doing and not the decoder's."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (CppCompileError, InvalidCxxCompiler)):
            cause = getattr(cause, "inner_exception", None) or cause.__cause__
        if cause is None:
            raise
        why = f"torch.compile found no C++ compiler that works ({type(cause).__name__})"
        raise Unsupported(f"{why}: install g++ and Python's headers") from error


def _token_mask(inputs: Inputs) -> Tensor | None:
    return None if inputs.attention_mask is None else inputs.attention_mask.bool()


def _positions(inputs: Inputs) -> Tensor | None:
    """None where the decoder's own are meant: 0, 1, 2, ..."""
    return None if inputs.positions is None and inputs.attention_mask is None else positions_of(inputs)


def _shifted(labels: Tensor | None) -> Tensor | None:
    """Hugging Face's labels, each moved to the token that predicts it."""
    return None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)

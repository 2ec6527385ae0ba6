"""Hugging Face's side of every comparison: its own modules on a case, each tensor recorded.

Shape suffixes: B batch, S sequence, C cached and new positions, T tokens, D hidden, E experts, K experts per
token, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moectl.hf.attention import causal_mask, document_mask, new_cache
from moectl.hf.build import build, rotary
from moectl.hf.family import family as family_of
from moectl.parity.capture import Capture, captured
from moectl.parity.case import Case, Inputs, Reroute, Unsupported, positions_of
from moectl.parity.families import family_name, formula_of
from moectl.parity.formula import RouterFormula
from moectl.parity.lift import lifted
from moectl.parity.tape import Tape


class HuggingFace:
    """transformers' modules, eager attention and experts.

    Args:
        family: moectl's or transformers' name of it.
        lift: whether float64 cases are computed in float64 throughout; otherwise as transformers places its
            float32 casts.

    Raises:
        ConfigError: no such family.
    """

    def __init__(self, family: str, *, lift: bool = True) -> None:
        self.family = family_of(family)
        self.lift = lift
        self.name = "Hugging Face"

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        """Compute the case.

        Non-contiguous input is copied first: some of transformers' blocks refuse it (they ``view``), and what
        an input means does not depend on its strides.

        Raises:
            Unsupported: a component that transformers has and moectl does not compare; chunks of a lone
                component; a route for a model that is fed in chunks.
            ConfigError: config or weights are not this component's.
        """
        self._refuse(case, reroute)
        with lifted() if self.lift and case.dtype == torch.float64 else nullcontext():
            module = build(self.family, case.level, case.config, case.weights, dtype=case.dtype, training=case.training)
            with (
                captured(self.family, case.level, module, shape=_shape(case.inputs), reroute=reroute) as capture,
                torch.set_grad_enabled(case.gradients),
            ):
                if case.level == "model":
                    return _run_model(module, case, capture, self._balance)
                return self._run_component(module, case, capture)

    def _refuse(self, case: Case, reroute: Reroute | None) -> None:
        if case.level in self.family.without:
            raise Unsupported(f"{self.family.name} {case.level}: {self.family.without[case.level]}")
        if case.inputs.chunks is not None and case.level != "model":
            raise Unsupported(f"a lone {case.level} keeps no cache; chunks are for a model")
        if case.inputs.chunks is not None and reroute is not None:
            raise Unsupported("routes are not put into a model that is fed in chunks")

    def _run_component(self, module: Any, case: Case, capture: Capture) -> Tape:
        assert case.inputs.hidden is not None, f"a {case.level} takes hidden states"
        hidden = case.inputs.hidden.detach().clone(memory_format=torch.contiguous_format)
        hidden.requires_grad_(case.gradients)
        if case.level == "router":
            module(hidden.reshape(-1, hidden.shape[-1]))
            out = capture.weights[0]
        elif case.level == "moe":
            out = _first(module(hidden))
        else:
            settings = module.config if case.level == "attention" else module.self_attn.config
            places = positions_of(case.inputs)
            tables = rotary(self.family, settings)(hidden, position_ids=places)
            capture.rope(tables)
            mask = _documents(case) if case.inputs.doc_ids is not None else case.inputs.attention_mask
            mask = causal_mask(settings, hidden.detach(), mask)
            out = _first(module(hidden, position_embeddings=tables, attention_mask=mask, past_key_values=None))
        tape = capture.tape()
        if case.gradients and case.inputs.cotangent is not None:
            (out * case.inputs.cotangent.reshape(out.shape)).sum().backward()
            _write_gradients(tape, module, _gradient(hidden))
        return tape

    def _balance(self, case: Case, capture: Capture) -> Tensor | None:
        """transformers' own balance loss of the layers' router logits, None where the family has none."""
        loss = getattr(self.family.module(), "load_balancing_loss_func", None)
        if loss is None or not capture.router_logits:
            return None
        logits = tuple(torch.cat(pieces, dim=1).flatten(0, 1) for pieces in capture.router_logits.values())
        router = formula_of(self.family.name, case.config).router
        balance: Tensor = loss(logits, router.num_experts, router.top_k, case.inputs.attention_mask)
        return balance


def _run_model(model: Any, case: Case, capture: Capture, balance_of: Any) -> Tape:
    loss, logits_BSV = _in_chunks(model, case) if case.inputs.chunks is not None else _at_once(model, case)
    capture.put("logits", logits_BSV)
    tape = capture.tape()
    if loss is not None:
        tape.record("loss", loss)
    balance = balance_of(case, capture)
    if balance is not None:
        tape.record("balance_loss", balance)
    if not case.gradients or loss is None:
        return tape
    if balance is not None and model.config.output_router_logits:  # what makes transformers add it
        loss = loss + model.config.router_aux_loss_coef * balance
    loss.backward()
    _write_gradients(tape, model, torch.cat([_gradient(piece) for piece in capture.embedded], dim=1))
    return tape


def _at_once(model: Any, case: Case) -> tuple[Tensor | None, Tensor]:
    inputs = case.inputs
    assert inputs.input_ids is not None, "a model takes input_ids"
    mask = _documents(case) if inputs.doc_ids is not None else inputs.attention_mask
    if mask is None and inputs.positions is not None:
        # Without a mask, transformers takes positions that start anew for packed documents.
        mask = torch.ones_like(inputs.input_ids, dtype=torch.bool)
    out = model(
        input_ids=inputs.input_ids,
        attention_mask=mask,
        position_ids=positions_of(inputs),
        labels=inputs.labels,
        use_cache=False,
        output_router_logits=False,  # its balance loss is recorded apart, not added here
    )
    return out.loss, out.logits


def _in_chunks(model: Any, case: Case) -> tuple[Tensor | None, Tensor]:
    inputs = case.inputs
    assert inputs.input_ids is not None and inputs.chunks is not None
    assert sum(inputs.chunks) == inputs.input_ids.shape[1], "chunks make up the sequence"
    cache, places, start = new_cache(model.config), positions_of(inputs), 0
    mask = _documents(case) if inputs.doc_ids is not None else inputs.attention_mask
    logits: list[Tensor] = []
    for length in inputs.chunks:
        end = start + length
        seen = None if mask is None else mask[:, :, start:end, :end] if mask.dim() == 4 else mask[:, :end]
        out = model(
            input_ids=inputs.input_ids[:, start:end],
            attention_mask=seen,
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=True,
            output_router_logits=False,
        )
        logits.append(out.logits)
        start = end
    logits_BSV = torch.cat(logits, dim=1)
    if inputs.labels is None:
        return None, logits_BSV
    return model.loss_function(logits_BSV, inputs.labels, model.config.vocab_size), logits_BSV


def _documents(case: Case) -> Tensor:
    assert case.inputs.doc_ids is not None
    return document_mask(case.inputs.doc_ids, case.inputs.attention_mask, case.dtype)


def _shape(inputs: Inputs) -> tuple[int, int]:
    """Batch and sequence; a router's tokens are one sequence."""
    if inputs.input_ids is not None:
        return inputs.input_ids.shape[0], inputs.input_ids.shape[1]
    assert inputs.hidden is not None, "a case has input_ids or hidden"
    return (1, inputs.hidden.shape[0]) if inputs.hidden.dim() == 2 else (inputs.hidden.shape[0], inputs.hidden.shape[1])


def _write_gradients(tape: Tape, module: nn.Module, of_input: Tensor) -> None:
    tape.record("grad.input", of_input)
    for name, parameter in module.named_parameters():
        tape.record(f"grad.{name}", _gradient(parameter))


def _gradient(tensor: Tensor) -> Tensor:
    """Zero where the objective does not depend on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def rerouted_by(tape: Tape, case: Case) -> Reroute:
    """The choice on ``tape``, to be put into another side's run of ``case``.

    Weights are computed anew from the router logits of the side that is rerouted, as the family does.
    """
    router = formula_of(family_name(case.config["model_type"]), case.config).router

    def reroute(layer: int, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        at = f"layers.{layer}." if case.level == "model" else ""
        chosen_TE = tape[at + "mlp.chosen"].bool()
        slots = max(1, int(chosen_TE.sum(dim=-1).max()))
        taken_TK, indices_TK = chosen_TE.to(torch.uint8).topk(slots, dim=-1)
        return weights_of(router, router_logits, indices_TK, taken_TK.bool()), indices_TK

    return reroute


def weights_of(router: RouterFormula, logits_TE: Tensor, indices_TK: Tensor, taken_TK: Tensor) -> Tensor:
    """Combine weights of experts that are already chosen, as the family computes them.

    Args:
        router: the family's.
        logits_TE: raw.
        indices_TK: the choice.
        taken_TK: bool, False for a slot that is not used (a token that lost an expert to capacity, say).

    Returns:
        ``[T, K]`` in float32 at least; 0 where a slot is not used.
    """
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    if router.score == "softmax_chosen":
        least = torch.finfo(logits_TE.dtype).min
        return logits_TE.gather(1, indices_TK).masked_fill(~taken_TK, least).softmax(dim=-1) * taken_TK
    scores_TE = logits_TE.sigmoid() if router.score == "sigmoid" else logits_TE.softmax(dim=-1)
    weights_TK = scores_TE.gather(1, indices_TK) * taken_TK
    if router.norm_topk:
        sums_T1 = weights_TK.sum(dim=-1, keepdim=True) + router.norm_epsilon
        weights_TK = weights_TK / sums_T1.clamp(min=torch.finfo(sums_T1.dtype).tiny)
    return weights_TK * router.scaling

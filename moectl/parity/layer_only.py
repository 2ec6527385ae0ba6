"""One decoder layer of the published size on both sides, in less memory than three copies of it would take.

Both sides are assigned one storage. Gradients of everything but the experts come from one backward pass
with the experts frozen; those of the experts (as large as the weights themselves) are made, compared and
dropped one expert at a time, from the same tokens, combine weights and upstream gradient.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, N tokens of one expert.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moectl.hf.attention import causal_mask
from moectl.hf.build import build as build_theirs
from moectl.hf.build import rotary
from moectl.hf.family import family as family_of
from moectl.moe.dispatch import dispatch
from moectl.moe.types import RouterOutput
from moectl.parity.capture import captured
from moectl.parity.case import Case, Inputs, positions_of
from moectl.parity.compare import Row, Verdict, after_injection, compare
from moectl.parity.families import family_name, formula_of, random_weights
from moectl.parity.hugging_face import rerouted_by
from moectl.parity.own import Own
from moectl.parity.own_build import build as build_ours
from moectl.parity.tape import Tape
from moectl.parity.tolerance import allowed

LIMIT_BYTES = 8 * 2**30
TOKENS = 64
EXPERTS = "mlp.experts."


@dataclass(frozen=True)
class LayerOnly:
    """A layer compared.

    Attributes:
        rows: in model order; the experts' gradients last, one row for all experts of a tensor.
        ok: no tensor differs, and the memory was enough.
        peak_bytes: of the whole process since it began, what came before this comparison included.
        seconds: of both sides and the comparison, weights included.
        limit_bytes: what ``peak_bytes`` may be.
    """

    rows: tuple[Row, ...]
    ok: bool
    peak_bytes: int
    seconds: float
    limit_bytes: int = LIMIT_BYTES


def layer_only(
    family: str,
    *,
    config: Mapping[str, Any],
    seed: int = 0,
    tokens: int = TOKENS,
    weights: Mapping[str, Tensor] | None = None,
    backend: str = "grouped",
) -> LayerOnly:
    """Hugging Face's decoder layer and ours, in float32, on ``tokens`` random hidden states of one sequence.

    Args:
        config: in the form of config.json.
        weights: the layer's, by canonical names within it, such as ``checkpoint.tensors.part("model.layers.3.")``;
            None for random ones of ``seed``. Each is read once.
        backend: of our experts.

    Raises:
        Unsupported: a family whose decoder layer is not ours.
        ConfigError: a config or weights that do not fit.
    """
    began = time.perf_counter()
    formula = formula_of(family, config)
    if weights is None:
        layer = formula.moe_layers[0] if formula.moe_layers else 0
        weights = random_weights(formula, "layer", seed=seed, dtype=torch.float32, layer=layer)
    case = _case(dict(config), {name: weights[name].to(torch.float32) for name in weights}, tokens, seed)
    ours = Own(family, backend, frozen=(EXPERTS,))
    theirs = _Theirs(family, case)
    reference, candidate = theirs.tape(), ours.run(case)
    comparison = compare(reference, candidate, case)
    if comparison.ties:
        routes = rerouted_by(reference, case)
        comparison = after_injection(comparison, compare(reference, ours.run(case, routes), case))
    rows = comparison.rows
    if any(name.startswith(EXPERTS) for name in case.weights):
        module: Any = build_ours(family_name(family), case, backend).module
        rows += tuple(_expert_rows(case, reference, theirs.layer.mlp.experts, module.mlp.experts))
    peak = peak_bytes()
    ok = comparison.ok and all(row.ok is not False for row in rows) and peak <= LIMIT_BYTES
    return LayerOnly(rows, ok, peak, time.perf_counter() - began)


def peak_bytes() -> int:
    """The largest resident memory that this process has had, memory-mapped files included.

    Linux and macOS tell it in different units; see ``getrusage(2)`` of each.
    """
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Theirs:
    """Hugging Face's side: every tensor of the forward pass, and the gradients of all but the experts."""

    def __init__(self, family: str, case: Case) -> None:
        self.family, self.case = family_of(family), case
        self.layer: Any = build_theirs(self.family, "layer", case.config, case.weights, dtype=case.dtype)

    def tape(self) -> Tape:
        inputs = self.case.inputs
        assert inputs.hidden is not None and inputs.cotangent is not None
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(not name.startswith(EXPERTS))
        hidden_BSD = inputs.hidden.detach().clone().requires_grad_()
        settings, shape = self.layer.self_attn.config, (hidden_BSD.shape[0], hidden_BSD.shape[1])
        tables = rotary(self.family, settings)(hidden_BSD, position_ids=positions_of(inputs))
        mask = causal_mask(settings, hidden_BSD.detach(), None)
        with captured(self.family, "layer", self.layer, shape=shape, reroute=None) as capture:
            capture.rope(tables)
            out = self.layer(hidden_BSD, position_embeddings=tables, attention_mask=mask, past_key_values=None)
            tape = capture.tape()
        out_BSD = out[0] if isinstance(out, tuple) else out
        learning = {name: p for name, p in self.layer.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((out_BSD * inputs.cotangent).sum(), [hidden_BSD, *learning.values()])
        for name, grad in zip(("input", *learning), grads, strict=True):
            tape.record(f"grad.{name}", grad)
        return tape


def _case(config: dict[str, Any], weights: dict[str, Tensor], tokens: int, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed + 1)
    hidden_BSD, cotangent_BSD = torch.randn(2, 1, tokens, config["hidden_size"], generator=generator)
    inputs = Inputs(hidden=hidden_BSD, cotangent=cotangent_BSD)
    return Case("layer-only", "layer", config, weights, inputs, torch.float32)


def _expert_rows(case: Case, reference: Tape, theirs: nn.Module, ours: nn.Module) -> Iterator[Row]:
    """``grad.mlp.experts.*`` of both sides, one expert at a time.

    The experts' output is added to the residual stream, so that its upstream gradient is the layer's own.
    """
    assert case.inputs.cotangent is not None
    x_TD, grad_TD = reference["mlp.input"].flatten(0, 1), case.inputs.cotangent.flatten(0, 1)
    weights_TE, chosen_TE = reference["mlp.weights"], reference["mlp.chosen"]
    errors: dict[str, list[Tensor]] = {name: [] for name, _ in theirs.named_parameters()}
    sizes: dict[str, list[Tensor]] = {name: [] for name in errors}
    for expert in range(chosen_TE.shape[1]):
        ids_N = chosen_TE[:, expert].nonzero().flatten()
        given = x_TD[ids_N], weights_TE[ids_N, expert][:, None], grad_TD[ids_N]
        their_grads = _one_expert(theirs, expert, _run_theirs, *given)
        our_grads = _one_expert(ours, expert, _run_ours, *given)
        for name in errors:
            sizes[name].append(_largest(their_grads[name]))
            errors[name].append(_largest(our_grads[name].sub_(their_grads[name])))  # in place: memory is what is scarce
    idle = int((~chosen_TE.any(dim=0)).sum())
    for name, parameter in theirs.named_parameters():
        error_E = torch.stack(errors[name])  # torch's max keeps NaN, Python's may forget it
        error, scale = float(error_E.max()), float(torch.stack(sizes[name]).max())
        limit = allowed(case.dtype, scale)
        note = f"one expert at a time; the largest error is in expert {int(error_E.argmax())}"
        note += f"; {idle} experts had no token" if idle else ""
        verdict: Verdict = "ok" if error <= limit else "differs"
        relative = error / scale if scale else 0.0
        yield Row(f"grad.{EXPERTS}{name}", tuple(parameter.shape), error, relative, limit, verdict, note)


def _largest(tensor: Tensor) -> Tensor:
    """The largest absolute value, NaN where there is one; no copy is made."""
    return torch.linalg.vector_norm(tensor, ord=math.inf)


def _one_expert(
    experts: nn.Module, expert: int, run: Any, x_ND: Tensor, weights_N1: Tensor, grad_ND: Tensor
) -> dict[str, Tensor]:
    """Gradients ``[1, ...]`` of one expert's weights, by its own side's code: as if the layer had this expert alone."""
    alone = copy.copy(experts)
    parameters = {name: nn.Parameter(p.detach()[expert : expert + 1]) for name, p in experts.named_parameters()}
    alone._parameters = dict(parameters)  # views of the one storage
    alone.num_experts = 1  # type: ignore[assignment]
    with torch.enable_grad():
        objective = (run(alone, x_ND, weights_N1) * grad_ND).sum()
        if not objective.requires_grad:  # transformers' loop skips an expert without tokens
            return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        grads = torch.autograd.grad(objective, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def _run_theirs(experts: nn.Module, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
    return experts(x_ND, torch.zeros_like(weights_N1, dtype=torch.int64), weights_N1)


def _run_ours(experts: nn.Module, x_ND: Tensor, weights_N1: Tensor) -> Tensor:
    first_N1 = torch.zeros_like(weights_N1, dtype=torch.int64)
    alone = RouterOutput(first_N1, weights_N1, weights_N1, weights_N1, weights_N1, weights_N1[:, 0])
    return experts(x_ND, dispatch(alone))

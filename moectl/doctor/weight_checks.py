"""What the weights themselves show: finite, alive, different from each other, in a dtype that can learn.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, F features of one expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moectl.doctor.model_subject import AuditedModel
from moectl.doctor.report import Checked, Finding, NotMade, by_layer, layer_of, listed
from moectl.doctor.subject import Audited, Layer

IDENTICAL = 1e-6  # of the experts' size: float32 rounding of a copy
CLOSE = 1e-2  # ten times what a copied expert's initial noise comes to (1e-3 of each matrix's deviation)
SAMPLED = 2**18  # numbers per expert and matrix that distances are measured on
SAMPLED_TOKENS = 512


def loaded_whole(subject: Audited) -> Checked:
    """No tensor was left out when the model was loaded (MOE070)."""
    if not isinstance(subject, AuditedModel):
        return "every tensor of the checkpoint, verified by its hash, and none left over", []
    assert subject.opened is not None
    skipped = subject.opened.skipped
    if not skipped:
        return "every tensor of the files has its place in the model", []
    seen = f"{len(skipped)} tensors were skipped: {listed(skipped)}"
    todo = (
        "The architecture in config.json is not the one that wrote the files: loading says nothing of this by itself."
    )
    seen += "; every other line here is about the drawn ones too" if any("drawn" in name for name in skipped) else ""
    return seen, [Finding("MOE070", "problem", None, seen, todo)]


def parameters_finite(subject: Audited) -> Checked:
    """No parameter or buffer is NaN or infinite (MOE072)."""
    bad = [name for name, tensor in subject.model.state_dict().items() if not _finite(tensor)]
    if not bad:
        return f"all {sum(p.numel() for p in subject.model.parameters()):,} parameters are finite", []
    seen = f"not finite: {listed(bad)}"
    todo = "Go back to a checkpoint before it (--step), and lower the learning rate or lengthen the warm-up."
    return seen, [Finding("MOE072", "problem", layer_of(bad[0]), seen, todo)]


def zero_gate(subject: Audited) -> Checked:
    """No gate is all zeros, which ties every token to the same experts (MOE034)."""
    findings, norms = [], []
    for number, layer in subject.routed_layers().items():
        gate_ED = layer.gate.detach().float()
        dead = int((gate_ED == 0).all(dim=1).sum())
        low, high = (float(norm) for norm in gate_ED.norm(dim=1).aminmax())
        norms.append((low, f"layer {number}: rows of {low:.2g} to {high:.2g}"))
        if dead and layer.learns:
            whole = dead == layer.num_experts
            what = "the gate is all zeros" if whole else f"{dead} of {layer.num_experts} rows of the gate are zero"
            todo = "Draw the gate from a small normal (std 0.02): equal logits send every token to the same experts."
            findings.append(Finding("MOE034", "problem" if whole else "warning", number, what, todo))
    return f"{by_layer(norms)} (norm; 0: no gate)", findings


def experts_differ(subject: Audited) -> Checked:
    """No two experts of a layer are the same (MOE058)."""
    findings, details = [], []
    for number, layer in subject.routed_layers().items():
        if layer.num_experts == 1:
            continue
        distance_EE = _distances(layer)
        upper = distance_EE[tuple(torch.triu_indices(layer.num_experts, layer.num_experts, 1))]
        same = int((upper <= IDENTICAL).sum())
        nearest = float(upper.min())
        details.append((nearest, f"layer {number}: nearest pair {nearest:.2g} of their size apart"))
        if same:
            findings.append(_identical(subject, layer, distance_EE, same, len(upper)))
        elif nearest < CLOSE and subject.training.step != 0:
            findings.append(_close(subject, layer, nearest, int((upper < CLOSE).sum()), len(upper)))
    if not details:
        raise NotMade("one expert per layer: there is nothing to compare")
    return f"{by_layer(details)} (0: identical; √2: nothing in common)", findings


def _identical(subject: Audited, layer: Layer, distance_EE: Tensor, same: int, pairs: int) -> Finding:
    first = (distance_EE + 2 * torch.eye(layer.num_experts)).argmin()
    one, other = divmod(int(first), layer.num_experts)
    seen = f"{same} of {pairs} pairs of experts are identical, such as {one} and {other}"
    training = subject.training
    if training.step == 0 and training.copied:
        seen += "; they are fresh copies of one MLP, at step 0, and may still part"
        return Finding("MOE058", "note", layer.number, seen, "Nothing yet: look again after some steps.")
    if training.step:
        seen += f", after {training.step:,} steps"
    todo = (
        "Start copies with some noise (moe.init_noise) or drawn afresh, see that each expert gets its own gradient,"
        " and that saving and loading do not write one expert over the others."
    )
    return Finding("MOE058", "problem", layer.number, seen, todo)


def _close(subject: Audited, layer: Layer, nearest: float, close: int, pairs: int) -> Finding:
    seen = f"{close} of {pairs} pairs of experts are nearly identical (nearest {nearest:.1e} of their size apart)"
    start = subject.training.start
    if start is not None and all(name in start for name in layer.experts):
        begun = _distances(layer, start)
        begun.fill_diagonal_(torch.inf)
        seen += f"; at step 0 the nearest were {float(begun.min()):.1e} apart"
    return Finding("MOE058", "warning", layer.number, seen, "Train on, or raise moe.init_noise if they do not part.")


def _distances(layer: Layer, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """Distance of each pair of experts ``[E, E]`` in units of their mean size, over all their matrices."""
    squares_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    sizes_E = torch.zeros(layer.num_experts, dtype=torch.float64)
    for name, parameter in layer.experts.items():
        flat_EF = (parameter if values is None else values[name]).detach().flatten(1)
        every = max(flat_EF.shape[1] // SAMPLED, 1)
        rows_EF = flat_EF[:, ::every].double()
        sizes_E += rows_EF.square().sum(1)
        for expert in range(layer.num_experts):  # differences, not a Gram matrix: near copies cancel in that
            squares_EE[expert] += (rows_EF - rows_EF[expert]).square().sum(1)
    return squares_EE.sqrt() / sizes_E.mean().sqrt().clamp(min=1e-30)


def router_dtype(subject: Audited) -> Checked:
    """Gate and router arithmetic are in float32 or above (MOE027)."""
    findings, kinds = [], []
    for number, layer in subject.routed_layers().items():
        dtype = subject.dtypes.get(f"{layer.router_name}.weight", layer.gate.dtype)
        kinds.append(dtype)
        logits_TE = subject.seen.routes[number].logits if number in subject.seen.routes else None
        if dtype.itemsize < 4:
            findings.append(_low_gate(subject, layer, dtype))
        elif layer.learns and logits_TE is not None and (low := _low_precision(logits_TE)):
            seen = f"the gate is {_plain(dtype)}, but all {logits_TE.numel():,} router logits are {low} numbers"
            todo = "Compute the router in float32: cast its input, not its weight, and keep autocast out."
            findings.append(Finding("MOE027", "problem", number, seen, todo))
    return f"gates in {', '.join(sorted({_plain(kind) for kind in kinds}))}", findings


def _low_gate(subject: Audited, layer: Layer, dtype: torch.dtype) -> Finding:
    """A gate stored in low precision; for a model in use, whether its logits are low too, and whom that moves."""
    seen = f"the gate is {_plain(dtype)}"
    if subject.training.step is not None:
        seen += f": a step of under {torch.finfo(dtype).eps / 2:.1%} of a weight is lost"
        return Finding("MOE027", "problem", layer.number, seen, "Keep the router's weights in float32.")
    x_TD = subject.seen.inputs[layer.number].reshape(-1, layer.gate.shape[1])[:SAMPLED_TOKENS]
    low_TE = _logits(layer.router, x_TD, dtype)
    if low_TE.dtype.itemsize >= 4:
        seen += f", and its logits are computed in {_plain(low_TE.dtype)}"
        return Finding("MOE027", "note", layer.number, seen, "Keep the gate in float32 when you train on.")
    exact_TE = _logits(layer.router, x_TD, torch.float64)
    low_TK, exact_TK = (each.topk(layer.top_k).indices.sort().values for each in (low_TE, exact_TE))
    moved = float((exact_TK != low_TK).any(dim=1).float().mean())
    seen += (
        f", and so are its logits: their largest {layer.top_k} are others than in float64 for {moved:.1%} of"
        f" {len(x_TD)} tokens"
    )
    return Finding("MOE027", "warning", layer.number, seen, "Keep the gate in float32 when you train on.")


def _logits(router: nn.Module, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """What a model folder's router computes in that dtype, with a bias where it has one."""
    with torch.no_grad():
        out: Any = copy.deepcopy(router).to(dtype)(x_TD.to(dtype))
    logits_TE: Tensor = out[0] if isinstance(out, tuple) else out
    return logits_TE


def bias_dtype(subject: Audited) -> Checked:
    """Balancing biases and other running state of the router are in float32 (MOE041)."""
    findings, count = [], 0
    for number, layer in subject.routed_layers().items():
        state = {name: tensor for name, tensor in layer.router.named_buffers() if tensor.is_floating_point()}
        # Some keep it as a parameter (e_score_correction_bias); a gate's own `bias` is learned by gradients.
        parameters = dict(layer.router.named_parameters())
        state |= {name: p for name, p in parameters.items() if "bias" in name and name.split(".")[-1] != "bias"}
        for name, tensor in state.items():
            count += 1
            dtype = subject.dtypes.get(f"{layer.router_name}.{name}", tensor.dtype)
            if dtype.itemsize < 4:
                moves = "a bias of 1 stands still under moves of 1e-3" if dtype == torch.bfloat16 else "it is coarse"
                seen = f"{layer.router_name}.{name} is {_plain(dtype)}: {moves}"
                findings.append(Finding("MOE041", "problem", number, seen, "Keep it in float32, as a buffer."))
    if not count:
        raise NotMade("its routers keep no running state, such as a balancing bias")
    kept = f"{count} buffers of routers"
    return (f"{kept}, in float32 or above" if not findings else f"{len(findings)} of {kept} are lower"), findings


def _low_precision(logits_TE: Tensor) -> str | None:
    """The low dtype whose numbers these all are: by chance one in 65,536 is, and all of many are not."""
    values = logits_TE[logits_TE != 0].float()
    if values.numel() >= 16:
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(values.to(dtype).float(), values):
                return _plain(dtype)
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())

"""More experts in a trained MoE layer, and the same function.

*Times m.* Every expert becomes m, numbered ``e·m`` to ``e·m + m - 1``, with its gate row (and balancing bias)
each. The copies of one expert tie exactly, and two experts' copies never come between each other's, so the
``m·k`` best are the copies of the ``k`` best. A softmax over the chosen ``m·k`` logits, or over all, gives each
copy the m-th part of its expert's weight: ``Σ_j (w/m)·f = w·f``. So ``k`` becomes ``m·k``. A router of one expert
per token keeps ``k = 1``: a tie goes to one of the copies, which all compute the same. Where the weights of the
copies sum to ``c`` times the old weight (``switch``: 1/m; ``sigmoid`` without renormalisation: m), ``down_proj``
and its bias are divided by ``c``. With ``parts``, copy j keeps the j-th part of the neurons alone and ``down_proj``
is m times as large, so that a token costs what it did: ``Σ_j (w/m)·m·W_j·a_j = w·W·a``; it needs all copies to be
chosen, with equal weights.

*Plus n.* New experts come last and are closed by their router (:class:`~moectl.moe.token_choice.TokenChoiceOptions`,
``new_experts``): their scores are -inf until the first optimizer step, so that they are never chosen and take
nothing from the others' softmax.

Both ask the router itself whether it is so, in float64, before anything is changed. Shape suffixes: T tokens,
D hidden, E experts, F intermediate, M copies of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.errors import ConfigError
from moectl.moe.experts import Experts
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.moe.upcycle import stack_experts, take_neurons

_PROBES = 256
_EXACT = 1e-9  # of weights of order one, computed in float64


@torch.no_grad()
def multiply_experts(layer: MoELayer, router: Router, times: int, *, parts: bool = False) -> None:
    """Every expert of ``layer`` becomes ``times``, in place; the function stays.

    Args:
        layer: its router and experts are replaced.
        router: a fresh one of the same kind for ``times`` as many experts, with ``times`` as many per token
            unless one is all that it takes.
        times: m.
        parts: each of the m keeps the m-th part of the neurons.

    Raises:
        ConfigError: the router's weights do not divide among copies; neurons that do not divide.
    """
    old = layer.router
    assert router.num_experts == times * old.num_experts
    _inherit(router, old, times)
    ratio = _weight_ratio(old, router, times, evenly=parts)
    size = layer.experts.intermediate_size
    if parts and size % times:
        raise ConfigError(f"{size} neurons do not divide into {times} parts", f"Choose a divisor of {size}.")
    layouts = []
    for expert in range(old.num_experts):
        one = {name: parameter[expert] for name, parameter in layer.experts.named_parameters()}
        pieces = torch.arange(size).split(size // times) if parts else [torch.arange(size)] * times
        for piece in pieces:
            layout = take_neurons(one, piece)
            layout["down_proj"] = layout["down_proj"] * (times / ratio if parts else 1.0 / ratio)
            if "down_proj_bias" in layout:
                layout["down_proj_bias"] = layout["down_proj_bias"] / ratio
            layouts.append(layout)
    _replace(layer, router, stack_experts(layouts))


@torch.no_grad()
def append_experts(
    layer: MoELayer, router: Router, *, noise: float = 1e-3, generator: torch.Generator | None = None
) -> None:
    """New experts behind those of ``layer``, in place; the function stays.

    A new expert starts as a noisy copy of an old one, round about, and so does its gate row: once open, the two
    share tokens and grow apart.

    Args:
        router: a fresh one of the same kind for more experts, the new ones closed.
        noise: of the copies, in standard deviations of each matrix.
        generator: a CPU generator.

    Raises:
        ConfigError: the router would send tokens to the new experts, or weigh the old ones otherwise.
    """
    old = layer.router
    extra = router.num_experts - old.num_experts
    assert extra > 0
    still = getattr(old.config, "new_experts", 0)
    if still and int(getattr(old, "opened_steps", 0)) < getattr(old.config, "opening_steps", 0):
        raise ConfigError(
            f"{old.label} is still opening its last {still} new experts", "Train on until they are open, then add more."
        )
    _inherit(router, old, 1)
    mixed_TE, mixed_old_TE = _mixing(router, old.hidden_size), _mixing(old, old.hidden_size)
    same = torch.allclose(mixed_TE[:, : old.num_experts], mixed_old_TE, rtol=0.0, atol=_EXACT)
    if mixed_TE[:, old.num_experts :].any() or not same:
        raise ConfigError(
            f"{old.label} cannot keep new experts closed: the function would change",
            "Use a router whose tokens choose (top1, topk, sigmoid), or multiply the experts instead.",
        )
    sources = torch.arange(extra) % old.num_experts
    stacked = {
        name: torch.cat([parameter.detach(), _noisy(parameter, sources, noise, generator)])
        for name, parameter in layer.experts.named_parameters()
    }
    router.weight[old.num_experts :] = _noisy(old.weight, sources, noise, generator)
    _replace(layer, router, stacked)


def _inherit(router: Router, old: Router, times: int) -> None:
    """The gate, other parameters and buffers of ``old``: along the experts each entry ``times`` over; what is
    new at the end stays as it was made."""
    router.to(device=old.weight.device, dtype=old.weight.dtype)
    router.label = old.label
    before = {**dict(old.named_parameters()), **dict(old.named_buffers())}
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        source = before.get(name)
        if source is None or name == "opened_steps":
            continue
        if source.dim() and source.shape[0] == old.num_experts:
            source = source.repeat_interleave(times, dim=0)
            tensor[: source.shape[0]] = source
        elif source.shape == tensor.shape:
            tensor.copy_(source)
    if times > 1 and "opened_steps" in before:
        dict(router.named_buffers())["opened_steps"].copy_(before["opened_steps"])
    router.train(old.training)


def _weight_ratio(old: Router, router: Router, times: int, *, evenly: bool) -> float:
    """What the weights of an expert's copies sum to, in units of its old weight; the same everywhere, or refused."""
    before_TE = _mixing(old, old.hidden_size)
    copies_TEM = _mixing(router, old.hidden_size).unflatten(1, (old.num_experts, times))
    after_TE = copies_TEM.sum(-1)
    ratio = float((after_TE * before_TE).sum() / (before_TE * before_TE).sum())
    exact = torch.allclose(after_TE, ratio * before_TE, rtol=0.0, atol=_EXACT) and ratio > 0
    even = torch.allclose(copies_TEM * times, after_TE[:, :, None].expand_as(copies_TEM), rtol=0.0, atol=_EXACT)
    if not exact or (evenly and not even):
        raise ConfigError(
            f"the weights of {old.label} do not divide among {times} copies of each expert: the function would change",
            "A router whose tokens choose by a softmax or sigmoid of each expert's own logit can be grown"
            + ("; parts need all copies to be chosen (topk, with top_k times as large)." if evenly else "."),
        )
    return round(ratio) if abs(ratio - round(ratio)) < _EXACT else ratio


def _mixing(router: Router, hidden_size: int) -> Tensor:
    """What each expert weighs for some tokens, in eval and float64: ``[T, E]``, 0 where it is not chosen."""
    probe_TD = torch.randn(_PROBES, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    training = router.training
    out = router.eval()(probe_TD.to(router.weight.device))
    router.train(training)
    weights_TK = out.topk_weights if out.keep is None else out.topk_weights.masked_fill(~out.keep, 0.0)
    mixed_TE = torch.zeros(_PROBES, router.num_experts, dtype=torch.float64, device=weights_TK.device)
    return mixed_TE.scatter_add_(1, out.topk_indices, weights_TK.double())


def _noisy(stacked: Tensor, sources: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    """Noisy copies of some experts' tensors: each by its own noise, in standard deviations of all of them."""
    copies = stacked.detach()[sources.to(stacked.device)]
    drawn = torch.randn(copies.shape, generator=generator, dtype=torch.float32).to(copies.device)
    return copies + (noise * stacked.detach().float().std() * drawn).to(copies.dtype)


def _replace(layer: MoELayer, router: Router, stacked: dict[str, Tensor]) -> None:
    experts: Experts = layer.experts
    for name, tensor in stacked.items():
        wanted = getattr(experts, name)
        setattr(experts, name, nn.Parameter(tensor.to(wanted.dtype), requires_grad=wanted.requires_grad))
    experts.num_experts = router.num_experts
    experts.intermediate_size = stacked["down_proj"].shape[2]
    if experts.grad_buffers is not None:
        experts.accumulate_gradients_in_place()
    layer.router, layer.routing, layer.dropped = router, None, None

"""More experts in a trained MoE layer, and the same function.

*Times m.* Every expert becomes m, numbered ``e·m`` to ``e·m + m - 1``, with its gate row (and balancing bias)
each. The copies of one expert tie exactly, and two experts' copies never come between each other's, so the
``m·k`` best are the copies of the ``k`` best. A softmax over the chosen ``m·k`` logits, or over all, gives each
copy the m-th part of its expert's weight: ``Σ_j (w/m)·f = w·f``. So ``k`` becomes ``m·k``. A router of one expert
per token keeps ``k = 1``: a tie goes to one of the copies, which all compute the same. Where the weights of the
copies sum to ``c`` times the old weight (``switch``: 1/m; ``sigmoid`` without renormalisation: m), ``down_proj``
and its bias are divided by ``c``. Copies that are all chosen, with equal weights, would get the same gradients and
stay the same for ever: their ``down_proj`` differ by noise that cancels in their sum. Of copies of which one is
chosen, the gate's gradient parts them. With ``parts``, copy j keeps the j-th part of the neurons alone and
``down_proj`` is m times as large, so that a token costs what it did: ``Σ_j (w/m)·m·W_j·a_j = w·W·a``; it needs all
copies to be chosen, with equal weights.

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
_OPENED = "opened_steps"
_EXACT = 1e-9  # of weights of order one, computed in float64


@torch.no_grad()
def multiply_experts(
    layer: MoELayer,
    router: Router,
    times: int,
    *,
    parts: bool = False,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> None:
    """Every expert of ``layer`` becomes ``times``, in place; the function stays.

    Args:
        layer: its router and experts are replaced.
        router: a fresh one of the same kind for ``times`` as many experts, with ``times`` as many per token
            unless one is all that it takes.
        times: m.
        parts: each of the m keeps the m-th part of the neurons.
        noise: of whole copies that are all chosen, in standard deviations of ``down_proj``: it cancels in their sum.
        generator: a CPU generator.

    Raises:
        ConfigError: the router's weights do not divide among copies; neurons that do not divide.
    """
    old = layer.router
    assert router.num_experts == times * old.num_experts
    _inherit(router, old, times)
    ratio, even = _weight_ratio(old, router, times)
    if parts and not even:
        raise _does_not_divide(old, times, "; parts need all copies to be chosen (topk, with top_k times as large).")
    size = layer.experts.intermediate_size
    if parts and size % times:
        raise ConfigError(f"{size} neurons do not divide into {times} parts", f"Choose a divisor of {size}.")
    layouts = []
    deviation = dict(layer.experts.named_parameters())["down_proj"].detach().float().std()
    for expert in range(old.num_experts):
        one = {name: parameter[expert] for name, parameter in layer.experts.named_parameters()}
        pieces = torch.arange(size).split(size // times) if parts else [torch.arange(size)] * times
        apart_MDF = _cancelling(one["down_proj"], times, generator) * (noise * deviation) if even and noise else None
        for number, piece in enumerate(pieces):
            layout = take_neurons(one, piece)
            down_DF = layout["down_proj"] if parts or apart_MDF is None else layout["down_proj"] + apart_MDF[number]
            layout["down_proj"] = down_DF * (times / ratio if parts else 1.0 / ratio)
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
    share tokens and grow apart. Whatever else the router has learned of the old one is copied too.

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
    learned = dict(old.named_parameters())
    for name, parameter in router.named_parameters():
        along = _experts_dimension(learned[name], parameter, old, router)
        if along is not None:
            copied = learned[name].index_select(along, sources.to(parameter.device))
            parameter.narrow(along, old.num_experts, extra).copy_(copied)
    router.weight[old.num_experts :] = _noisy(old.weight, sources, noise, generator)
    _replace(layer, router, stacked)


def _inherit(router: Router, old: Router, times: int) -> None:
    """The gate, other parameters and buffers of ``old``: along the experts each entry ``times`` over; what is
    new at the end stays as it was made.

    Raises:
        ConfigError: a parameter or buffer that the other router does not have, or in a shape that does not follow
            the number of experts.
    """
    router.to(device=old.weight.device, dtype=old.weight.dtype)
    router.label = old.label
    before, after = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (old, router))
    for name in before.keys() ^ after.keys():
        if name != _OPENED:
            raise _not_inherited(old, name)
    for name, tensor in after.items():
        if name == _OPENED:
            continue
        source, along = before[name], _experts_dimension(before[name], tensor, old, router)
        if along is None:
            tensor.copy_(source)
        else:
            repeated = source.repeat_interleave(times, dim=along)
            tensor.narrow(along, 0, repeated.shape[along]).copy_(repeated)
    if times > 1 and _OPENED in before:
        after[_OPENED].copy_(before[_OPENED])
    router.train(old.training)


def _experts_dimension(source: Tensor, tensor: Tensor, old: Router, router: Router) -> int | None:
    """Along which dimension ``tensor`` has an entry per expert: where its size differs from ``source``'s; None for
    equal shapes."""
    if source.shape == tensor.shape:
        return None
    if source.dim() == tensor.dim():
        pairs = enumerate(zip(source.shape, tensor.shape, strict=True))
        differing = [(number, sizes) for number, sizes in pairs if sizes[0] != sizes[1]]
        if len(differing) == 1 and differing[0][1] == (old.num_experts, router.num_experts):
            return differing[0][0]
    name = next(key for key, each in (*router.named_parameters(), *router.named_buffers()) if each is tensor)
    raise _not_inherited(old, name)


def _not_inherited(old: Router, name: str) -> ConfigError:
    return ConfigError(
        f"{old.label} cannot be grown: what becomes of its '{name}' with more experts is not known",
        "Parameters and buffers have one dimension of as many entries as experts, or none.",
    )


def _does_not_divide(old: Router, times: int, also: str = ".") -> ConfigError:
    return ConfigError(
        f"the weights of {old.label} do not divide among {times} copies of each expert: the function would change",
        f"A router whose tokens choose by a softmax or sigmoid of each expert's own logit can be grown{also}",
    )


def _cancelling(like_DF: Tensor, copies: int, generator: torch.Generator | None) -> Tensor:
    """Normal noise ``[M, D, F]`` whose sum over the copies is zero."""
    drawn_MDF = torch.randn((copies, *like_DF.shape), generator=generator, dtype=torch.float32).double()
    return (drawn_MDF - drawn_MDF.mean(0)).to(like_DF)


def _weight_ratio(old: Router, router: Router, times: int) -> tuple[float, bool]:
    """What the weights of an expert's copies sum to, in units of its old weight, and whether each has its share; the
    ratio is the same everywhere, or refused."""
    before_TE = _mixing(old, old.hidden_size)
    copies_TEM = _mixing(router, old.hidden_size).unflatten(1, (old.num_experts, times))
    after_TE = copies_TEM.sum(-1)
    ratio = float((after_TE * before_TE).sum() / (before_TE * before_TE).sum())
    exact = torch.allclose(after_TE, ratio * before_TE, rtol=0.0, atol=_EXACT) and ratio > 0
    even = torch.allclose(copies_TEM * times, after_TE[:, :, None].expand_as(copies_TEM), rtol=0.0, atol=_EXACT)
    if not exact:
        raise _does_not_divide(old, times)
    return (round(ratio) if abs(ratio - round(ratio)) < _EXACT else ratio), even


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

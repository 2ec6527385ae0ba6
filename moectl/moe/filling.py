"""A fresh MoE layer filled with what its dense MLP was, as a config says. The same for every family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.moe.shared import fill_shared
from moectl.moe.upcycle import (
    Layout,
    group_rows,
    redraw_neurons,
    split_neurons,
    stack_copies,
    stack_experts,
)


def check_layer(layer: MoELayer, moe: MoEConfig, dense_size: int) -> None:
    """Refuse what cannot start from a dense MLP of ``dense_size`` neurons, before anything is changed.

    Raises:
        ConfigError: experts of another size than the dense MLP's where they are to be it; weights that do not
            sum to one, which would scale the layer; parts whose number per token is not the granularity.
    """
    if moe.init == "random":
        return
    size = layer.experts.intermediate_size
    if moe.init != "split" and size != dense_size:
        what = "copied" if moe.init == "copy" else moe.init
        raise ConfigError(
            f"{what} experts have the dense MLP's {dense_size} neurons, not {size}",
            "Leave moe.expert_intermediate_size unset, or use moe.init: random.",
        )
    if moe.init == "split":
        _check_parts(layer, moe)
    if not moe.allow_shrinking and not weights_sum_to_one(layer):
        also = "" if moe.init == "split" else " To change it on purpose, set moe.allow_shrinking."
        raise ConfigError(
            f"the weights of {layer.router.label} do not sum to one: every copied layer's output would differ from"
            " the dense MLP's",
            f"Use top1 or topk with norm_topk_prob: true, or moe.init: random.{also}",
        )


def check_donors(moe: MoEConfig, alike: Sequence[bool], differs: str) -> None:
    """Refuse models that cannot be the experts.

    Args:
        alike: of each model given, whether it can be a fine-tune of the base.
        differs: what is another in one that cannot.

    Raises:
        ConfigError: another number of models than of experts, or one that is no fine-tune of the base.
    """
    if moe.init != "experts-from":
        if alike:
            raise ConfigError("experts were given, but moe.init is not experts-from", "Leave them away.")
        return
    if len(alike) != moe.num_experts:
        raise ConfigError(f"{len(alike)} models were given for {moe.num_experts} experts", "Give one per expert.")
    for name, fits in zip(moe.experts_from, alike, strict=True):
        if not fits:
            raise ConfigError(
                f"'{name}' is no fine-tune of the base: {differs}",
                "Experts come from models that were fine-tuned from one dense base.",
            )


@torch.no_grad()
def fill_layer(
    layer: MoELayer,
    dense: Layout,
    moe: MoEConfig,
    *,
    generator: torch.Generator | None = None,
    experts: Sequence[Layout] = (),
    rows: Tensor | None = None,
) -> None:
    """Give a fresh layer its first weights; its gate keeps what it was drawn with, unless said otherwise.

    Args:
        layer: already in the dense MLP's dtype, on its device, and checked by :func:`check_layer`.
        dense: the dense MLP.
        moe: ``init`` is not ``auto``.
        generator: a CPU generator for noise, parts and redrawn neurons.
        experts: for ``experts-from``: an MLP per expert.
        rows: for ``experts-from``: the gate's rows ``[E, D]``.
    """
    assert moe.init != "auto"
    shared: Layout | None = None
    stacked: Layout | None = None
    if moe.init == "copy":
        stacked = stack_copies(dense, moe.num_experts, noise=moe.init_noise, generator=generator)
    elif moe.init == "drop":
        stacked = redraw_neurons(dense, moe.num_experts, ratio=moe.drop_ratio, generator=generator)
    elif moe.init == "experts-from":
        stacked = stack_experts(experts)
    elif moe.init == "split":
        assert moe.granularity is not None
        stacked, shared = split_neurons(
            dense,
            moe.num_experts,
            granularity=moe.granularity,
            top_k=layer.router.top_k,
            noise=moe.init_noise,
            generator=generator,
        )
        rows = group_rows(layer.router.weight, layer.router.top_k)
    if stacked is not None:
        layer.experts.load_state_dict(stacked)
    if rows is not None:
        layer.router.weight.copy_(rows)
    if layer.shared_experts is not None:
        fill_shared(layer.shared_experts, shared)


def weights_sum_to_one(layer: MoELayer) -> bool:
    """Ask the router itself, on a few tokens, in eval; one on the meta device by another of its kind and size."""
    router = on_cpu(layer.router)
    probe = torch.randn(8, router.hidden_size, generator=torch.Generator().manual_seed(0)).to(router.weight.device)
    training = router.training
    with torch.no_grad():
        total = router.eval()(probe).topk_weights.sum(-1)
    router.train(training)
    return bool(torch.allclose(total, torch.ones_like(total), atol=1e-5))


def on_cpu(router: Router) -> Router:
    """``router`` itself, or, where it is on the meta device and has no numbers, a fresh one of its kind and size.

    torch's generators are left as they were.
    """
    if router.weight.device.type != "meta":
        return router
    with torch.random.fork_rng(devices=[]):
        fresh = type(router)(router.config, hidden_size=router.hidden_size, num_experts=router.num_experts)
    fresh.label = router.label
    return fresh


def _check_parts(layer: MoELayer, moe: MoEConfig) -> None:
    """Iso-FLOP: a token computes as many parts as the dense MLP has."""
    chosen, shared = layer.router.top_k, moe.n_shared_experts
    if not layer.router.token_choice:
        raise ConfigError(
            f"{layer.router.label} takes no moe.init split: its tokens do not choose their experts",
            "Use the router 'topk', or moe.init: copy.",
        )
    if chosen + shared != moe.granularity:
        raise ConfigError(
            f"moe.granularity is {moe.granularity}, but a token visits {chosen} experts and {shared} shared ones: the"
            f" layer would cost {(chosen + shared) / (moe.granularity or 1):.2f} times the dense MLP",
            "Active FLOPs stay the dense layer's where moe.router.top_k + moe.n_shared_experts = moe.granularity.",
        )

"""A trained dense decoder into a Mixture of Experts that computes the same function."""

from __future__ import annotations

import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.models.decoder import Decoder, GatedMLP
from moectl.moe.layer import MoELayer
from moectl.moe.upcycle import stack_copies


def upcycle_decoder(dense: Decoder, moe: MoEConfig, generator: torch.Generator | None = None) -> Decoder:
    """A new decoder whose chosen MLPs are experts; everything else is copied bit for bit.

    With ``init: copy``, ``init_noise = 0`` and combine weights that sum to one, the result computes
    the dense function. Shared experts start with a zero down projection. The gates and ``random``
    experts are drawn from torch's global generator.

    Raises:
        AssertionError: ``moe.init`` is still ``auto``; the caller knows whether the base is trained.
        ConfigError: the decoder has experts already; copied experts of another size than the dense
            MLP's; a router whose weights do not sum to one, which would shrink every copied layer.
    """
    assert moe.init != "auto"
    if dense.config.moe_layers:
        raise ConfigError("the base has experts already", "Upcycle a dense run (preset: dense).")
    model = Decoder(dense.config.with_moe(moe))
    if moe.init == "copy":
        _check_copy(model, dense.config.intermediate_size)
    model.to(next(dense.parameters()))  # before the weights come in: float64 would lose bits on the way
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in key for key in (*loaded.missing_keys, *loaded.unexpected_keys)), loaded
    for number, layer in model.moe_layers().items():
        source = dense.layers[number].mlp
        assert isinstance(source, GatedMLP)
        if moe.init == "copy":
            copies = stack_copies(source.stacked_layout(), moe.num_experts, noise=moe.init_noise, generator=generator)
            layer.experts.load_state_dict(copies)
        if isinstance(layer.shared_experts, GatedMLP):
            torch.nn.init.zeros_(layer.shared_experts.down_proj.weight)
    return model


def _check_copy(model: Decoder, dense_size: int) -> None:
    if model.config.expert_intermediate_size != dense_size:
        raise ConfigError(
            f"copied experts have the dense MLP's {dense_size} neurons, not {model.config.expert_intermediate_size}",
            "Leave moe.expert_intermediate_size unset, or use moe.init: random.",
        )
    for layer in model.moe_layers().values():
        if not _weights_sum_to_one(layer):
            raise ConfigError(
                f"the weights of router '{type(layer.router).__name__}' do not sum to one: every copied layer's"
                " output would shrink",
                "Use top1 or topk with norm_topk_prob: true, or moe.init: random.",
            )


def _weights_sum_to_one(layer: MoELayer) -> bool:
    """Ask the router itself, on a few tokens, in eval."""
    probe = torch.randn(8, layer.router.hidden_size, generator=torch.Generator().manual_seed(0))
    training = layer.router.training
    with torch.no_grad():
        total = layer.router.eval()(probe).topk_weights.sum(-1)
    layer.router.train(training)
    return bool(torch.allclose(total, torch.ones_like(total), atol=1e-5))

"""A trained dense decoder into a Mixture of Experts that computes the same function, where the init can."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.models.decoder import Decoder, GatedMLP
from moectl.moe.filling import check_donors, check_layer, fill_layer
from moectl.moe.upcycle import Layout


def upcycle_decoder(
    dense: Decoder,
    moe: MoEConfig,
    generator: torch.Generator | None = None,
    *,
    experts: Sequence[Decoder] = (),
) -> Decoder:
    """A new decoder whose chosen MLPs are experts; everything else is copied bit for bit.

    With ``init: copy``, ``init_noise = 0`` and combine weights that sum to one, or with ``init: split``
    without noise, the result computes the dense function. Fresh shared experts start with a zero down
    projection. The gates and ``random`` experts are drawn from torch's global generator.

    Args:
        generator: a CPU generator for whatever else is drawn.
        experts: for ``init: experts-from``, a dense decoder of the same shape per expert.

    Raises:
        AssertionError: ``moe.init`` is still ``auto``; the caller knows whether the base is trained.
        ConfigError: the decoder has experts already; what :func:`moectl.moe.filling.check_layer` refuses;
            experts of another shape.
    """
    check_upcycling(dense, moe, experts)
    model = Decoder(dense.config.with_moe(moe))
    model.to(next(dense.parameters()))  # before the weights come in: float64 would lose bits on the way
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in key for key in (*loaded.missing_keys, *loaded.unexpected_keys)), loaded
    for number, layer in model.moe_layers().items():
        layouts = [_layout(each, number) for each in experts]
        fill_layer(layer, _layout(dense, number), moe, generator=generator, experts=layouts)
    return model


def check_upcycling(dense: Decoder, moe: MoEConfig, experts: Sequence[Decoder] = ()) -> None:
    """Refuse what :func:`upcycle_decoder` cannot do, at no cost: layers are tried on the meta device."""
    assert moe.init != "auto"
    if dense.config.moe_layers:
        raise ConfigError("the base has experts already", "Upcycle a dense run (preset: dense).")
    with torch.device("meta"):
        layers = Decoder(dense.config.with_moe(moe)).moe_layers()
    for layer in layers.values():
        check_layer(layer, moe, dense.config.intermediate_size)
    check_donors(moe, [other.config == dense.config for other in experts], "its shape differs")
    if moe.router_prompts:
        raise ConfigError(
            "moe.router_prompts needs a Hugging Face base", "Leave it away: the gate then starts at random."
        )


def _layout(dense: Decoder, number: int) -> Layout:
    source = dense.layers[number].mlp
    assert isinstance(source, GatedMLP)
    return source.stacked_layout()

"""What training would refuse, told before it starts: its own rules, asked of the model without its weights.

What needs the weights of a base (damaged ones, donors of another shape) is told only when it is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.models.language_model import LanguageModel
from moectl.moe.filling import check_layer, on_cpu
from moectl.planning.anatomy import Shape, on_meta
from moectl.training import finetune
from moectl.training.diagnose import refuse_false_claims, refuse_untrainable
from moectl.training.schedules import refuse_unfit
from moectl.walk.bases import FoundBase, find_base
from moectl.walk.models import refuse_experts_from_nothing, resolve_init

LARGEST_GATE = 2**28  # numbers of a gate that is drawn to be asked: a GB


def refuse_untrainable_config(
    config: ExperimentConfig, shape: Shape, base: FoundBase, say: Callable[[str], None] = lambda text: None
) -> None:
    """Raise where :func:`moectl.walk.models.build_model` or the trainer would.

    Args:
        config: as :func:`moectl.walk.models.on_base` returns it.
        shape: of its model, experts included.
        base: that it starts from.
        say: takes a sentence where a gate is too large to be drawn.

    Raises:
        ConfigError, CheckError, NotFoundError: as training.
    """
    moe, model = config.moe, on_meta(shape)
    if moe is not None:
        gate = next(iter(model.moe_layers().values())).router.weight.numel()
        if gate > LARGEST_GATE:
            say(f"a gate of {gate:,} numbers is not drawn here: whether its router can be trained is not checked")
            return
        for layer in model.moe_layers().values():
            layer.router = on_cpu(layer.router)
        if base.moe is None:
            _refuse_start(model, resolve_init(moe, trained=base.kind != "scratch"), shape.intermediate_size, base)
        refuse_unfit(moe.schedule, model.moe_layers())
    if config.finetune.lora is None:  # adapters compute as soon as they are added, and here is nothing to compute
        finetune.apply(model, config.finetune)
    refuse_untrainable(model, config.train.allow_noncausal)
    with torch.random.fork_rng(devices=[]):
        for number, layer in list(model.moe_layers().items())[:1]:  # they are alike
            refuse_false_claims(number, layer.router)


def _refuse_start(model: LanguageModel, moe: MoEConfig, dense_size: int, base: FoundBase) -> None:
    """Experts that cannot come out of the dense model."""
    refuse_experts_from_nothing(moe, base)
    for name in moe.experts_from:
        find_base(name, weights=False)
    for layer in model.moe_layers().values():
        check_layer(layer, moe, dense_size)

"""What a run's speed is measured against: the FLOPs of its model, and what its device can do at most."""

from __future__ import annotations

from moectl.config.schema import TrainConfig
from moectl.models.accounting import BACKWARD, forward_flops
from moectl.models.language_model import LanguageModel
from moectl.planning.devices import peak_rate
from moectl.training.precision import Precision
from moectl.training.runtime import resolve_device
from moectl.training.timing import Yardstick
from moectl.walk.receipt import shape_of


def yardstick(model: LanguageModel, train: TrainConfig, *, length: int) -> Yardstick:
    """Of a model that trains on rows of ``length`` tokens.

    Its FLOPs are those of the parameters that a token uses, forward and backward; what activation checkpointing
    computes again is not counted, nor is it taken off where parameters are frozen. A CPU's peak is measured, which
    takes a fifth of a second.

    Raises:
        MissingDependencyError: a device that this machine has not.
    """
    device = resolve_device(train.device)
    flops = forward_flops(shape_of(model), model.moe_layers().values(), length=length)
    peak, about = peak_rate(device, Precision(train.precision, device).name)
    return Yardstick(flops.total * (1 + BACKWARD), peak, about)

"""In which numbers a run computes: the dtype of weights and of products, and the scale of a float16 loss.

================ ============= ============ ==========================================================
name             weights       products     what else
================ ============= ============ ==========================================================
float32          float32       float32      (float64: float64 throughout)
bfloat16         float32       bfloat16     autocast
bfloat16-pure    bfloat16      bfloat16     float32 masters and moments in the optimizer
float16          float32       float16      autocast; the loss scaled, and a step whose gradient overflows
                                            skipped (Micikevicius et al. 2017, arXiv:1710.03740)
================ ============= ============ ==========================================================

Routers (weights, arithmetic, biases) and losses are float32 in all of them, float64 in a float64 run. On a CPU
without bfloat16 instructions both bfloat16 modes are computed in float32: emulated, they take many times as long.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moectl.models.language_model import LanguageModel
from moectl.moe.products import cpu_has_bfloat16
from moectl.moe.router import Router

LOWEST_SCALE = 1.0
"""A float16 step that overflows even at this scale of the loss is no matter of scale."""

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = {"float64": torch.float64, "bfloat16-pure": torch.bfloat16}


class Precision:
    """One run's precision on one device.

    Args:
        asked: ``train.precision``.
        device: where the run computes.

    Attributes:
        name: what is computed; not what was asked for where the device has no instructions for it.
        warning: why not, or what to expect, in a sentence for people; None where there is nothing to say.
        weights: dtype of the model's parameters, but for routers.
        scaler: of the loss; None but for float16.
    """

    def __init__(self, asked: str, device: torch.device) -> None:
        self.device = device
        self.name, self.warning = _effective(asked, device)
        self.weights = _WEIGHTS.get(self.name, torch.float32)
        self.scaler = torch.amp.GradScaler(device.type) if self.name == "float16" else None

    def context(self) -> AbstractContextManager[object]:
        """Around a forward pass: autocast, or nothing."""
        dtype = _AUTOCAST.get(self.name)
        return nullcontext() if dtype is None else torch.autocast(device_type=self.device.type, dtype=dtype)

    def place(self, model: LanguageModel, *, accumulated: bool) -> Any:
        """The model on the device, its parameters in this precision; routers' in float32 or above.

        Args:
            accumulated: gradients of several micro-batches are summed: bfloat16 weights then get float32 gradients,
                since a sum in bfloat16 stops growing after some hundreds of terms.
        """
        if self.weights != torch.bfloat16:
            return model.to(self.device, self.weights)
        model.to(self.device, torch.float32)
        routed = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in routed:
                parameter.data = parameter.data.to(self.weights)  # buffers stay: rotation tables are exact
                if accumulated:
                    parameter.grad_dtype = torch.float32
        return model

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, scaled where there is a scaler."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Gradients as they would be without a scale: before their norm is taken."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def overflowed(self) -> float | None:
        """To be asked about a gradient that is not finite: the scale from the next step on, where it was too large
        and the step is to be skipped; None where the scale is not what made the gradient so.
        """
        if self.scaler is None:
            return None
        before = float(self.scaler.get_scale())
        self.scaler.update()
        after = float(self.scaler.get_scale())
        return after if LOWEST_SCALE <= after < before else None

    def fine(self) -> None:
        """The step's gradients were finite: after enough of them the scale grows, from the next step on."""
        if self.scaler is not None:
            self.scaler.update()


def _effective(asked: str, device: torch.device) -> tuple[str, str | None]:
    if device.type != "cpu" or asked in ("float32", "float64"):
        return asked, None
    if asked == "float16":
        return asked, "float16 on a CPU is for trying things out: it is slower than float32"
    if cpu_has_bfloat16():
        return asked, None
    return "float32", (
        f"this CPU has no bfloat16 instructions: the run computes in float32 instead of {asked}, which would be"
        " many times slower here"
    )

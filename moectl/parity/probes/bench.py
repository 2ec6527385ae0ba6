"""What probes make their cases from: a family's config, random weights for it, random inputs.

Everything is drawn from the seed in float64 and then rounded, so that the same probe asks the same
question in every dtype.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, Level, Unsupported, Weights
from moectl.parity.families import formula_of, random_weights, weight_shapes
from moectl.parity.formula import Formula
from moectl.parity.routes import CHOICE_BIAS

BATCH, LENGTH = 2, 12
#: Labels that are not scored, as Hugging Face marks them.
IGNORED = -100


@dataclass
class Bench:
    """One family, component and dtype.

    Attributes:
        family: name.
        level: component.
        config: the family's config, in the form of config.json.
        seed: of weights and inputs.
        dtype: of both.
        given: weights of a checkpoint, in place of random ones; probes cannot then change the model's shape.
    """

    family: str
    level: Level
    config: dict[str, Any]
    seed: int = 0
    dtype: torch.dtype = torch.float64
    given: Weights | None = None
    _drawn: dict[str, Weights] = field(default_factory=dict, repr=False)

    @property
    def formula(self) -> Formula:
        return formula_of(self.family, self.config)

    def changed(self, **changes: Any) -> Bench:
        """The same bench with another config."""
        return replace(self, config={**self.config, **changes})

    def weights(self) -> Weights:
        """For this config; drawn once.

        Raises:
            Unsupported: the checkpoint's weights do not fit the config of the probe.
        """
        formula = self.formula
        shapes = weight_shapes(formula, self.level, self.layer)
        if self.given is not None:
            if {name: tuple(tensor.shape) for name, tensor in self.given.items()} != shapes:
                raise Unsupported("the checkpoint's weights fix what this probe would change")
            return self.given
        key = json.dumps([self.config, self.level, self.seed, str(self.dtype)], sort_keys=True, default=str)
        if key not in self._drawn:
            exact = random_weights(formula, self.level, seed=self.seed, dtype=torch.float64, layer=self.layer)
            self._drawn[key] = {name: tensor.to(self.dtype) for name, tensor in exact.items()}
        return self._drawn[key]

    @property
    def layer(self) -> int:
        """Which layer a lone component stands for: the first with experts."""
        return self.formula.moe_layers[0] if self.formula.moe_layers else 0

    def router_names(self, weights: Weights) -> list[str]:
        """The routers' weight matrices, ``[E, D]``.

        Raises:
            Unsupported: a component without a router.
        """
        shape = (self.formula.router.num_experts, self.formula.experts.hidden_size)
        names = [
            name
            for name, tensor in weights.items()
            if tensor.shape == shape and (name == "weight" or name.endswith(("gate.weight", "router.weight")))
        ]
        if not names:
            raise Unsupported("there is no router in it")
        return names

    def with_routers(self, change: Callable[[Tensor], Tensor], *, biases: bool = False) -> Weights:
        """The weights with every router's matrix ``[E, D]`` changed, in float64.

        Args:
            change: from the old matrix to the new one.
            biases: give the routers' vectors ``[E]`` to ``change`` too, as ``[E, 1]``.
        """
        weights = dict(self.weights())
        for name in self.router_names(weights):
            weights[name] = change(weights[name].double()).to(self.dtype).contiguous()
            for vector in (name.removesuffix("weight") + suffix for suffix in ("bias", CHOICE_BIAS) if biases):
                if vector in weights:
                    column_E1 = change(weights[vector].double()[:, None])
                    weights[vector] = column_E1[:, 0].to(weights[vector].dtype).contiguous()
        return weights

    def inputs(
        self, *, batch: int = BATCH, length: int = LENGTH, padding: str = "", steady: float = 0.0, alike: bool = False
    ) -> Inputs:
        """Random inputs for the component.

        Args:
            batch: rows.
            length: of each; a router gets ``batch · length`` tokens.
            padding: ``"left"`` or ``"right"``: rows of unequal length, the first of them whole.
            steady: value of the first hidden feature in every token, to steer a router by; 0: random too.
            alike: every token the same.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        mask_BS = _mask(batch, length, padding)
        if self.level == "model":
            ids_BS = torch.randint(1, self.formula.vocab_size, (batch, length), generator=generator)
            ids_BS = ids_BS[:1, :1].expand(batch, length).contiguous() if alike else ids_BS
            return Inputs(input_ids=ids_BS, attention_mask=mask_BS, labels=_labels(ids_BS, mask_BS))
        formula = self.formula
        width = formula.experts.hidden_size
        hidden_BSD = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
        shape = (batch * length, formula.router.num_experts) if self.level == "router" else hidden_BSD.shape
        # Gradients of weights sum over tokens: this keeps them at the size of one.
        cotangent = torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(batch * length)
        if alike:
            hidden_BSD = hidden_BSD[:1, :1].expand(batch, length, width).contiguous()
        if steady:
            hidden_BSD[..., 0] = steady
        if mask_BS is not None:
            cotangent = cotangent * mask_BS[..., None]  # what a padding token gives reaches nobody
        return Inputs(hidden=hidden_BSD.to(self.dtype), cotangent=cotangent.to(self.dtype), attention_mask=mask_BS)

    def case(self, probe: str, inputs: Inputs | None = None, **fields: Any) -> Case:
        """A case of this bench: its weights, its base inputs, gradients wanted, unless told otherwise."""
        fields.setdefault("weights", None)
        weights = fields.pop("weights")
        return Case(
            probe=probe,
            level=self.level,
            config=self.config,
            weights=self.weights() if weights is None else weights,
            inputs=self.inputs() if inputs is None else inputs,
            dtype=self.dtype,
            **fields,
        )


def _labels(ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor | None:
    """The ids, without one in the first row, padding, and what a padding token would have to predict.

    None where no token has a next.
    """
    if ids_BS.shape[1] < 2:
        return None
    labels_BS = ids_BS.clone()
    if ids_BS.shape[1] > 3:
        labels_BS[0, 2] = IGNORED
    if mask_BS is not None:
        after_padding_BS = ~mask_BS.roll(1, dims=1)
        after_padding_BS[:, 0] = False
        labels_BS = labels_BS.masked_fill(~mask_BS | after_padding_BS, IGNORED)
    return labels_BS


def _mask(batch: int, length: int, padding: str) -> Tensor | None:
    """``[B, S]`` bool: row b has ``3 b`` tokens of padding, and one real token at least."""
    if not padding:
        return None
    short_B1 = (3 * torch.arange(batch)).clamp(max=length - 1)[:, None]
    places_S = torch.arange(length)
    return places_S >= short_B1 if padding == "left" else places_S < length - short_B1

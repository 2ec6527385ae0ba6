"""Small cases for the parity tests: random weights and inputs of a family's component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moectl.parity.case import Case, Inputs, Level
from moectl.parity.families import config_of, formula_of, random_weights

LEFT = torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])


def case(
    family: str,
    level: Level,
    changed: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    shape: tuple[int, int] = (2, 9),
    **inputs: Any,
) -> Case:
    """The tiny config with ``changed`` keys, and inputs with labels or a cotangent, ``inputs`` replaced."""
    config = config_of(family, "tiny") | dict(changed or {})
    weights = random_weights(formula_of(family, config), level, seed=seed, dtype=dtype)
    given = inputs_of(config, level, dtype=dtype, seed=seed, shape=shape)
    return Case("test", level, config, weights, given._replace(**inputs), dtype=dtype)


def inputs_of(
    config: Mapping[str, Any], level: Level, *, dtype: torch.dtype, seed: int = 0, shape: tuple[int, int] = (2, 9)
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    if level == "model":
        input_ids = torch.randint(config["vocab_size"], shape, generator=generator)
        labels = input_ids.clone()
        labels[0, -1] = -100
        return Inputs(input_ids=input_ids, labels=labels)
    hidden = torch.randn(*shape, config["hidden_size"], generator=generator, dtype=dtype)
    wide = hidden.shape
    if level == "router":
        wide = torch.Size((shape[0] * shape[1], 8))
    return Inputs(hidden=hidden, cotangent=torch.randn(wide, generator=generator, dtype=dtype))


def with_inputs(case: Case, **inputs: Any) -> Case:
    return replace(case, inputs=case.inputs._replace(**inputs))


def worst(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Each tensor's largest difference over max(1, its largest value); names and shapes must be the same."""
    assert set(reference) == set(other)
    return {name: error(reference[name], other[name]) for name in reference}


def error(reference: Tensor, other: Tensor) -> float:
    assert reference.shape == other.shape
    scale = max(1.0, float(reference.double().abs().max()))
    return float((reference.double() - other.double()).abs().max()) / scale

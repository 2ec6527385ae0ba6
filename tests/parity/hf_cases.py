"""Cases of tiny components, and models that transformers builds and runs without moectl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moectl.hf.family import FAMILIES
from moectl.parity.case import Case, Inputs, Level
from moectl.parity.families import config_of, formula_of, random_weights

EVERY = sorted(FAMILIES)
WHOLE = [name for name in EVERY if not FAMILIES[name].without]
COMPONENTS = [
    (name, level)
    for name in EVERY
    for level in ("model", "layer", "moe", "attention", "router")
    if level not in FAMILIES[name].without
]


def tiny_case(
    family: str,
    level: Level,
    *,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    length: int = 9,
    **fields: Any,
) -> Case:
    """A case with random weights and inputs; ``inputs`` in ``fields`` replaces some of them."""
    config = {**config_of(family, "tiny"), **(config or {})}
    formula = formula_of(family, config)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = formula.experts.hidden_size
    if level == "model":
        ids = torch.randint(formula.vocab_size, (batch, length), generator=generator)
        inputs = Inputs(input_ids=ids, labels=ids)
    elif level == "router":
        tokens = batch * length
        inputs = Inputs(hidden=normal(tokens, hidden), cotangent=normal(tokens, formula.router.num_experts))
    else:
        inputs = Inputs(hidden=normal(batch, length, hidden), cotangent=normal(batch, length, hidden))
    inputs = inputs._replace(**fields.pop("inputs", {}))
    weights = fields.pop("weights", None) or random_weights(formula, level, seed=5, dtype=dtype)
    return Case("test", level, config, weights, inputs, dtype, **fields)


def bare_model(case: Case) -> Any:
    """The model as a user of transformers makes it: no meta device, weights copied, nothing listens."""
    config = CONFIG_MAPPING[case.config["model_type"]].from_dict(case.config)
    model = AutoModelForCausalLM.from_config(
        config, dtype=case.dtype, attn_implementation="eager", experts_implementation="eager"
    )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing, unexpected = model.load_state_dict(dict(case.weights), strict=False)
    assert set(missing) <= tied and not unexpected
    return model.train(case.training)

"""The listening attention and its masks against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from moectl.hf.attention import causal_mask, document_mask, listened, new_cache
from moectl.hf.build import build, config_object
from moectl.hf.family import FAMILIES
from tests.parity.hf_cases import WHOLE, bare_model, tiny_case

PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 0, 1]])
DOCS = torch.tensor([[4, 4, 4, 4, 9, 9, 9, 9, 9], [0, 0, 1, 1, 1, 1, 1, 4, 4]])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_are_masked_as_transformers_masks_packed_positions(name: str, dtype: torch.dtype) -> None:
    config = config_object(FAMILIES[name], tiny_case(name, "router").config)
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(2, 9, 32, dtype=dtype),
        attention_mask=None,
        past_key_values=None,
        position_ids=PLACES,
    )
    assert torch.equal(document_mask(DOCS, None, dtype), theirs)
    assert not torch.equal(document_mask(torch.zeros_like(DOCS), None, dtype), theirs)


def test_padding_is_masked_with_and_without_documents_alike() -> None:
    config = config_object(FAMILIES["qwen3"], tiny_case("qwen3", "router").config)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    hidden = torch.zeros(2, 9, 32)
    padded = causal_mask(config, hidden, real)
    assert torch.equal(padded, document_mask(torch.zeros_like(DOCS), real, torch.float32))
    assert (padded[0, 0, :, :2] == torch.finfo(torch.float32).min).all()
    ready = document_mask(DOCS, None, torch.float32)
    assert causal_mask(config, hidden, ready) is ready


def test_the_listener_is_told_what_eager_attention_is_given_and_the_outcome_is_eagers() -> None:
    case = tiny_case("qwen3", "model", dtype=torch.float32)
    model = build(FAMILIES["qwen3"], "model", case.config, case.weights, dtype=torch.float32)
    told: list[tuple[int, ...]] = []
    cache = new_cache(model.config)
    assert case.inputs.input_ids is not None
    with listened(model.config, lambda module, q, k: told.append((module.layer_idx, *q.shape, *k.shape))):
        watched = model(case.inputs.input_ids[:, :4], past_key_values=cache, use_cache=True).logits
        model(case.inputs.input_ids[:, 4:5], past_key_values=cache, use_cache=True)
    assert told[:3] == [(layer, 2, 4, 4, 8, 2, 2, 4, 8) for layer in range(3)]
    assert told[3:] == [(layer, 2, 4, 1, 8, 2, 2, 5, 8) for layer in range(3)]
    model(case.inputs.input_ids)
    assert len(told) == 6
    assert torch.equal(watched, bare_model(case)(case.inputs.input_ids[:, :4]).logits)

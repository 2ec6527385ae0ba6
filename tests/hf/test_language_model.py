"""A transformers model behind moectl's language-model protocol: the same logits, and documents kept apart."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from moectl.config import MoEConfig
from moectl.hf import upcycle
from moectl.hf.language_model import HFLanguageModel, document_positions
from moectl.models.language_model import LanguageModel
from tests.hf.tiny_models import KINDS, VOCABULARY, left_padding, some_ids, tiny

# transformers computes norms and rotations in float32, also in a float64 model.
ROUNDING = 1e-5


def wrapped(kind: str, *, experts: bool, **changes: object) -> HFLanguageModel:
    model = tiny(kind, **changes)
    if experts:
        moe = MoEConfig(num_experts=4, layers="last:2", init="copy", init_noise=0.3)
        upcycle(model, moe, generator=torch.Generator().manual_seed(0))
    return HFLanguageModel(model).eval()


def packed() -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Two rows of three documents each, one of them a single token."""
    ids, docs = some_ids(2, 17), torch.zeros(2, 17, dtype=torch.int64)
    docs[:, 6:7], docs[:, 7:] = 1, 2
    return ids, docs, [slice(0, 6), slice(6, 7), slice(7, 17)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [False, True])
def test_single_documents_have_the_plain_models_logits(kind: str, experts: bool) -> None:
    model = wrapped(kind, experts=experts)
    assert isinstance(model, LanguageModel)
    with torch.no_grad():
        plain = model.model(some_ids()).logits
        assert torch.equal(model(some_ids()), plain)
        assert torch.equal(model(some_ids(), torch.zeros(3, 17, dtype=torch.int64)), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_each_alone(kind: str, experts: bool, attention: str) -> None:
    model = wrapped(kind, experts=experts, attn_implementation=attention)
    ids, docs, parts = packed()
    with torch.no_grad():
        together = model(ids, docs)
        for part in parts:
            torch.testing.assert_close(together[:, part], model(ids[:, part]), rtol=0, atol=ROUNDING)
        changed = ids.clone()
        changed[:, :6] = (changed[:, :6] + 1) % VOCABULARY
        unseen = model(changed, docs)[:, 6:]  # experts with another number of rows round differently
        torch.testing.assert_close(unseen, together[:, 6:], rtol=0, atol=1e-12)
        assert not torch.equal(model(changed)[:, 6:], model(ids)[:, 6:]), "the test would see nothing"


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "qwen2"])
def test_sliding_windows_count_within_a_document(kind: str) -> None:
    window = {
        "gpt2": {},
        "mistral": {"sliding_window": 4},
        "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    }[kind]
    model = wrapped(kind, experts=True, **window)
    ids, docs, parts = packed()
    with torch.no_grad():
        together = model(ids, docs)
        for part in parts:
            torch.testing.assert_close(together[:, part], model(ids[:, part]), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_docs", [False, True])
def test_padding_is_neither_seen_nor_routed(kind: str, with_docs: bool) -> None:
    model = wrapped(kind, experts=True)
    ids, mask = left_padding()
    real = mask.bool()
    docs = torch.zeros_like(ids) if with_docs else None
    with torch.no_grad():
        out = model(ids, docs, real)
        for layer in model.moe_layers().values():
            assert layer.token_mask is not None
            assert torch.equal(layer.token_mask, real.flatten())
        for row in range(3):
            alone = model(ids[row][real[row]][None])
            torch.testing.assert_close(out[row][real[row]], alone[0], rtol=0, atol=ROUNDING)
    dense = wrapped(kind, experts=False)
    assert dense(ids, docs, real).isfinite().all()


def test_positions_restart_with_documents_and_padding() -> None:
    docs = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    assert document_positions(docs).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    real = torch.tensor([[False, True, True, True, True, True, False, False]])
    assert document_positions(docs, real).tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_cross_entropy_of_the_logits_with_its_gradients(kind: str) -> None:
    model = wrapped(kind, experts=True)
    ids, docs, _ = packed()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1).masked_fill(torch.arange(17) == 5, -100)
    loss = model.lm_loss_sum(ids, labels, docs)
    slow = F.cross_entropy(model(ids, docs).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=0)
    fast, exact = (torch.autograd.grad(each, list(model.parameters()), allow_unused=True) for each in (loss, slow))
    for mine, theirs in zip(fast, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_transformers_own(kind: str) -> None:
    model = wrapped(kind, experts=True)
    model.model.config.eos_token_id = model.model.generation_config.eos_token_id = None
    theirs = model.model.generate(some_ids(2, 5), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(some_ids(2, 5), 6), theirs)
    sampled = [
        model.generate(some_ids(2, 5), 6, temperature=1.0, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    ]
    assert torch.equal(*sampled)
    assert not torch.equal(sampled[0], theirs)


def test_generation_ends_at_the_end_of_text() -> None:
    model = wrapped("llama", experts=False)
    free = model.generate(some_ids(1, 5), 6)
    model.model.config.eos_token_id = [int(free[0, 7]), 3]
    assert model.eos_token_id == free[0, 7]
    ended = model.generate(some_ids(1, 5), 6)
    assert ended.shape[1] <= 8
    assert torch.equal(ended, free[:, : ended.shape[1]])


def test_what_cannot_be_is_refused() -> None:
    model = wrapped("gpt2", experts=False)
    assert (model.kind, model.max_length, model.vocab_size, model.eos_token_id) == ("hf", 64, VOCABULARY, 1)
    with pytest.raises(ValueError, match="64 positions, not 65"):
        model(some_ids(1, 65))
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="cached decoding"):
        model(some_ids(), torch.zeros(3, 17, dtype=torch.int64), cache=cache)
    with torch.no_grad():
        model(some_ids(1, 60), cache=cache)
    with pytest.raises(ValueError, match="64 positions, not 65"):
        model(some_ids(1, 5), cache=cache)

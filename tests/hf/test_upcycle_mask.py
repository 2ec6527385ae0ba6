"""Which tokens are real reaches the experts: in plain calls, generation, checkpointing, and in copies of a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from moectl.config import MoEConfig
from moectl.hf import upcycle
from moectl.hf.upcycle import real_tokens
from moectl.moe import MoELayer
from tests.hf.tiny_models import KINDS, left_padding, some_ids, tiny


def upcycled(kind: str, *, noise: float = 0.3, **router: object) -> Any:
    moe = MoEConfig.model_validate(
        {"num_experts": 4, "layers": "all", "init": "copy", "init_noise": noise, "router": {"name": "top1", **router}}
    )
    return upcycle(tiny(kind), moe, generator=torch.Generator().manual_seed(0))


def layers_of(model: Any) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_not_routed(kind: str) -> None:
    model, (ids, mask) = upcycled(kind), left_padding()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for layer in layers_of(model):
        assert layer.token_mask is not None
        assert torch.equal(layer.token_mask, mask.bool().flatten())
        assert layer.routing is not None
        assert layer.routing.keep is not None
        assert torch.equal(layer.routing.keep[:, 0], mask.bool().flatten())
    with torch.no_grad():  # positionally to the backbone, and then without a mask: none is left over
        backbone = model.transformer if kind == "gpt2" else model.model
        backbone(ids, *([None] if kind == "gpt2" else []), mask)
        assert torch.equal(layers_of(model)[0].token_mask, mask.bool().flatten())  # type: ignore[arg-type]
        model(ids)
    assert all(layer.token_mask is None for layer in layers_of(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "static"])
def test_padding_is_not_routed_in_cached_generation(kind: str, cache: str | None) -> None:
    """Padded rows continue as each does alone, and in no step a layer sees a padding token as real."""
    model, (ids, mask) = upcycled(kind), left_padding()
    seen: list[torch.Tensor] = []
    layer = layers_of(model)[1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(layer.token_mask.clone()))  # type: ignore[union-attr]
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)
    handle.remove()
    assert torch.equal(seen[0], mask.bool().flatten())
    assert len(seen) == 5
    assert all(step.shape == (3,) and step.all() for step in seen[1:])
    for row, keep in zip(range(3), mask.bool(), strict=True):
        alone = model.generate(ids[row][keep][None], **options)
        assert torch.equal(alone[0], together[row][17 - int(keep.sum()) :])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_with_the_mask_of_its_own_call(kind: str) -> None:
    """Two calls of different masks before one backward: gradients as without checkpointing."""
    ids, mask = left_padding()
    gradients = []
    for checkpointing in (False, True):
        model = upcycled(kind, noise_std=0.0).train()
        if kind == "gpt2":
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(module, MoELayer):
                    module.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        targets = ids.masked_fill(mask == 0, -100)
        loss = model(ids, attention_mask=mask, labels=targets, use_cache=False).loss
        reached = sum(layer.routing.topk_weights.sum() for layer in layers_of(model))  # type: ignore[union-attr]
        loss = loss + 0.1 * reached + model(some_ids(2, 9), labels=some_ids(2, 9), use_cache=False).loss
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.any() for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-12)


def test_a_copy_of_the_model_hands_the_mask_to_its_own_layers() -> None:
    model, (ids, mask) = upcycled("llama"), left_padding()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied(ids, attention_mask=mask)
    assert all(layer.token_mask is None for layer in layers_of(model))
    assert torch.equal(layers_of(copied)[0].token_mask, mask.bool().flatten())  # type: ignore[arg-type]
    assert not set(map(id, layers_of(model))) & set(map(id, layers_of(copied)))


def test_real_tokens_of_every_form_of_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert real_tokens(mask, 2, 2).tolist() == [[True, True], [True, True]]  # type: ignore[union-attr]
    assert real_tokens(mask, 4, 0).tolist() == mask.bool().tolist()  # type: ignore[union-attr]
    causal = torch.ones(4, 6, dtype=torch.bool).tril() & torch.nn.functional.pad(mask, (0, 2)).bool()[:, None, None]
    assert real_tokens(causal, 4, 0).tolist() == mask.bool().tolist()  # type: ignore[union-attr]
    added = torch.zeros(2, 1, 4, 6).masked_fill(~causal, -1e9)
    assert real_tokens({"full_attention": added}, 4, 0).tolist() == mask.bool().tolist()  # type: ignore[union-attr]
    assert real_tokens(causal[:, :, 3:], 1, 3).tolist() == [[True], [True]]  # type: ignore[union-attr]
    assert real_tokens(None, 4, 0) is None
    assert real_tokens({"sliding_attention": added}, 4, 0) is None

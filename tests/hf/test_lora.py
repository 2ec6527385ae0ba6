"""LoRA on whole models: an unchanged start, the count, merging, and the same numbers as peft's own stacked adapters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moectl.config.finetuning import FinetuneConfig, LoraConfig
from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.hf import upcycle
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.lora import add_adapters, has_adapters, linear_targets, merge, merged
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.moe.low_rank import adapters_of
from moectl.training.finetune import apply
from tests.hf.tiny_models import some_ids, tiny
from tests.support import tiny_shape

peft = pytest.importorskip("peft")
MOE = {"num_experts": 4, "router": {"name": "topk", "top_k": 2}}


def own(**moe: object) -> LanguageModel:
    torch.manual_seed(0)
    config = MoEConfig.model_validate({**MOE, "init": "random", "layers": "all", **moe})
    return Decoder(tiny_shape(61, config)).double().eval()


def of_transformers(kind: str) -> LanguageModel:
    settings = MoEConfig.model_validate({**MOE, "layers": "1,2", "init": "copy", "init_noise": 0.1})
    return HFLanguageModel(upcycle(tiny(kind), settings)).eval()


MODELS: dict[str, Callable[[], LanguageModel]] = {
    "decoder": lambda: own(layers="1"),
    "decoder, shared experts": lambda: own(n_shared_experts=1),
    "gpt2": lambda: of_transformers("gpt2"),
    "llama": lambda: of_transformers("llama"),
    "qwen2": lambda: of_transformers("qwen2"),
    "qwen3": lambda: of_transformers("qwen3"),
}
ALL = LoraConfig.model_validate({"rank": 3, "alpha": 5, "targets": "attention,mlp,experts"})


def stir(model: LanguageModel) -> None:
    """Adapters as training leaves them: both factors away from zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_the_start_is_the_base_exactly_and_merging_keeps_the_function(name: str) -> None:
    model, ids = MODELS[name](), some_ids()
    base = model(ids)
    names = set(model.state_dict())
    add_adapters(model, ALL)
    assert torch.equal(model(ids), base)
    stir(model)
    adapted = model(ids)
    assert float((adapted - base).detach().abs().max()) > 1e-3
    plain = merged(model)
    # Float64: `x·Wᵀ + s·(x·Aᵀ)·Bᵀ` and `x·(W + s·B·A)ᵀ` differ in their rounding alone.
    torch.testing.assert_close(plain(ids), adapted, rtol=0, atol=1e-10)
    assert set(plain.state_dict()) == names and not has_adapters(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(layer.router.frozen for layer in plain.moe_layers().values())
    assert has_adapters(model) and torch.equal(model(ids), adapted)
    assert merged(plain) is plain and merge(plain) is plain


@pytest.mark.parametrize("name", MODELS)
def test_the_backward_reaches_the_adapters_and_nothing_else(name: str) -> None:
    model, ids = MODELS[name](), some_ids()
    add_adapters(model, ALL)
    stir(model)
    model.train()
    for layer in model.moe_layers().values():
        layer.experts.accumulate_gradients_in_place()
    model.lm_loss_sum(ids[:, :-1], ids[:, 1:]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in parameter_name), parameter_name
        assert parameter.grad is None or bool(parameter.grad.any()), parameter_name


# Width 32; llama: queries 32, keys and values 16 columns, MLP 48; GPT-2: c_attn 96 columns, MLP 128. Rank 3.
ATTENTION = {"llama": 3 * ((32 + 32) * 2 + (32 + 16) * 2) * 3, "gpt2": 3 * ((32 + 96) + (32 + 32)) * 3}
MLP = {"llama": 3 * (2 * (32 + 48) + (48 + 32)), "gpt2": 3 * ((32 + 128) + (128 + 32))}
EXPERTS = {
    "llama": 2 * 4 * 3 * ((32 + 96) + (48 + 32)),
    "gpt2": 2 * 4 * 3 * ((32 + 128) + (128 + 32)),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["attention", "experts", "mlp", "attention,experts"])
def test_what_trains_is_counted_by_hand(kind: str, targets: str) -> None:
    model = of_transformers(kind)
    report = apply(model, FinetuneConfig.model_validate({"lora": {"rank": 3, "targets": targets}}))
    sizes = {"attention": ATTENTION[kind], "mlp": MLP[kind], "experts": EXPERTS[kind]}
    assert report.found == report.asked["adapters"] == sum(sizes[target] for target in targets.split(","))


def test_routers_may_train_beside_adapters() -> None:
    frozen, free = own(), own()
    apply(frozen, FinetuneConfig.model_validate({"lora": 2}))
    report = apply(free, FinetuneConfig.model_validate({"lora": {"rank": 2, "train_router": True}}))
    assert report.asked["router"] == 2 * 4 * 16
    assert all(layer.router.frozen for layer in frozen.moe_layers().values())
    assert not any(layer.router.frozen for layer in free.moe_layers().values())
    assert all(layer.router.weight.requires_grad for layer in free.moe_layers().values())


def test_heads_embeddings_and_routers_have_no_adapters() -> None:
    model = own(router={"name": "noisy-topk"})
    names = linear_targets(model, ALL)
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("lora", "moe", "message"),
    [
        ({"targets": "mlp"}, True, "mlp has no effect"),
        ({"targets": "experts"}, False, "the model is dense"),
        ({"targets": "attention,experts"}, False, "the model is dense"),
    ],
)
def test_a_target_that_is_not_there_is_refused(lora: dict[str, str], moe: bool, message: str) -> None:
    model = own() if moe else Decoder(tiny_shape(61, None))
    with pytest.raises(ConfigError, match=message):
        add_adapters(model, LoraConfig.model_validate(lora))


def test_adapters_on_adapters_are_refused() -> None:
    model = own()
    add_adapters(model, LoraConfig())
    with pytest.raises(ConfigError, match="adapters already"):
        add_adapters(model, LoraConfig())


def test_dropout_is_in_training_only() -> None:
    model, ids = own(), some_ids()
    add_adapters(model, LoraConfig(dropout=0.5, targets=("attention",)))
    stir(model)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_stacked_adapters_are_those_of_peft() -> None:
    """peft's ``target_parameters`` on the same experts, with the same factors: the same logits and gradients."""
    ours, theirs, ids = own(), own(), some_ids()
    add_adapters(ours, LoraConfig(rank=3, alpha=6, targets=("experts",)))
    stir(ours)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    peft.inject_adapter_in_model(config, theirs)
    pairs = []
    for number, layer in ours.moe_layers().items():
        wrapper = theirs.layers[number].mlp.experts  # type: ignore[attr-defined]
        while hasattr(wrapper, "parameter_name"):
            adapter = adapters_of(layer.experts)[wrapper.parameter_name]
            factor_A, factor_B = wrapper.lora_A.default.weight, wrapper.lora_B.default.weight
            # peft: A is [E·R, I] expert by expert, B is [O, R·E] with the expert changing fastest.
            with torch.no_grad():
                factor_A.copy_(adapter.lora_A.reshape(factor_A.shape))
                factor_B.copy_(adapter.lora_B.permute(1, 2, 0).reshape(factor_B.shape))
            pairs.append((adapter, factor_A, factor_B))
            wrapper = wrapper.base_layer
    assert len(pairs) == 4
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=0, atol=1e-12)
    for model in (ours, theirs):
        model.lm_loss_sum(ids[:, :-1], ids[:, 1:]).backward()
    for adapter, factor_A, factor_B in pairs:
        assert adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
        torch.testing.assert_close(adapter.lora_A.grad.reshape(factor_A.shape), factor_A.grad, rtol=1e-9, atol=1e-11)
        grad_B = adapter.lora_B.grad.permute(1, 2, 0).reshape(factor_B.shape)
        torch.testing.assert_close(grad_B, factor_B.grad, rtol=1e-9, atol=1e-11)


def test_peft_puts_something_else_in_the_experts_place() -> None:
    """Why it does not serve the stacked parameters here; should this ever fail, it may."""
    model = own()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    peft.inject_adapter_in_model(config, model)
    wrapper = model.layers[0].mlp.experts  # type: ignore[attr-defined]
    assert not isinstance(wrapper, type(own().moe_layers()[0].experts))
    assert not hasattr(wrapper, "backend") and not hasattr(wrapper, "stacked")

"""A Hugging Face model's MLPs replaced by experts: the same function, and everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from moectl.config import MoEConfig
from moectl.errors import ConfigError
from moectl.hf import upcycle
from moectl.hf.exact import exact_copy
from moectl.hf.language_model import HFLanguageModel
from moectl.moe import MoELayer
from tests.hf.tiny_models import KINDS, some_ids, tiny

TOPK = {"name": "topk", "top_k": 2}


def config(**changes: object) -> MoEConfig:
    values: dict[str, object] = {"num_experts": 4, "layers": "last:2", "init": "copy", "init_noise": 0.0}
    return MoEConfig.model_validate({**values, **changes})


def logits(model: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """In eval; in a copy of another dtype, if asked, whose norms are that exact too."""
    asked: Any = HFLanguageModel(model)
    with torch.no_grad():
        return (asked if dtype is None else exact_copy(asked, dtype))(some_ids())


def experts_of(model: Any) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_full_backend_with_top1_is_exact(kind: str, dtype: torch.dtype, training: bool) -> None:
    """Not one bit, in training too; GPT-2's dropout then draws the same neurons, for the gate draws nothing."""
    dense = tiny(kind, dtype).train(training)
    moe = config(backend="full", layers="all", router={"name": "top1", "noise_std": 0.0})
    model = upcycle(copy.deepcopy(dense), moe)
    outputs = []
    for each in (dense, model):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(each(some_ids()).logits)
    assert torch.equal(*outputs)
    if kind == "gpt2" and training:
        torch.manual_seed(4)
        assert not torch.equal(outputs[0], model(some_ids()).logits), "no dropout at all"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("router", [{"name": "top1"}, TOPK, {"name": "sigmoid"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_copies_keep_the_function(
    kind: str, backend: str, router: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    """Products over another number of rows round differently."""
    dense = tiny(kind)
    model = upcycle(copy.deepcopy(dense), config(router=router, backend=backend))
    assert (logits(dense, dtype) - logits(model, dtype)).abs().max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_comes_back_and_only_the_named_layers_change(kind: str) -> None:
    dense = tiny(kind)
    before = copy.deepcopy(dense).state_dict()
    model = upcycle(dense, config(layers="1"))
    assert model is dense
    layers = HFLanguageModel(model).moe_layers()
    assert list(layers) == [1]
    after = model.state_dict()
    for name, tensor in before.items():
        if name in after:
            assert torch.equal(after[name], tensor), name
        else:
            assert ".1.mlp." in name
    assert {name for name in after if name not in before} == {
        name for name in after if ".1.mlp.router." in name or ".1.mlp.experts." in name
    }
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_gpt2_is_transposed_and_keeps_its_dropout() -> None:
    dense = tiny("gpt2", n_inner=40, resid_pdrop=0.25)
    fc, projection = (getattr(dense.transformer.h[2].mlp, name) for name in ("c_fc", "c_proj"))
    assert fc.weight.shape == (32, 40)
    (layer,) = experts_of(upcycle(dense, config(layers="2")))
    assert layer.dropout == 0.25
    for expert in range(4):
        assert torch.equal(layer.experts.up_proj[expert], fc.weight.t())
        assert torch.equal(layer.experts.down_proj[expert], projection.weight.t())
        assert torch.equal(layer.experts.up_proj_bias[expert], fc.bias)
        assert torch.equal(layer.experts.down_proj_bias[expert], projection.bias)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_noise_moves_experts_apart(kind: str) -> None:
    def noisy(seed: int) -> Any:
        return upcycle(tiny(kind), config(init_noise=1e-2), generator=torch.Generator().manual_seed(seed))

    first = experts_of(noisy(0))[0].experts.down_proj
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, experts_of(noisy(0))[0].experts.down_proj)
    assert not torch.equal(first, experts_of(noisy(1))[0].experts.down_proj)
    assert 1e-6 < (logits(noisy(0)) - logits(tiny(kind))).abs().max() < 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("granularity", "shared"), [(4, 0), (2, 0), (4, 2), (4, 1)])
def test_parts_of_the_mlp_are_the_mlp(kind: str, granularity: int, shared: int) -> None:
    """Scaled by a power of two exactly; by three it rounds in float64."""
    moe = config(
        init="split", granularity=granularity, n_shared_experts=shared, num_experts=2 * (granularity - shared),
        router={"name": "topk", "top_k": granularity - shared},
    )  # fmt: skip
    dense = tiny(kind)
    model = upcycle(copy.deepcopy(dense), moe)
    assert (logits(dense, torch.float64) - logits(model, torch.float64)).abs().max() <= 1e-10
    layer = experts_of(model)[0]
    assert layer.experts.intermediate_size == (128 if kind == "gpt2" else 48) // granularity


@pytest.mark.parametrize(("experts", "granularity", "shared"), [(4, 3, 1), (6, 5, 2), (6, 3, 0), (10, 6, 1)])
def test_parts_are_the_mlp_token_by_token_in_float32(experts: int, granularity: int, shared: int) -> None:
    """With a cache one token is one row, whose product with rows of the gate that tie may differ by a unit in the
    last place, at numbers of experts as odd as these. 1e-4: rounding of 17 tokens through three layers."""
    from transformers import DynamicCache

    moe = config(
        init="split", granularity=granularity, n_shared_experts=shared, num_experts=experts, layers="all",
        router={"name": "topk", "top_k": granularity - shared},
    )  # fmt: skip
    dense = tiny("llama", torch.float32, intermediate_size=60)
    model = HFLanguageModel(upcycle(copy.deepcopy(dense), moe)).eval()
    ids, cache, steps = some_ids(1, 17), DynamicCache(config=dense.config), []
    with torch.no_grad():
        for token in range(17):
            steps.append(model(ids[:, token : token + 1], cache=cache))
            for layer in model.moe_layers().values():
                chosen = layer.routing.topk_indices // (granularity - shared)
                assert (chosen == chosen[:, :1]).all(), "parts of two MLPs"
        assert (torch.cat(steps, 1) - dense(ids).logits).abs().max() <= 1e-4
        model(ids)
    layer = next(iter(model.moe_layers().values()))
    assert len(layer.routing.topk_indices.unique()) == experts, "no expert stands idle"


def test_parts_that_do_not_add_up_are_refused() -> None:
    unequal = config(init="split", granularity=4, num_experts=8, router=TOPK)
    with pytest.raises(ConfigError, match=r"granularity is 4, but a token visits 2 experts and 0 shared ones.* 0.50"):
        upcycle(tiny("llama"), unequal)
    uneven = config(init="split", granularity=5, num_experts=10, router={"name": "topk", "top_k": 5})
    with pytest.raises(ConfigError, match=r"granularity 5 does not divide the dense MLP's 48 neurons") as error:
        upcycle(tiny("llama"), uneven)
    assert error.value.hint == "Choose a divisor of 48, for example 4."
    raw = config(init="split", granularity=2, router={**TOPK, "norm_topk_prob": False})
    with pytest.raises(ConfigError, match="do not sum to one"):
        upcycle(tiny("llama"), raw)
    choosing = config(init="split", granularity=2, router={"name": "expert-choice", "top_k": 2})
    with pytest.raises(ConfigError, match="do not choose"):
        upcycle(tiny("llama"), choosing)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dropped_neurons(kind: str) -> None:
    dense = tiny(kind)
    model = upcycle(copy.deepcopy(dense), config(init="drop", init_noise=1e-3, drop_ratio=0.25))
    kept = experts_of(upcycle(copy.deepcopy(dense), config()))[0].experts.down_proj
    down = experts_of(model)[0].experts.down_proj
    changed = (down != kept).all(1)
    assert changed.sum(1).tolist() == [round(0.25 * down.shape[2])] * 4
    assert not torch.equal(changed[0], changed[1]), "each expert loses neurons of its own"
    none = upcycle(copy.deepcopy(dense), config(init="drop", init_noise=1e-3, drop_ratio=0.0))
    assert (logits(dense, torch.float64) - logits(none, torch.float64)).abs().max() <= 1e-10


def test_random_experts_may_have_any_size() -> None:
    dense = tiny("gpt2")
    model = upcycle(copy.deepcopy(dense), config(init="random", expert_intermediate_size=7))
    assert experts_of(model)[0].experts.down_proj.shape == (4, 32, 7)
    assert experts_of(model)[0].experts.down_proj_bias.abs().max() == 0
    assert (logits(dense) - logits(model)).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="128 neurons, not 7"):
        upcycle(tiny("gpt2"), config(expert_intermediate_size=7))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_from_fine_tunes(kind: str) -> None:
    """Routed to expert e alone, the model is the base with the MLPs of the e-th fine-tune."""
    base, tuned = tiny(kind), [tiny(kind, seed=seed) for seed in (1, 2)]
    moe = config(init="experts-from", init_noise=1e-3, num_experts=2, experts_from=["a", "b"], layers="all")
    model = upcycle(copy.deepcopy(base), moe, experts=tuned)
    family = HFLanguageModel(base).family
    for expert, donor in enumerate(tuned):
        merged = copy.deepcopy(base)
        for layer, other in zip(family.layers_of(merged), family.layers_of(donor), strict=True):
            layer.mlp = copy.deepcopy(other.mlp)
        for layer in experts_of(model):
            layer.router.forward = always(expert, layer)  # type: ignore[method-assign]
        assert (logits(merged, torch.float64) - logits(model, torch.float64)).abs().max() <= 1e-10


def test_donors_of_another_activation_are_no_fine_tunes() -> None:
    base, other = tiny("gpt2"), tiny("gpt2", activation_function="gelu_pytorch_tanh", seed=1)
    moe = config(init="experts-from", init_noise=1e-3, num_experts=2, experts_from=["a", "b"], layers="all")
    with pytest.raises(ConfigError, match="'b' is no fine-tune of the base: its family, shape or activation differs"):
        upcycle(base, moe, experts=[tiny("gpt2", seed=2), other])
    assert not experts_of(base)


def always(expert: int, layer: MoELayer) -> Any:
    route = type(layer.router).forward

    def forward(x: torch.Tensor, token_mask: torch.Tensor | None = None) -> Any:
        out = route(layer.router, x, token_mask)
        return out._replace(topk_indices=torch.full_like(out.topk_indices, expert))

    return forward


def test_gates_from_texts_choose_their_own_experts() -> None:
    """Each expert's texts have three tokens of their own: other texts of these go to it, by far most of them."""
    base = tiny("llama")
    moe = config(init="experts-from", init_noise=1e-3, num_experts=2, experts_from=["a", "b"], layers="all")
    generator = torch.Generator().manual_seed(0)
    texts = [[torch.randint(low, low + 3, (40,), generator=generator) for _ in range(3)] for low in (2, 31)]
    model = upcycle(copy.deepcopy(base), moe, experts=[tiny("llama", seed=s) for s in (1, 2)], prompts=texts)
    first = experts_of(model)[0]
    assert torch.allclose(first.router.weight.norm(dim=1), torch.ones(2, dtype=torch.float64))
    for expert, low in enumerate((2, 31)):
        with torch.no_grad():
            model(torch.randint(low, low + 3, (2, 30), generator=generator))
        assert first.routing is not None
        assert (first.routing.topk_indices == expert).double().mean() > 0.9
    alike = [[texts[0][0]], [texts[0][0]]]
    with pytest.raises(ConfigError, match="nothing tells the experts apart"):
        upcycle(copy.deepcopy(base), moe, experts=[tiny("llama", seed=s) for s in (1, 2)], prompts=alike)


def test_experts_that_are_no_fine_tunes_are_refused() -> None:
    moe = config(init="experts-from", init_noise=1e-3, num_experts=2, experts_from=["a", "b"])
    for wrong, said in (
        ([tiny("llama"), tiny("qwen3")], "'b' is no fine-tune"),
        ([tiny("llama"), tiny("llama", intermediate_size=40)], "'b' is no fine-tune"),
        ([tiny("llama")], "1 models were given for 2 experts"),
        ([tiny("llama"), upcycle(tiny("llama"), config())], "'b' has experts already"),
    ):
        base = tiny("llama")
        with pytest.raises(ConfigError, match=said):
            upcycle(base, moe, experts=wrong)
        assert not experts_of(base), "nothing is changed unless everything can be"
    with pytest.raises(ConfigError, match="not experts-from"):
        upcycle(tiny("llama"), config(), experts=[tiny("llama")])


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_shared_experts_start_silent_and_can_learn(kind: str) -> None:
    dense = tiny(kind)
    model = upcycle(copy.deepcopy(dense), config(n_shared_experts=2, backend="full"))
    assert torch.equal(logits(dense), logits(model))
    shared = experts_of(model)[0].shared_experts
    assert shared is not None
    assert shared.up_proj.out_features == 2 * experts_of(model)[0].experts.intermediate_size
    model(some_ids(), labels=some_ids()).loss.backward()
    assert shared.down_proj.weight.grad.any()


def test_shrinking_weights_are_refused_unless_asked_for() -> None:
    raw = {"name": "topk", "top_k": 2, "norm_topk_prob": False}
    for router in ({"name": "switch"}, raw):
        base = tiny("qwen3")
        with pytest.raises(ConfigError, match="do not sum to one"):
            upcycle(base, config(router=router))
        assert not experts_of(base)
        with pytest.raises(ConfigError, match="do not sum to one"):
            upcycle(tiny("qwen3"), config(router=router, init="drop", init_noise=1e-3))
        shrunk = upcycle(tiny("qwen3"), config(router=router, allow_shrinking=True))
        assert (logits(shrunk) - logits(tiny("qwen3"))).abs().max() > 1e-2


def test_layers_out_of_range_and_a_second_time() -> None:
    for layers in ("3", "last:4", "every:4", "0,9"):
        with pytest.raises(ConfigError, match="does not fit a model of 3 layers"):
            upcycle(tiny("gpt2"), config(layers=layers))
    model = upcycle(tiny("gpt2"), config())
    with pytest.raises(ConfigError, match="has experts already"):
        upcycle(model, config())


def test_auto_copies() -> None:
    dense = tiny("llama")
    model = upcycle(copy.deepcopy(dense), config(init="auto"))
    assert (logits(dense, torch.float64) - logits(model, torch.float64)).abs().max() <= 1e-10
    assert model.moectl_moe.init == "copy"


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_come_back(kind: str) -> None:
    one = upcycle(tiny(kind), config(init_noise=0.1, n_shared_experts=1))
    other = upcycle(tiny(kind, seed=5), config(n_shared_experts=1))
    assert not torch.equal(logits(one), logits(other))
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_learns_from_the_language_model_loss(kind: str) -> None:
    model = upcycle(tiny(kind), config(init_noise=0.1, num_experts=2, layers="all")).train()
    model(some_ids(8, 32), labels=some_ids(8, 32)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name

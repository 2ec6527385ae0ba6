"""The weight mapping: which name and shape is taken for what, which is not, and gradients on their way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moectl.parity.candidate.expressions import ExpressionError, evaluate, pull_back, unread
from moectl.parity.candidate.guess import Guess, guess_mapping
from moectl.parity.candidate.sizes import sizes_of
from moectl.parity.families import config_of, formula_of, random_weights, weight_shapes

FORMULA = formula_of("qwen3", config_of("qwen3", "tiny"))
SIZES = sizes_of(FORMULA)
D, F, E, H, G, P = (SIZES[letter] for letter in "DFEHGP")


class Tree(nn.Module):
    """Parameters of given shapes under given paths; Linear layers where a pair is given."""

    def __init__(self, **parts: object) -> None:
        super().__init__()
        for path, shape in parts.items():
            *folders, leaf = path.split("__")
            owner: nn.Module = self
            for folder in folders:
                if not hasattr(owner, folder):
                    owner.add_module(folder, nn.Module())
                owner = getattr(owner, folder)
            if isinstance(shape, nn.Module):
                owner.add_module(leaf, shape)
            else:
                owner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))  # type: ignore[arg-type]


def guess(level: str, family: str = "qwen3", **parts: object) -> Guess:
    formula = formula_of(family, config_of(family, "tiny"))
    return guess_mapping(Tree(**parts), formula, level, weight_shapes(formula, level))  # type: ignore[arg-type]


def linear(width: int, out: int) -> nn.Linear:
    return nn.Linear(width, out, bias=False)


@pytest.mark.parametrize("name", "gate router wg w_gate classifier gating switch router_gate gate_proj".split())
def test_a_router_has_many_names(name: str) -> None:
    found = guess("moe", **{name: linear(D, E), "w13": (E, 2 * F, D), "w2": (E, D, F)})
    assert found.sources[f"{name}.weight"] == "gate.weight"
    assert not found.missing and not found.extra and not found.unclear


def test_a_router_of_unknown_name_is_taken_by_its_shape_and_said() -> None:
    found = guess("moe", pick=linear(D, E), w13=(E, 2 * F, D), w2=(E, D, F))
    line = next(line for line in found.mapped if line.name == "pick.weight")
    assert (line.source, line.remark) == ("gate.weight", "by its shape")


def test_two_routers_are_unclear_and_noise_is_none() -> None:
    found = guess("moe", one=linear(D, E), other=linear(D, E), w13=(E, 2 * F, D), w2=(E, D, F))
    assert "gate.weight" in found.missing and "one.weight and other.weight" in found.unclear[0]
    quiet = guess("moe", w_gate=(D, E), w_noise=(D, E), w13=(E, 2 * F, D), w2=(E, D, F))
    assert quiet.sources["w_gate"] == "gate.weight.mT" and list(quiet.extra) == ["w_noise"] and not quiet.missing


@pytest.mark.parametrize(
    ("shapes", "sources"),
    [
        ({"w1": (E, F, D), "w3": (E, F, D), "w2": (E, D, F)}, ["[:, :F]", "[:, F:]", "down"]),
        ({"w1": (E, D, F), "w3": (E, D, F), "w2": (E, F, D)}, ["[:, :F].mT", "[:, F:].mT", "down.mT"]),
        ({"fc1": (E, F, D), "fc2": (E, F, D), "fc3": (E, D, F)}, ["[:, :F]", "[:, F:]", "down"]),
        ({"gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}, ["[:, :F]", "[:, F:]", "down"]),
        ({"w1": (E * F, D), "v1": (E * F, D), "w2": (E * F, D)},
         ["[:, :F].flatten(0, 1)", "[:, F:].flatten(0, 1)", "down.mT.flatten(0, 1)"]),
        ({"gate_up_proj": (E, 2 * F, D), "down_proj": (E, D, F)}, ["", "down"]),
        ({"gate_up_proj": (E, D, 2 * F), "down_proj": (E, F, D)}, [".mT", "down.mT"]),
        ({"w1": (E, 2 * F, D), "w2": (E, D, F)}, ["", "down"]),
    ],
)  # fmt: skip
def test_stacked_experts(shapes: dict[str, tuple[int, ...]], sources: list[str]) -> None:
    found = guess("moe", gate=linear(D, E), **shapes)
    full = [s.replace("down", "experts.down_proj") if "down" in s else f"experts.gate_up_proj{s}" for s in sources]
    assert [found.sources[name] for name in shapes] == full
    assert not found.missing and not found.unclear


def test_of_three_alike_the_second_w_and_the_third_fc_are_down() -> None:
    w = guess("moe", gate=linear(D, E), w1=(E * F, D), w2=(E * F, D), w3=(E * F, D))
    assert w.sources["w2"] == "experts.down_proj.mT.flatten(0, 1)"
    assert w.sources["w3"] == "experts.gate_up_proj[:, F:].flatten(0, 1)"
    fc = guess("moe", gate=linear(D, E), fc1=(E * F, D), fc2=(E * F, D), fc3=(E * F, D))
    assert fc.sources["fc3"] == "experts.down_proj.mT.flatten(0, 1)"
    assert fc.sources["fc2"] == "experts.gate_up_proj[:, F:].flatten(0, 1)"


def test_a_linear_layer_is_not_turned_around() -> None:
    """Its weight is [out, in]: one that only fits the other way round is something else."""
    found = guess("moe", gate=linear(E, D), w13=(E, 2 * F, D), w2=(E, D, F))
    assert "gate.weight" in found.missing and list(found.extra) == ["gate.weight"]


def test_up_before_gate_by_its_name() -> None:
    found = guess("moe", gate=linear(D, E), up_gate_proj=(E, 2 * F, D), w2=(E, D, F))
    assert found.sources["up_gate_proj"] == "cat([experts.gate_up_proj[:, F:], experts.gate_up_proj[:, :F]], 1)"


def test_numbers_do_not_tell_where_the_first_matrix_is_the_odd_one() -> None:
    found = guess("moe", gate=linear(D, E), w1=(E, D, F), w2=(E, F, D), w3=(E, F, D))
    assert set(found.missing) == {"experts.gate_up_proj", "experts.down_proj"} and {"w1", "w2", "w3"} <= set(
        found.extra
    )


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("q_proj k_proj v_proj o_proj", None),
        ("wq wk wv wo", None),
        ("W_query W_key W_value out_proj", None),
        ("query key value dense", None),
        ("to_q to_k to_v to_out", None),
        ("c_q c_k c_v c_proj", None),
    ],
)
def test_attention_has_many_names(names: str, shown: None) -> None:
    q, k, v, o = names.split()
    norms = {"q_norm__weight": (P,), "k_norm__weight": (P,)}
    parts = {q: linear(D, H * P), k: linear(D, G * P), v: linear(D, G * P), o: linear(H * P, D)}
    found = guess("attention", **parts, **norms)
    wanted = [f"{role}_proj.weight" for role in "qkvo"]
    assert [found.sources[f"{name}.weight"] for name in (q, k, v, o)] == wanted
    assert not found.missing and not found.extra


def test_packed_and_per_head_attention() -> None:
    norms = {"ln_q__scale": (P,), "ln_k__scale": (P,)}
    packed = guess("attention", c_attn=linear(D, (H + 2 * G) * P), c_proj=linear(H * P, D), **norms)
    assert packed.sources["c_attn.weight"] == "cat([q_proj.weight, k_proj.weight, v_proj.weight])"
    assert "assumed" in str(next(line.remark for line in packed.mapped if line.name == "c_attn.weight"))
    heads = {f"heads__{h}__{r}": linear(D, P) for r, n in (("q", H), ("k", G), ("v", G)) for h in range(n)}
    single = guess("attention", **heads, out=linear(H * P, D), **norms)
    assert single.sources["heads.3.q.weight"] == "q_proj.weight[3*P:4*P]" and not single.missing


def test_a_norm_over_all_heads_gets_one_heads_weight_repeated() -> None:
    """The mistake of OLMoE's norm in Qwen3: to be found by what it computes, and not refused for its shape."""
    parts = {"wq": linear(D, H * P), "wk": linear(D, G * P), "wv": linear(D, G * P), "wo": linear(H * P, D)}
    found = guess("attention", **parts, q_norm__weight=(H * P,), k_norm__weight=(G * P,))
    assert found.sources["q_norm.weight"] == "q_norm.weight.repeat(H)"
    assert found.sources["k_norm.weight"] == "k_norm.weight.repeat(G)"


def test_missing_norms_and_biases_are_listed() -> None:
    parts = {"wq": nn.Linear(D, H * P), "wk": linear(D, G * P), "wv": linear(D, G * P), "wo": linear(H * P, D)}
    found = guess("attention", **parts)
    assert found.missing == {"q_norm.weight": P, "k_norm.weight": P} and found.extra == {"wq.bias": (H * P,)}


def test_biases_are_mapped_where_the_family_has_them() -> None:
    parts = {"wq": nn.Linear(D, H * P), "wk": nn.Linear(D, G * P), "wv": nn.Linear(D, G * P), "wo": linear(H * P, D)}
    found = guess("attention", "qwen2_moe", **parts)
    assert found.sources["wq.bias"] == "q_proj.bias" and not found.missing and not found.extra


def test_a_missing_expert_is_counted() -> None:
    parts = {f"experts__{e}__w{n}": linear(*((F, D) if n == 2 else (D, F))) for e in range(E - 1) for n in (1, 2, 3)}
    found = guess("moe", gate=linear(D, E), **parts)
    assert found.missing == {"experts.gate_up_proj": 2 * F * D, "experts.down_proj": D * F}


def test_a_shared_expert_is_extra_in_a_family_that_has_none_and_mapped_in_one_that_has() -> None:
    shared = {
        "shared_expert__w1": linear(D, 40),
        "shared_expert__w2": linear(40, D),
        "shared_expert__w3": linear(D, 40),
    }
    gate = {"shared_expert_gate": linear(D, 1)}
    stack = {"gate": linear(D, E), "w13": (E, 2 * F, D), "w2": (E, D, F)}
    assert set(guess("moe", **stack, **shared).extra) == {f"shared_expert.w{n}.weight" for n in (1, 2, 3)}
    found = guess("moe", "qwen2_moe", **stack, **shared, **gate)
    assert found.sources["shared_expert.w2.weight"] == "shared_expert.down_proj.weight"
    assert found.sources["shared_expert_gate.weight"] == "shared_expert_gate.weight"
    assert not found.missing and not found.extra


def test_the_bias_that_only_chooses_has_many_names() -> None:
    size = weight_shapes(formula_of("deepseek_v3", config_of("deepseek_v3", "tiny")), "router")["weight"]
    for name in ("e_score_correction_bias", "expert_bias", "bias"):
        found = guess("router", "deepseek_v3", weight=size, **{name: (size[0],)})
        assert found.sources[name] == "e_score_correction_bias" and not found.missing


def test_interleaved_experts_of_gpt_oss_are_taken_apart() -> None:
    config = config_of("gpt_oss", "tiny")
    e, d, f = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    found = guess("moe", "gpt_oss", router=nn.Linear(d, e), w1=(e, f, d), w3=(e, f, d), w2=(e, d, f))
    assert found.sources["w1"] == "experts.gate_up_proj[:, :, ::2].mT"
    assert found.sources["w2"] == "experts.down_proj.mT" and found.sources["router.bias"] == "router.bias"


def test_layers_are_told_from_experts_in_a_whole_model() -> None:
    experts = {f"h__{n}__moe__experts__{e}__w{i}": linear(*((F, D) if i == 2 else (D, F)))
               for n in range(3) for e in range(E) for i in (1, 2, 3)}  # fmt: skip
    found = guess("model", wte=nn.Embedding(64, D), **experts, **{f"h__{n}__moe__gate": linear(D, E) for n in range(3)})
    assert found.sources["h.2.moe.experts.5.w3.weight"] == "model.layers.2.mlp.experts.gate_up_proj[5, F:]"
    assert found.sources["h.1.moe.gate.weight"] == "model.layers.1.mlp.gate.weight"
    assert found.sources["wte.weight"] == "model.embed_tokens.weight"
    assert not any("mlp" in name for name in found.missing) and "lm_head.weight" in found.missing


def test_gradients_come_back_through_every_rearrangement() -> None:
    """Against autograd through the rearrangement itself, of a quadratic of the candidate's tensors, in float64."""
    weights = random_weights(FORMULA, "moe", seed=0, dtype=torch.float64)
    sources = {
        "a": "experts.gate_up_proj[:, :F].mT",
        "b": "cat([experts.gate_up_proj[2, F:], experts.gate_up_proj[3, F:]])",
        "c": "experts.down_proj.mT.flatten(0, 1)",
        "d": lambda w: 2 * w["gate.weight"].flip(0),
    }
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    made = {name: evaluate(source, leaves, SIZES) for name, source in sources.items()}
    sum(tensor.pow(2).sum() for tensor in made.values()).backward()  # type: ignore[union-attr]
    returned = pull_back(sources, {name: 2 * tensor.detach() for name, tensor in made.items()}, weights, SIZES)
    assert set(returned) == set(weights)
    for name, gradient in returned.items():
        assert torch.allclose(gradient, leaves[name].grad, rtol=0, atol=1e-12), name  # type: ignore[arg-type]


def test_gradients_of_what_is_not_asked_for_are_left_out() -> None:
    weights = random_weights(FORMULA, "moe", seed=0, dtype=torch.float64)
    returned = pull_back({"a": "gate.weight", "b": "experts.down_proj"}, {"a": torch.ones(E, D)}, weights, SIZES)
    assert list(returned) == ["gate.weight"] and torch.equal(returned["gate.weight"], torch.ones(E, D).double())


def test_entries_that_nothing_reads_are_counted() -> None:
    weights = random_weights(FORMULA, "moe", seed=0, dtype=torch.float32)
    left = unread({"a": "gate.weight[:3]", "b": "experts.gate_up_proj - 1"}, weights, SIZES)
    assert left == {"gate.weight": (E - 3) * D, "experts.down_proj": E * D * F}


@pytest.mark.parametrize(
    "text",
    [
        "gate.weights", "gate.weight.__class__", "__import__('os')", "open('x')", "gate.weight.numpy()", "lambda: 1",
        "gate.weight[", "(gate.weight for x in 1)", "gate.weight[:, 99, 3]", "gate.weight.reshape(3)", "5", "",
    ],
)  # fmt: skip
def test_an_expression_says_what_it_may_not_or_cannot(text: str) -> None:
    weights = random_weights(FORMULA, "moe", seed=0, dtype=torch.float32)
    with pytest.raises(ExpressionError) as caught:
        evaluate(text, weights, SIZES)
    assert caught.value.hint


def test_the_longest_name_is_meant() -> None:
    weights = {"a.b": torch.zeros(2, 3), "a.b_bias": torch.ones(4), "a.b.mT": torch.ones(5)}
    assert evaluate("a.b_bias", weights, {}).shape == (4,)
    assert evaluate("a.b.T", weights, {}).shape == (3, 2)
    assert evaluate("a.b.mT", weights, {}).shape == (5,)

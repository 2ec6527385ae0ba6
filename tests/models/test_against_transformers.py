"""The decoder and its MoE layer against Hugging Face's Qwen3-MoE with the same weights.

transformers runs the softmax of its router, its norms and its rotary tables in float32 whatever the
model's dtype. So a float64 model there is a float32 one in these places: 1e-6 is what whole models can
agree to. Where a block is wanted to 1e-10, its router formula is evaluated in float64 beside it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moectl.config.schema import MoEConfig
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.moe import GatedExperts, MoELayer
from moectl.moe.experts import BACKENDS
from moectl.moe.losses import load_balancing_loss
from moectl.routers import build_router

transformers = pytest.importorskip("transformers")
qwen3_moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")

D, F, E, K = 16, 12, 6, 3


def hf_config(norm: bool, **changes: object) -> object:
    values: dict[str, object] = {
        "vocab_size": 31,
        "hidden_size": D,
        "intermediate_size": 20,
        "moe_intermediate_size": F,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_experts": E,
        "num_experts_per_tok": K,
        "norm_topk_prob": norm,
        "mlp_only_layers": [0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    return transformers.Qwen3MoeConfig(**{**values, **changes})


def exact_router(gate: nn.Module, inputs: tuple[Tensor, ...], output: object) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' own formula in the input's float64: softmax, top-k, divided by the sum or not."""
    logits = inputs[0].reshape(-1, D) @ gate.weight.t()
    probs = torch.exp(logits - logits.max(1, keepdim=True).values)
    probs = probs / probs.sum(1, keepdim=True)
    values, indices = probs.topk(gate.top_k, dim=1)
    return logits, values / values.sum(1, keepdim=True) if gate.norm_topk_prob else values, indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("k", [1, K, E])
def test_moe_block(norm: bool, backend: str, k: int) -> None:
    """Output and every gradient to 1e-10 in float64.

    With transformers' float32 softmax left in, weights carry 2⁻²⁴ of relative error: 1e-6 of the largest output.
    """
    torch.manual_seed(0)
    theirs = qwen3_moe.Qwen3MoeSparseMoeBlock(hf_config(norm, num_experts_per_tok=k)).double()
    router = build_router("topk", hidden_size=D, num_experts=E, top_k=k, norm_topk_prob=norm, noise_std=0.0)
    ours = MoELayer(router.double(), GatedExperts(E, D, F, backend=backend).double())
    with torch.no_grad():
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.5)
    ours.router.load_state_dict({**router.state_dict(), "weight": theirs.gate.weight})
    ours.experts.load_state_dict(theirs.experts.state_dict())  # the same names and layout, no conversion

    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    as_it_is = theirs(x).detach()
    torch.testing.assert_close(ours(x).detach(), as_it_is, rtol=0, atol=1e-6 * as_it_is.abs().max().item())
    theirs.gate.register_forward_hook(exact_router)
    mine, reference = ours(x), theirs(x)
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)
    upstream = torch.randn_like(mine)
    leaves = (ours.router.weight, ours.experts.gate_up_proj, ours.experts.down_proj)
    their_leaves = (theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
    for one, other in zip(
        torch.autograd.grad(mine, (x, *leaves), upstream),
        torch.autograd.grad(reference, (x, *their_leaves), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def pair(kind: str) -> tuple[Decoder, nn.Module]:
    """Our decoder and transformers' model, weights copied over by name."""
    torch.manual_seed(0)
    tied = kind == "tied"
    theirs = transformers.Qwen3MoeForCausalLM(hf_config(kind != "raw", tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shape = DecoderConfig(
        vocab_size=31,
        hidden_size=D,
        intermediate_size=20,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rope_theta=500.0,
        tie_word_embeddings=tied,
    )
    router = {"name": "topk", "top_k": K, "norm_topk_prob": kind != "raw"}
    ours = Decoder(
        shape.with_moe(MoEConfig(router=router, num_experts=E, expert_intermediate_size=F, layers="last:2"))
    ).eval()
    renamed = {
        name.removeprefix("model.").replace("mlp.gate.weight", "mlp.router.weight"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    noise = {name: tensor for name, tensor in ours.state_dict().items() if ".noise." in name}
    ours.load_state_dict({**renamed, **noise})  # strict: every name but the gate's is transformers' own
    return ours, theirs


@pytest.mark.parametrize("kind", ["renormalised", "raw", "tied"])
def test_logits_and_gradients(kind: str) -> None:
    """Float32 on both sides, three layers: 1e-5 of the largest logit, 1e-4 of the largest gradient entry."""
    ours, theirs = pair(kind)
    ids = torch.randint(0, 31, (2, 11))
    mine, reference = ours(ids), theirs(ids).logits
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-5 * reference.detach().abs().max().item())
    labels = ids.roll(-1, 1)
    ours.lm_loss_sum(ids, labels).backward()
    nn.functional.cross_entropy(reference.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    grads = {
        name.removeprefix("model.").replace("mlp.gate.weight", "mlp.router.weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    for name, parameter in ours.named_parameters():
        grad, other = parameter.grad, grads.pop(name)
        assert grad is not None, name
        torch.testing.assert_close(
            grad, other, rtol=0, atol=1e-4 * other.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not grads


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_agrees_on_real_tokens(side: str) -> None:
    ours, theirs = pair("renormalised")
    ids, real = torch.randint(0, 31, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    if side == "right":
        real = real.flip(1)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    reference = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
    mine = ours(ids, token_mask=real)
    torch.testing.assert_close(mine[real], reference[real], rtol=0, atol=1e-5 * reference.detach().abs().max().item())


def test_greedy_generation_agrees() -> None:
    ours, theirs = pair("renormalised")
    prompt = torch.randint(1, 31, (2, 5))
    reference = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=0,
        pad_token_id=0,
    )
    assert torch.equal(ours.generate(prompt, 8), reference)


def test_balance_loss_is_theirs_over_k_per_layer() -> None:
    """Their balanced value is k where ours is 1; and they pool layers, which hides collapses and ours does not."""
    logits = torch.randn(40, E)
    probs = logits.softmax(1)
    indices = probs.topk(K, dim=1).indices
    reference = qwen3_moe.load_balancing_loss_func((logits,), E, K)
    torch.testing.assert_close(load_balancing_loss(probs, indices, E), reference / K, rtol=1e-6, atol=0)
    real = torch.rand(40) > 0.3
    reference = qwen3_moe.load_balancing_loss_func((logits,), E, K, real[None].long())
    torch.testing.assert_close(load_balancing_loss(probs, indices, E, real), reference / K, rtol=1e-6, atol=0)

    collapsed = [torch.full((16, 8), -100.0) for _ in range(4)]
    for layer, layer_logits in enumerate(collapsed):
        layer_logits[:, 2 * layer : 2 * layer + 2] = 100.0
    pooled = qwen3_moe.load_balancing_loss_func(tuple(collapsed), 8, 2)
    assert pooled.item() == pytest.approx(2.0), "their value of perfect balance"
    for layer_logits in collapsed:
        probs = layer_logits.softmax(1)
        assert load_balancing_loss(probs, probs.topk(2, dim=1).indices, 8).item() == pytest.approx(8 / 2)


def test_entropy_of_their_gate_is_what_we_report() -> None:
    ours, theirs = pair("renormalised")
    ids = torch.randint(0, 31, (1, 7))
    ours(ids)
    logits = theirs(ids, output_router_logits=True).router_logits
    for layer, reference in zip(ours.moe_layers().values(), logits, strict=True):
        assert layer.routing is not None
        torch.testing.assert_close(layer.routing.router_logits, reference, rtol=0, atol=1e-4)
        distribution = torch.distributions.Categorical(logits=reference)
        torch.testing.assert_close(layer.routing.entropy, distribution.entropy(), rtol=0, atol=1e-4)
        assert layer.routing.entropy.max() <= math.log(E) + 1e-6

"""The residual stream from tokens to logits, and the losses.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.parity.case import Inputs
from moectl.parity.reference.attention import Tables, attention, rope_tables, who_sees_whom
from moectl.parity.reference.experts import gated_mlp, moe
from moectl.parity.reference.numerics import wide
from moectl.parity.reference.scope import Scope

NOT_SCORED = -100


class ModelOutput(NamedTuple):
    """``embeddings [B, S, D]``, ``logits [B, S, V]``, and the losses where there are labels and experts."""

    embeddings: Tensor
    logits: Tensor
    loss: Tensor | None
    balance_loss: Tensor | None


def model(scope: Scope, inputs: Inputs) -> ModelOutput:
    """Embeddings, layers, final norm, head. A run in chunks with a cache is, by definition, the full forward."""
    assert inputs.input_ids is not None
    formula = scope.formula
    embedding_VD = scope.weight("model.embed_tokens.weight")
    embeddings_BSD = F.embedding(inputs.input_ids, embedding_VD, padding_idx=formula.padding_idx)
    scope.record("embeddings", embeddings_BSD)
    tables = rope_tables(scope, inputs, embeddings_BSD.dtype)
    allowed = who_sees_whom(formula.attention, inputs, embeddings_BSD)

    x_BSD, router_logits = embeddings_BSD, []
    for layer in range(formula.num_layers):
        inside = replace(scope.inside(f"model.layers.{layer}.", f"layers.{layer}."), layer=layer)
        x_BSD, logits_TE = decoder_layer(inside, x_BSD, tables, allowed)
        if logits_TE is not None:
            router_logits.append(logits_TE)

    x_BSD = scope.norm(x_BSD, "model.norm", "final")
    scope.record("final_norm", x_BSD)
    head_VD = embedding_VD if formula.tie_embeddings else scope.weight("lm_head.weight")
    if "lm_head" in formula.reshaped:
        head_VD = head_VD.reshape(head_VD.shape[1], head_VD.shape[0]).T
    logits_BSV = F.linear(x_BSD, head_VD, scope.weight("lm_head.bias") if formula.head_bias else None)
    scope.record("logits", logits_BSV)

    loss = balance = None
    if inputs.labels is not None:
        loss = next_token_loss(logits_BSV, inputs.labels, formula.casts)
        scope.record("loss", loss)
    if router_logits:
        balance = balance_loss(scope, router_logits, inputs.attention_mask)
        scope.record("balance_loss", balance)
    return ModelOutput(embeddings_BSD, logits_BSV, loss, balance)


def decoder_layer(scope: Scope, x_BSD: Tensor, tables: Tables, allowed_B1SS: Tensor) -> tuple[Tensor, Tensor | None]:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``: ``[B, S, D]``, and router logits where it has experts."""
    formula = scope.formula
    if formula.order == "post_norm":
        return post_norm_layer(scope, x_BSD, tables, allowed_B1SS)
    normed = scope.norm(x_BSD, "input_layernorm", "attn")
    scope.record("attn.input", normed)
    output = attention(scope.inside("self_attn.", "attn."), normed, tables, allowed_B1SS)
    before, x_BSD = x_BSD, output + scope.passed(_kept(formula.residual_attn, x_BSD, normed), "attn_residual")
    # What a layer's second norm is given: hooks read it there.
    seen = before if formula.order == "parallel" else x_BSD
    scope.record("attn.residual", seen)

    normed = scope.norm(seen, "post_attention_layernorm", "mlp")
    output, router_logits = _mlp(scope, normed)
    x_BSD = output + scope.passed(_kept(formula.residual_mlp, x_BSD, normed), "mlp_residual")
    scope.record("mlp.residual", x_BSD)
    return x_BSD, router_logits


def post_norm_layer(scope: Scope, x_BSD: Tensor, tables: Tables, allowed_B1SS: Tensor) -> tuple[Tensor, Tensor | None]:
    """``norm(x + attention(x))``, then ``norm(x + mlp(x))``: Vaswani et al. 2017, arXiv:1706.03762."""
    scope.record("attn.input", x_BSD)
    output = attention(scope.inside("self_attn.", "attn."), x_BSD, tables, allowed_B1SS)
    x_BSD = scope.norm(x_BSD + output, "input_layernorm", "attn")
    output, router_logits = _mlp(scope, x_BSD)
    scope.record("attn.residual", x_BSD + output)  # what the second norm is given
    x_BSD = scope.norm(x_BSD + output, "post_attention_layernorm", "mlp")
    scope.record("mlp.residual", x_BSD)
    return x_BSD, router_logits


def _mlp(scope: Scope, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
    scope.record("mlp.input", x_BSD)
    mlp = scope.inside("mlp.", "mlp.")
    if scope.layer in scope.formula.moe_layers:
        return moe(mlp, x_BSD)
    output = gated_mlp(mlp, x_BSD)
    mlp.record("output", output)
    return output, None


def _kept(which: str, x_BSD: Tensor, normed_BSD: Tensor) -> Tensor:
    return {"input": x_BSD, "normed": normed_BSD, "none": torch.zeros_like(x_BSD)}[which]


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor, casts: str) -> Tensor:
    """Mean over scored labels of the negative log-probability of the *next* token, in nats."""
    logits_TV, labels_T = logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten()
    return F.cross_entropy(wide(logits_TV, casts), labels_T, ignore_index=NOT_SCORED)


def balance_loss(scope: Scope, router_logits: list[Tensor], attention_mask_BS: Tensor | None) -> Tensor:
    """``E · Σ_e (assignments to e per token) · (mean probability of e)``, pooled over layers, padding left out.

    As transformers' ``load_balancing_loss_func`` has it: k at perfect balance, softmax probabilities and the
    k largest of them in every family, whatever its router really chose.
    """
    rule, casts = scope.formula.router, scope.formula.casts
    probs_TE = torch.softmax(torch.cat(router_logits), dim=-1)
    chosen_TK = probs_TE.topk(rule.top_k, dim=-1).indices
    real_T = wide(torch.ones_like(probs_TE[:, 0]), casts)
    if attention_mask_BS is not None:
        real_T = attention_mask_BS.flatten().to(real_T).repeat(len(router_logits))
    chosen_TE = torch.zeros_like(wide(probs_TE, casts)).scatter(1, chosen_TK, 1.0)
    assigned_E = (chosen_TE * real_T[:, None]).sum(dim=0) / real_T.sum()
    prob_E = (wide(probs_TE, casts) * real_T[:, None]).sum(dim=0) / real_T.sum()
    return rule.num_experts * (assigned_E * prob_E).sum()

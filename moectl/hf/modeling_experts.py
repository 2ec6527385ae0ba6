"""A dense model of transformers, some of whose MLPs are a mixture of experts: one file, nothing but transformers.

Loaded by ``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``. What of the model is no expert
is transformers' own; ``config.moe`` says the rest:

    layers              numbers of the layers with experts
    num_experts, top_k  experts of such a layer, and how many of them a token visits
    intermediate_size   neurons of an expert; shared_size: of the shared experts together, 0 for none
    score               softmax over all experts, or sigmoid of each
    weights             probability: a chosen expert's own score; renormalised: divided by the sum over the chosen
    scaling             times every weight
    clamp               logits stay within ± this; null for no bound
    groups              [n, used]: experts in n groups, a token chooses within the best ``used`` of them
    biased              whether a bias (gate.e_score_correction_bias) is added for the choice alone

Shape suffixes: T tokens, D hidden, E experts, K experts per token, F neurons of an expert, G groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def precise(x: Tensor) -> Tensor:
    """Routers compute in float32, whatever the model's dtype."""
    return x if x.dtype == torch.float64 else x.float()


class Gate(nn.Module):
    """Which experts each token visits, and with which weights."""

    e_score_correction_bias: Tensor

    def __init__(self, moe: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.zeros(moe["num_experts"], hidden_size))
        if moe["biased"]:
            self.register_buffer("e_score_correction_bias", torch.zeros(moe["num_experts"], dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[T, E]``, weights ``[T, K]`` and expert numbers ``[T, K]``; ties go to the lowest number."""
        logits_TE = F.linear(precise(x_TD), precise(self.weight))
        bound = self.moe["clamp"]
        clamped_TE = logits_TE if bound is None else logits_TE.clamp(-bound, bound)
        if self.moe["score"] == "sigmoid":
            log_scores_TE = F.logsigmoid(clamped_TE)
            choice_TE = torch.sigmoid(clamped_TE)
        else:
            log_scores_TE = F.log_softmax(clamped_TE, dim=-1)
            choice_TE = clamped_TE
        if self.moe["biased"]:
            choice_TE = choice_TE + self.e_score_correction_bias
        choice_TE = self.within_groups(choice_TE)
        indices_TK = torch.sort(choice_TE, dim=-1, descending=True, stable=True).indices[:, : self.moe["top_k"]]
        chosen_TK = log_scores_TE.gather(1, indices_TK)
        weights_TK = torch.softmax(chosen_TK, dim=-1) if self.moe["weights"] == "renormalised" else chosen_TK.exp()
        return logits_TE, weights_TK * self.moe["scaling"], indices_TK

    def within_groups(self, choice_TE: Tensor) -> Tensor:
        count, used = self.moe["groups"]
        if used == count:
            return choice_TE
        choice_TGM = choice_TE.unflatten(1, (count, -1))
        best_TG = choice_TGM.topk(2, dim=-1).values.sum(-1)
        opened = torch.sort(best_TG, dim=-1, descending=True, stable=True).indices[:, :used]
        open_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, opened, True)
        return choice_TGM.masked_fill(~open_TG[:, :, None], -math.inf).flatten(1)


class GatedExperts(nn.Module):
    """SwiGLU experts without biases, stacked."""

    def __init__(self, moe: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        experts, size = moe["num_experts"], moe["intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden_size, size))

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = F.linear(x_ND, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, self.down_proj[expert])

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return weighted_sum(self, x_TD, indices_TK, weights_TK)


class PlainExperts(nn.Module):
    """GPT-2's MLPs, stacked: tanh-GELU and biases."""

    def __init__(self, moe: dict[str, Any], hidden_size: int) -> None:
        super().__init__()
        experts, size = moe["num_experts"], moe["intermediate_size"]
        self.up_proj = nn.Parameter(torch.zeros(experts, size, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.zeros(experts, size))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden_size, size))
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden_size))

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        hidden_NF = F.gelu(F.linear(x_ND, self.up_proj[expert], self.up_proj_bias[expert]), approximate="tanh")
        return F.linear(hidden_NF, self.down_proj[expert], self.down_proj_bias[expert])

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return weighted_sum(self, x_TD, indices_TK, weights_TK)


def weighted_sum(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's experts, weighted and summed in float32 or above; an expert computes its own tokens only."""
    sum_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for expert in indices_TK.unique().tolist():
        token, slot = torch.where(indices_TK == expert)
        out_ND = experts.one(expert, x_TD[token])
        sum_TD.index_add_(0, token, out_ND.to(sum_TD.dtype) * weights_TK[token, slot, None])
    return sum_TD.to(x_TD.dtype)


class GatedMLP(nn.Module):
    """Shared experts of a gated model, as one MLP."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=False)
        self.up_proj = nn.Linear(hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """Shared experts of a GPT-2, as one MLP."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, size)
        self.down_proj = nn.Linear(size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class MixtureOfExperts(nn.Module):
    """In the place of an MLP."""

    def __init__(self, moe: dict[str, Any], hidden_size: int, *, gated: bool, dropout: float) -> None:
        super().__init__()
        self.gate = Gate(moe, hidden_size)
        self.experts = (GatedExperts if gated else PlainExperts)(moe, hidden_size)
        self.shared_experts = None
        if moe["shared_size"]:
            self.shared_experts = (GatedMLP if gated else PlainMLP)(hidden_size, moe["shared_size"])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        _, weights_TK, indices_TK = self.gate(x_TD)
        out = self.experts(x_TD, indices_TK, weights_TK).reshape(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return self.dropout(out)


def put_experts(model: Any, layers: nn.ModuleList, *, gated: bool, dropout: float = 0.0) -> None:
    config = model.config
    for number in config.moe["layers"]:
        layers[number].mlp = MixtureOfExperts(config.moe, config.hidden_size, gated=gated, dropout=dropout)
    if config.moe["biased"]:  # in bfloat16 the choice of experts would move
        model._keep_in_fp32_modules_strict = ["e_score_correction_bias"]


# --- the models: each is the dense one of transformers, with experts in some layers


class GPT2ExpertsConfig(GPT2Config):
    model_type = "gpt2_experts"


class GPT2ExpertsForCausalLM(GPT2LMHeadModel):
    config_class = GPT2ExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_experts(self, self.transformer.h, gated=False, dropout=config.resid_pdrop)
        self.post_init()


class LlamaExpertsConfig(LlamaConfig):
    model_type = "llama_experts"


class LlamaExpertsForCausalLM(LlamaForCausalLM):
    config_class = LlamaExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_experts(self, self.model.layers, gated=True)
        self.post_init()


class MistralExpertsConfig(MistralConfig):
    model_type = "mistral_experts"


class MistralExpertsForCausalLM(MistralForCausalLM):
    config_class = MistralExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_experts(self, self.model.layers, gated=True)
        self.post_init()


class Qwen2ExpertsConfig(Qwen2Config):
    model_type = "qwen2_experts"


class Qwen2ExpertsForCausalLM(Qwen2ForCausalLM):
    config_class = Qwen2ExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_experts(self, self.model.layers, gated=True)
        self.post_init()


class Qwen3ExpertsConfig(Qwen3Config):
    model_type = "qwen3_experts"


class Qwen3ExpertsForCausalLM(Qwen3ForCausalLM):
    config_class = Qwen3ExpertsConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        put_experts(self, self.model.layers, gated=True)
        self.post_init()

"""The tensors of an exported checkpoint, under the names of the family that it is exported to.

Experts are stacked here, as transformers 5 holds them in memory; files may have them one by one.

Shape suffixes: D hidden, E experts, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moectl.hf.decoder_config import canonical_name
from moectl.hf.export_facts import Facts
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.targets import EMPTY_SHARED, Target
from moectl.models.language_model import LanguageModel
from moectl.moe.layer import MoELayer
from moectl.routers.sigmoid import SigmoidRouter


def export_tensors(
    model: LanguageModel, facts: Facts, target: Target | None, *, replicate_dense: bool = False
) -> dict[str, Tensor]:
    """All tensors of ``model`` as ``target`` names them; no copies but where a form asks for other numbers.

    Args:
        target: None for the folder with its own code.
        replicate_dense: dense layers become so many equal experts.
    """
    prefix = "transformer.h" if facts.base == "gpt2" else "model.layers"
    tensors = dict(_dense_tensors(model, facts, prefix))
    for number, layer in model.moe_layers().items():
        tensors |= _moe_tensors(layer, f"{prefix}.{number}.mlp", facts, target)
    if target is not None and target.dense == "none" and replicate_dense:
        for number in set(range(facts.layers)) - set(facts.moe_layers):
            _replicate(tensors, f"{prefix}.{number}.mlp", facts)
    return tensors


def _dense_tensors(model: LanguageModel, facts: Facts, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Everything but the MoE layers; of tied weights, the embeddings."""
    inner = model.model if isinstance(model, HFLanguageModel) else model
    assert isinstance(inner, nn.Module)
    experts = tuple(f"{prefix}.{number}.mlp." for number in facts.moe_layers)
    tied = bool(facts.config.get("tie_word_embeddings"))
    for given, tensor in inner.state_dict().items():
        name = given if isinstance(model, HFLanguageModel) else canonical_name(given)
        if not name.startswith(experts) and not (tied and name == "lm_head.weight"):
            yield name, tensor.detach()


def _moe_tensors(layer: MoELayer, place: str, facts: Facts, target: Target | None) -> dict[str, Tensor]:
    tensors = {f"{place}.gate.weight": layer.router.weight.detach()}
    if isinstance(layer.router, SigmoidRouter):
        tensors[f"{place}.gate.e_score_correction_bias"] = layer.router.expert_bias.detach()
    for name, parameter in layer.experts.named_parameters(recurse=False):
        tensors[f"{place}.experts.{name}"] = parameter.detach()
    if target is None or target.shared == "plain":
        tensors |= _shared(layer, f"{place}.shared_experts", like=layer.router.weight, empty=target is not None)
    elif target.shared == "gated":
        tensors |= _gated_shared(layer, place)
    return tensors


def _shared(layer: MoELayer, place: str, *, like: Tensor, empty: bool) -> dict[str, Tensor]:
    """Shared experts as they are; where the family must have some and there are none, some without a neuron."""
    if layer.shared_experts is not None:
        return {f"{place}.{name}": tensor.detach() for name, tensor in layer.shared_experts.named_parameters()}
    return _zeros(place, like, 0) if empty else {}


def _gated_shared(layer: MoELayer, place: str) -> dict[str, Tensor]:
    """Shared experts behind a sigmoid: a gate of zeros halves their output, so that ``down_proj`` is doubled."""
    like = layer.router.weight
    tensors = {f"{place}.shared_expert_gate.weight": like.new_zeros(1, like.shape[1])}
    if layer.shared_experts is None:
        return tensors | _zeros(f"{place}.shared_expert", like, EMPTY_SHARED)
    for name, parameter in layer.shared_experts.named_parameters():
        tensor = parameter.detach()
        tensors[f"{place}.shared_expert.{name}"] = 2 * tensor if name.startswith("down_proj") else tensor
    return tensors


def _zeros(place: str, like: Tensor, size: int) -> dict[str, Tensor]:
    hidden = like.shape[1]
    return {
        f"{place}.gate_proj.weight": like.new_zeros(size, hidden).detach(),
        f"{place}.up_proj.weight": like.new_zeros(size, hidden).detach(),
        f"{place}.down_proj.weight": like.new_zeros(hidden, size).detach(),
    }


def _replicate(tensors: dict[str, Tensor], place: str, facts: Facts) -> None:
    """A dense MLP as ``E`` equal experts: whichever a token visits, and weights that sum to one, give the same."""
    gate_FD, up_FD, down_DF = (tensors.pop(f"{place}.{part}_proj.weight") for part in ("gate", "up", "down"))
    tensors[f"{place}.gate.weight"] = gate_FD.new_zeros(facts.num_experts, facts.hidden_size)
    fused = torch.cat([gate_FD, up_FD])
    tensors[f"{place}.experts.gate_up_proj"] = fused.expand(facts.num_experts, -1, -1)
    tensors[f"{place}.experts.down_proj"] = down_DF.expand(facts.num_experts, -1, -1)

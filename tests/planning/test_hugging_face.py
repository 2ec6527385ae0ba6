"""Plans of Hugging Face models: sizes from the config alone are those of the real ones, and so is what layers keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moectl.config.schema import MoEConfig
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.shape import HFShape
from moectl.hf.upcycle import upcycle
from moectl.planning.anatomy import Anatomy, anatomy
from moectl.planning.memory import kept_per_token
from tests.hf.tiny_models import KINDS, tiny

ROWS, LENGTH = 6, 96
MOES: list[dict[str, Any] | None] = [None, {"router": "top1"}, {"router": "top2", "n_shared_experts": 1}]
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


def real(kind: str, num_layers: int, moe: dict[str, Any] | None, **changes: Any) -> HFLanguageModel:
    """Wide enough that norms and routers are not most of it."""
    if kind == "gpt2":
        shape: dict[str, Any] = {"n_layer": num_layers, "n_embd": 64, "n_positions": 128}
    else:
        shape = {
            "num_hidden_layers": num_layers, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16,
            "max_position_embeddings": 128,
        }  # fmt: skip
    model = tiny(kind, torch.float32, **shape, **changes)
    if moe is not None:
        upcycle(model, MoEConfig.model_validate({"num_experts": 4, "layers": "all", **moe}))
    return HFLanguageModel(model)


def planned(model: HFLanguageModel) -> Anatomy:
    return anatomy(HFShape.of(model.describe()), LENGTH)


@pytest.mark.parametrize("moe", MOES, ids=["dense", "top1", "top2, shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_flops_are_those_of_the_real_model(kind: str, moe: dict[str, Any] | None) -> None:
    # The counter sees the products of plain attention and of experts one by one.
    loop = None if moe is None else {**moe, "backend": "loop"}
    model = real(kind, 3, loop, attn_implementation="eager").eval()
    plan = planned(model)
    assert plan.parameters.total == sum(parameter.numel() for parameter in model.parameters())
    assert sum(plan.parts.values()) == plan.parameters.total
    assert ("head" in plan.parts) is not model.config.tie_word_embeddings
    layers = model.family.layers_of(model.model)
    assert [sum(split) for split in plan.layers] == [sum(p.numel() for p in layer.parameters()) for layer in layers]
    if moe is not None:
        wider = HFShape.of(model.describe()).with_moe(None)
        assert anatomy(wider, LENGTH).parameters.total == sum(p.numel() for p in real(kind, 3, None).parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(2, 61, (ROWS, LENGTH)))
    counted = counter.get_total_flops() / (ROWS * LENGTH)
    assert plan.flops.total == pytest.approx(counted, rel=0.02)


def test_shared_experts_compute_every_token_whatever_the_schedule() -> None:
    """GPT-2's experts have two matrices: half of the run one expert, half of it two, and one shared."""
    schedule = {"top_k": {"points": [[0.0, 1], [0.5, 2]], "interpolate": "constant"}}
    moe = {"router": {"name": "topk", "top_k": 2}, "n_shared_experts": 1, "schedule": schedule}
    plan = planned(real("gpt2", 3, moe))
    one = 2 * 2 * 64 * 256
    assert plan.flops.experts == pytest.approx(3 * (1.5 + 1) * one, rel=1e-3)


def saved_bytes(model: HFLanguageModel) -> int:
    """Bytes that autograd keeps of one training forward: every storage once, parameters not."""
    model.train()
    for layer in model.moe_layers().values():
        layer.experts.accumulate_gradients_in_place()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor  # held, so that no address is used twice
        return tensor

    ids = torch.randint(2, 61, (ROWS, LENGTH))
    documents = (torch.arange(LENGTH) // 40).expand(ROWS, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.lm_loss_sum(ids, ids, documents)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("moe", MOES[:2], ids=["dense", "top1"])
@pytest.mark.parametrize(("kind", "changes"), [("gpt2", {}), ("gpt2", WITHOUT_DROPOUT), *((k, {}) for k in KINDS[1:])])
def test_a_layer_keeps_what_autograd_saves(kind: str, changes: dict[str, Any], moe: dict[str, Any] | None) -> None:
    """The difference of two layers and one. A dense layer exactly; 5 % for experts: losses of the router, which the
    formula counts and this forward does not make, are most of it."""
    model = real(kind, 2, moe, **changes)
    measured = (saved_bytes(model) - saved_bytes(real(kind, 1, moe, **changes))) / (4 * ROWS * LENGTH)
    plan = planned(model)
    assert kept_per_token(plan, plan.moe, "cpu") == pytest.approx(measured, rel=0.05 if moe else 1e-9)

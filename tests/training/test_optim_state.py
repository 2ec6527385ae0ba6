"""Optimizer states by name: resumed training is the uninterrupted one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from moectl.errors import CheckError
from moectl.training.optim_state import pack_optimizer, unpack_optimizer
from moectl.training.rng import restore_rng, rng_state
from moectl.training.state import load_checkpoint, load_model_strict, save_checkpoint

torch.set_num_threads(1)


class Tiny(nn.Module):
    """Tied embedding and head, a matrix in bfloat16, and a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.norm = nn.LayerNorm(6)
        self.inner = nn.Linear(6, 6, bias=False).bfloat16()
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.embed(ids)), 0.2)
        return self.head(x + self.inner(x.bfloat16()).float())


def two_groups(model: Tiny) -> list[dict]:
    matrices = [param for param in model.parameters() if param.ndim == 2]
    rest = [param for param in model.parameters() if param.ndim != 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


def matrices(model: Tiny) -> list[Tensor]:
    return [param for param in model.parameters() if param.ndim == 2]


OPTIMIZERS: dict[str, Callable[[Tiny], Optimizer]] = {
    "adamw": lambda model: AdamW(two_groups(model), lr=1e-2, betas=(0.9, 0.95)),
    "adamw_amsgrad_loop": lambda model: AdamW(two_groups(model), lr=1e-2, amsgrad=True, foreach=False),
    "adamw_fused": lambda model: AdamW(two_groups(model), lr=1e-2, fused=True),
    "adamw_tensor_lr": lambda model: AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False),
    "adamw_names": lambda model: AdamW(model.named_parameters(), lr=1e-2),
    "sgd": lambda model: SGD(two_groups(model), lr=1e-1),
    "sgd_momentum": lambda model: SGD(two_groups(model), lr=1e-1, momentum=0.9, nesterov=True),
    "muon": lambda model: Muon(matrices(model), lr=1e-2),
    "adafactor": lambda model: Adafactor(model.parameters(), lr=1e-2),
}


def train(model: Tiny, optimizer: Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        for group in optimizer.param_groups:  # a schedule, as in training
            group["lr"] = group["lr"] * 0.9
        ids = torch.randint(0, 7, (4, 9)).to(model.unused.device)  # from the global generator, as dropout
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(step).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_steps_and_five_after_resume_are_ten(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = Tiny()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = OPTIMIZERS[name](model)
    generators = rng_state()
    whole = train(model, optimizer, 0, 10)

    restore_rng(generators)
    first = Tiny()
    load_model_strict(first, start)
    restore_rng(generators)
    before = OPTIMIZERS[name](first)
    losses = train(first, before, 0, 5)
    tensors, state = pack_optimizer(before, first.named_parameters())
    parts = {"model": first.state_dict(), "optimizer": tensors, "rng": rng_state()}
    folder = save_checkpoint(tmp_path, 5, parts, {"optimizer": state}, keep=1)
    train(first, before, 5, 7)  # the process goes on, and is then forgotten

    loaded = load_checkpoint(folder)
    resumed = Tiny()
    after = OPTIMIZERS[name](resumed)
    load_model_strict(resumed, loaded.tensors["model"])
    unpack_optimizer(after, resumed.named_parameters(), loaded.tensors["optimizer"], loaded.state["optimizer"])
    restore_rng(loaded.tensors["rng"])
    kept = {key: value.clone() for key, value in loaded.tensors["optimizer"].items()}
    losses += train(resumed, after, 5, 10)

    assert losses == whole
    for key, value in model.state_dict().items():
        assert torch.equal(bits(resumed.state_dict()[key]), bits(value)), key
    assert not torch.equal(model.embed.weight, start["embed.weight"])
    final, final_state = pack_optimizer(after, resumed.named_parameters())
    expected, expected_state = pack_optimizer(optimizer, model.named_parameters())
    assert final_state == expected_state and final.keys() == expected.keys()
    for key, value in expected.items():
        assert final[key].dtype == value.dtype and torch.equal(bits(final[key]), bits(value)), key
    for key, value in kept.items():
        assert torch.equal(bits(loaded.tensors["optimizer"][key]), bits(value)), "training leaves the loaded alone"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_states_go_back_to_the_device_they_were_on(tmp_path: Path, options: dict) -> None:
    def build(model: Tiny) -> Optimizer:
        return AdamW(two_groups(model), lr=1e-2, **options)

    model = Tiny().cuda()
    optimizer = build(model)
    train(model, optimizer, 0, 2)
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    parts = {"model": model.state_dict(), "optimizer": tensors, "rng": rng_state()}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 2, parts, state, keep=1))
    resumed = Tiny().cuda()
    after = build(resumed)
    load_model_strict(resumed, loaded.tensors["model"])
    unpack_optimizer(after, resumed.named_parameters(), loaded.tensors["optimizer"], loaded.state)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state.get(theirs, {}).items():
            assert after.state[ours][key].device == value.device
    expected = train(model, optimizer, 2, 4)
    restore_rng(loaded.tensors["rng"])
    assert train(resumed, after, 2, 4) == expected


def stepped(make: Callable[[Tiny], Optimizer] = OPTIMIZERS["adamw"]) -> tuple[Tiny, Optimizer]:
    model = Tiny()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    return model, optimizer


def test_what_is_packed() -> None:
    model, optimizer = stepped()
    tensors, state = pack_optimizer(optimizer, dict(model.named_parameters()))
    assert tensors["embed.weight/step"].dtype == torch.float32 and tensors["embed.weight/step"].shape == ()
    assert tensors["inner.weight/exp_avg"].dtype == torch.bfloat16
    assert state["params"]["unused"]["state"] is None, "no gradient, no state"
    assert state["groups"][0]["params"] == ["embed.weight", "inner.weight"]
    assert state["groups"][0]["values"]["betas"] == (0.9, 0.95)
    assert not [key for key in tensors if key.startswith("head")], "tied parameters once"


def test_float32_moments_of_a_bfloat16_parameter_stay() -> None:
    """torch's own load_state_dict would cast them."""
    model, optimizer = stepped()
    moment = torch.randn(6, 6)
    optimizer.state[model.inner.weight]["exp_avg"] = moment.clone()
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    other = Tiny()
    fresh = OPTIMIZERS["adamw"](other)
    unpack_optimizer(fresh, other.named_parameters(), tensors, state)
    assert torch.equal(fresh.state[other.inner.weight]["exp_avg"], moment)
    assert fresh.state[other.inner.weight]["exp_avg"].data_ptr() != tensors["inner.weight/exp_avg"].data_ptr()


def test_names_decide_not_positions() -> None:
    model, optimizer = stepped()
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    other = Tiny()
    groups = two_groups(other)
    for group in groups:
        group["params"].reverse()
    fresh = AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    unpack_optimizer(fresh, other.named_parameters(), tensors, state)
    assert torch.equal(fresh.state[other.embed.weight]["exp_avg"], tensors["embed.weight/exp_avg"])
    assert torch.equal(fresh.state[other.norm.bias]["exp_avg"], tensors["norm.bias/exp_avg"])


def test_every_problem_is_listed_and_nothing_is_changed() -> None:
    model, optimizer = stepped()
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    tensors = dict(tensors)
    del tensors["norm.bias/exp_avg_sq"]
    tensors["ghost/exp_avg"] = torch.ones(1)

    other = Tiny()
    other.norm = nn.LayerNorm(5)
    other.extra = nn.Parameter(torch.ones(2))
    del other.unused
    fresh = AdamW(two_groups(other), lr=7.0)
    fresh.param_groups[0]["mystery"] = 1
    with pytest.raises(CheckError) as caught:
        unpack_optimizer(fresh, other.named_parameters(), tensors, state)
    for line in (
        "missing tensor: norm.bias/exp_avg_sq",
        "unexpected tensor: ghost/exp_avg",
        "missing parameter of group 1: extra",
        "unexpected parameter of group 1: unused",
        "missing option of group 0: mystery",
        "norm.weight is [6] torch.float32 in the checkpoint, [5] torch.float32 in the model",
    ):
        assert line in caught.value.message
    assert caught.value.exit_code == 3
    assert not fresh.state and fresh.param_groups[0]["lr"] == 7.0


@pytest.mark.parametrize("vouched", [False, True])
@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("norm.bias/exp_avg", lambda tensor: tensor[:3]),
        ("norm.bias/exp_avg_sq", Tensor.double),
        ("embed.weight/step", lambda tensor: tensor[None]),
        ("embed.weight/step", Tensor.long),
        ("inner.weight/exp_avg", Tensor.half),
    ],
)
def test_a_moment_of_another_shape_or_dtype_reaches_no_kernel(
    key: str, change: Callable[[Tensor], Tensor], vouched: bool
) -> None:
    """Whether or not the JSON beside it was changed to agree."""
    model, optimizer = stepped(OPTIMIZERS["adamw_fused"])
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    tensors = tensors | {key: change(tensors[key]).clone()}
    if vouched:
        name, _, part = key.partition("/")
        state["params"][name]["state"]["tensors"][part] = f"{list(tensors[key].shape)} {tensors[key].dtype}"
    fresh = OPTIMIZERS["adamw_fused"](other := Tiny())
    with pytest.raises(CheckError, match=f"differs: {key} is"):
        unpack_optimizer(fresh, other.named_parameters(), tensors, state)
    assert not fresh.state


def test_a_moment_that_is_missing_in_both_is_named() -> None:
    model, optimizer = stepped()
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    del tensors["norm.bias/exp_avg_sq"], state["params"]["norm.bias"]["state"]["tensors"]["exp_avg_sq"]
    fresh = OPTIMIZERS["adamw"](other := Tiny())
    with pytest.raises(CheckError, match=r"norm\.bias has the state exp_avg, step"):
        unpack_optimizer(fresh, other.named_parameters(), tensors, state)


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adamw_names"]], ids=["class", "groups"])
def test_another_optimizer_is_refused(make: Callable[[Tiny], Optimizer]) -> None:
    model, optimizer = stepped()
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    with pytest.raises(CheckError, match=r"holds AdamW with 2 parameter group\(s\), this run uses"):
        unpack_optimizer(make(model), model.named_parameters(), tensors, state)


def test_nameless_parameters_and_strange_state_are_refused() -> None:
    model, optimizer = stepped()
    named = [pair for pair in model.named_parameters() if pair[0] != "inner.weight"]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \[6, 6\] has no name"):
        pack_optimizer(optimizer, named)
    optimizer.state[model.norm.bias]["history"] = [torch.ones(1)]
    with pytest.raises(ValueError, match=r"norm\.bias/history"):
        pack_optimizer(optimizer, model.named_parameters())

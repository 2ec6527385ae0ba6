"""Generator states come back so exactly that the next draws are the same."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from moectl.errors import CheckError, MissingDependencyError
from moectl.training.rng import restore_rng, rng_state
from moectl.training.state import load_checkpoint, save_checkpoint

CUDA = torch.cuda.is_available()


def draws() -> list[object]:
    values: list[object] = [
        random.random(),
        random.gauss(0, 1),
        random.getrandbits(77),
        random.sample(range(99), 9),
    ]
    values += [np.random.normal(), np.random.rand(), np.random.permutation(50).tolist()]
    values += [torch.randn(33).tolist(), torch.rand(3, dtype=torch.float64).tolist()]
    values += [torch.randperm(40).tolist(), torch.bernoulli(torch.full((20,), 0.5)).tolist()]
    if CUDA:
        values += [torch.randn(33, device="cuda").tolist(), torch.rand(5, device="cuda").tolist()]
    return values


@pytest.mark.parametrize("pending", [0, 1], ids=["no gauss pending", "a gauss pending"])
@pytest.mark.parametrize("seed", [0, 2**31])
def test_round_trip_through_a_checkpoint(tmp_path: Path, seed: int, pending: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    draws()
    random.seed(seed + 1), np.random.seed(seed + 1)
    for _ in range(pending):  # both draw normal numbers in pairs
        random.gauss(0, 1), np.random.normal()
    assert (random.getstate()[2] is not None) == bool(pending)
    state = rng_state()
    assert {tensor.dtype for tensor in state.values()} == {torch.int64, torch.uint8}
    assert ("cuda.0" in state) == CUDA
    folder = save_checkpoint(tmp_path, 1, {"rng": state}, {}, keep=1)
    python = random.getstate()
    expected = [draws() for _ in range(3)]
    random.seed(99), np.random.seed(98), torch.manual_seed(97)
    assert draws() != expected[0]
    restore_rng(load_checkpoint(folder).tensors["rng"])
    assert random.getstate() == python
    assert all(torch.equal(tensor, state[name]) for name, tensor in rng_state().items())
    assert [draws() for _ in range(3)] == expected


def test_what_does_not_fit_changes_nothing() -> None:
    state = rng_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    random.random(), np.random.rand(), torch.rand(1)
    moved = rng_state()
    without = {name: tensor for name, tensor in state.items() if name != "numpy"}
    wrong = [
        (without, CheckError, "numpy"),
        (state | {"jax": state["torch"]}, CheckError, "jax"),
        (state | {"python": state["python"][:-1]}, CheckError, "'python'"),
        (state | {"torch": state["torch"][:-1]}, CheckError, "'torch'"),
        (state | {"numpy": state["numpy"].double()}, CheckError, "'numpy'"),
        (state | {"cuda.63": state["torch"]}, MissingDependencyError, r"cuda\.63"),
    ]
    for broken, kind, match in wrong:
        with pytest.raises(kind, match=match):
            restore_rng(broken)
        assert all(torch.equal(tensor, moved[name]) for name, tensor in rng_state().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_another_numpy_generator_is_refused() -> None:
    original = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        with pytest.raises(ValueError, match="MT19937"):
            rng_state()
    finally:
        np.random.set_bit_generator(original)
    assert rng_state().keys() >= {"python", "numpy", "torch"}

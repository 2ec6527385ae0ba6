"""The state of every random generator that training draws from, as tensors (no pickle), exactly.

Python's ``random``, NumPy's global generator, torch's CPU generator and, once CUDA is in use, that of each
CUDA device of this process. Numbers only: int64 or uint8, so they live in a safetensors file.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moectl.errors import CheckError, MissingDependencyError

_MT = 624  # words of a Mersenne Twister
# python: version, 624 words, position, gauss pending?, gauss bits. numpy: the same without a version.
_SHAPES = {"python": (_MT + 4,), "numpy": (_MT + 3,)}
_CUDA = "cuda."


def rng_state() -> dict[str, Tensor]:
    """``{"python": int64 [628], "numpy": int64 [627], "torch": uint8 [n], "cuda.0": uint8 [n], ...}``."""
    version, words, gauss = random.getstate()
    state = {"python": torch.tensor([version, *words, *_pack(gauss)], dtype=torch.int64)}
    twister = np.random.get_state(legacy=False)
    if not isinstance(twister, dict) or twister["bit_generator"] != "MT19937":
        raise ValueError("NumPy's global generator is not the MT19937 it starts with; it cannot be saved")
    inner = twister["state"]
    pending = _pack(float(twister["gauss"]) if twister["has_gauss"] else None)
    numbers = [*(int(word) for word in inner["key"]), int(inner["pos"]), *pending]
    state["numpy"] = torch.tensor(numbers, dtype=torch.int64)
    state["torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        for device, generator in enumerate(torch.cuda.get_rng_state_all()):
            state[f"{_CUDA}{device}"] = generator
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Put every generator back to where :func:`rng_state` found it; all of them, or none.

    Raises:
        CheckError: a generator is missing, unknown, or not of the right shape.
        MissingDependencyError: it holds a CUDA device that this machine has not.
    """
    cuda = {name: tensor for name, tensor in state.items() if name.startswith(_CUDA)}
    plain = state.keys() - cuda.keys()
    expected = {"python", "numpy", "torch"}
    if plain != expected:
        raise CheckError(f"generator states are missing or unexpected: {', '.join(sorted(plain ^ expected))}")
    for name, shape in (*_SHAPES.items(), ("torch", tuple(torch.get_rng_state().shape))):
        dtype = torch.uint8 if name == "torch" else torch.int64
        if tuple(state[name].shape) != shape or state[name].dtype != dtype:
            raise CheckError(f"the state of generator '{name}' is not {dtype} {list(shape)}")
    count = torch.cuda.device_count() if cuda else 0
    known = {f"{_CUDA}{device}": device for device in range(count)}
    if absent := sorted(cuda.keys() - known):
        raise MissingDependencyError(
            f"the checkpoint holds the generator of {absent[0]}, and this machine has {count} CUDA devices",
            "Resume on a machine with the devices that the run was trained on.",
        )

    version, *words, pending, bits = state["python"].tolist()
    random.setstate((version, tuple(words), _unpack(pending, bits)))
    *key, position, pending, bits = state["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": position},
            "has_gauss": pending,
            "gauss": _unpack(pending, bits) or 0.0,
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    for name, tensor in cuda.items():
        torch.cuda.set_rng_state(tensor.cpu(), known[name])


def _pack(gauss: float | None) -> tuple[int, int]:
    """The second of a pair of normal numbers, drawn but not yet handed out: pending?, its 64 bits."""
    return (0, 0) if gauss is None else (1, struct.unpack("<q", struct.pack("<d", gauss))[0])


def _unpack(pending: int, bits: int) -> float | None:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0]) if pending else None

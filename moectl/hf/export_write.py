"""A checkpoint folder in Hugging Face's layout, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors as safetensors, in shards with an index where they are more than ``shard_bytes``.

    What was there before is removed. A tensor is made contiguous, and cast, only while its shard is written.

    Args:
        dtype: of the parameters; a bias for the choice of experts stays in float32. None: as they are.

    Returns:
        The bytes of all tensors.
    """
    for old in (*folder.glob("*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    wanted = {name: _dtype_of(name, tensor, dtype) for name, tensor in tensors.items()}
    sizes = {name: tensor.numel() * wanted[name].itemsize for name, tensor in tensors.items()}
    shards = _shards(sizes, shard_bytes)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made: dict[str, Tensor] = {}
        for name in names:
            tensor = _own(tensors[name], wanted[name])
            shared = any(tensor.data_ptr() == other.data_ptr() for other in made.values() if tensor.numel())
            made[name] = tensor.clone() if shared else tensor  # equal experts, say: one tensor in memory
        save_file(made, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        files |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    return total


def write_json(file: Path, value: Any) -> None:
    """As transformers writes its own: two spaces, a newline at the end."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, as many in each shard as fit; at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _dtype_of(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    keeps = dtype is None or name.endswith("e_score_correction_bias") or not tensor.is_floating_point()
    return tensor.dtype if keeps else dtype  # type: ignore[return-value]


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, contiguous and in memory of its own, as safetensors wants it."""
    made = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return made.clone() if made.untyped_storage().nbytes() != made.numel() * made.itemsize else made


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

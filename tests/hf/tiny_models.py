"""Tiny dense models of transformers, made from configs: each family that is upcycled, and no network."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 61
KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
_CONFIGS = {
    "llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
}  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.float64, *, seed: int = 0, **changes: Any) -> Any:
    """Three layers of width 32, weights large enough that attention and MLPs matter, biases and norms too. In eval."""
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    if kind == "gpt2":
        shape = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        config: Any = transformers.GPT2Config(**{**shape, **special, **changes})
    else:
        shape = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        }  # fmt: skip
        config = getattr(transformers, _CONFIGS[kind])(**{**shape, **special, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # not the buffers: a loaded model keeps its rotary frequencies in float32
            parameter.data = parameter.data.to(dtype)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def some_ids(rows: int = 3, length: int = 17, seed: int = 1) -> Tensor:
    """Ids of no special token."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padding() -> tuple[Tensor, Tensor]:
    """Ids with padding on the left of two rows, and their attention mask."""
    ids, mask = some_ids(), torch.ones(3, 17, dtype=torch.int64)
    mask[0, :5], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask

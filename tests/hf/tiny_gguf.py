"""A tiny Llama with a byte-level tokenizer as a GGUF file, written as llama.cpp's converter writes one."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tests.hf.tiny_models import tiny

_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(file: Path, tokenizer: Tokenizer, *, architecture: str = "llama", cut: str = "smollm") -> Any:
    """Writes ``file``; returns the model of transformers that it holds, in float32."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    model = tiny("llama", torch.float32, vocab_size=len(vocabulary), tie_word_embeddings=True, rms_norm_eps=1e-5)
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    _add_tokenizer(writer, tokenizer, vocabulary, cut)
    tensors = model.state_dict()
    _add(writer, "token_embd.weight", tensors["model.embed_tokens.weight"])
    _add(writer, "output_norm.weight", tensors["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in _NAMES.items():
            tensor = tensors[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(ours)
            _add(writer, f"blk.{layer}.{ours}.weight", tensor if heads is None else _permuted(tensor, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, gguf_file: Path, *, name: str = "tiny-base", version: str = "0.1") -> Path:
    """A wheel that carries a GGUF file and a licence, as pip takes it from a folder of wheels."""
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, f"{package}/tiny.gguf")
        archive.writestr(f"{info}/LICENSE", "Do what you like.\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocabulary: dict[str, int], cut: str) -> None:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(vocabulary) - 1)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy()))


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp pairs neighbouring columns where transformers pairs halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)

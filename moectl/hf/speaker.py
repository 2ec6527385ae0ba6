"""A model that generates token by token and tells who computed what: ours, upcycled, or any checkpoint folder.

Shape suffixes: B rows (1 here), S new tokens, T tokens of a call, K experts per token, E experts, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import CheckError, ConfigError, MoectlError
from moectl.hf.attention import new_cache
from moectl.hf.export_config import MODELING
from moectl.hf.folder import MODEL_TYPE
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.opened import Block, open_folder
from moectl.hf.refusals import quiet_transformers
from moectl.models.cache import KVCache
from moectl.models.decoder import Decoder
from moectl.models.generation import Route
from moectl.models.language_model import LanguageModel

CONFIG = "config.json"
#: Takes the ids ``[B, S]`` that are new since its last call, and returns the logits ``[B, V]`` after them.
Continue = Callable[[Tensor], Tensor]


class LanguageModelSpeaker:
    """One of moectl's own models: a decoder, or a model of transformers with or without our experts."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval()
        self.num_experts = {number: layer.experts.num_experts for number, layer in model.moe_layers().items()}
        self.vocab_size, self.max_length = model.vocab_size, model.max_length
        self.ends = ends_of(model.config) if isinstance(model, HFLanguageModel) else _one(model.eos_token_id)

    def start(self) -> Continue:
        """A fresh cache."""
        if isinstance(self.model, HFLanguageModel):
            return self._continue(new_cache(self.model.config), self.model.model.get_output_embeddings())
        assert isinstance(self.model, Decoder)
        return self._continue(KVCache(self.model.num_layers), self.model.lm_head)

    def _continue(self, cache: Any, head: nn.Module) -> Continue:
        def last_logits(ids_BS: Tensor) -> Tensor:
            hidden_BSD = self.model.hidden_states(ids_BS, cache=cache)
            logits_BV: Tensor = head(hidden_BSD[:, -1])
            return logits_BV

        return last_logits

    def routes(self) -> dict[int, Route]:
        """Of the last call, by layer."""
        found = {}
        for number, layer in self.model.moe_layers().items():
            routing = layer.routing
            assert routing is not None
            found[number] = Route(routing.topk_indices, routing.topk_weights, routing.router_probs_clean, routing.keep)
        return found


class CheckpointSpeaker:
    """A model of transformers as it stands in a folder, dense or with experts of its own."""

    def __init__(self, model: Any, blocks: dict[int, Block], *, sigmoid: bool) -> None:
        self.model = model.eval()
        self.num_experts = {number: int(block.gate.shape[0]) for number, block in blocks.items()}
        config = model.config.get_text_config()
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        positions = getattr(config, "max_position_embeddings", None)
        self.max_length = None if positions is None else int(positions)
        self.ends = ends_of(config) | ends_of(getattr(model, "generation_config", None))
        self._sigmoid = sigmoid
        self._logits: dict[int, Tensor] = {}
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}
        for number, block in blocks.items():
            self._watch(number, block)

    def start(self) -> Continue:
        """A fresh cache."""
        cache = new_cache(self.model.config)

        def last_logits(ids_BS: Tensor) -> Tensor:
            out = self.model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits_BV: Tensor = out.logits[:, -1]
            return logits_BV

        return last_logits

    def routes(self) -> dict[int, Route]:
        """Of the last call, by layer."""
        found = {}
        for number, (indices_TK, weights_TK) in self._handed.items():
            logits_TE = self._logits[number].float()
            scores_TE = nn.functional.logsigmoid(logits_TE) if self._sigmoid else logits_TE
            found[number] = Route(indices_TK, weights_TK, torch.softmax(scores_TE, dim=-1))
        return found

    def _watch(self, number: int, block: Block) -> None:
        def routed(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self._logits[number] = first.reshape(-1, first.shape[-1])

        def handed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            indices_TK = next(value for value in given if value.dtype == torch.int64)
            weights_TK = [value for value in given if value.is_floating_point() and value.shape == indices_TK.shape]
            self._handed[number] = (indices_TK, weights_TK[-1])

        block.router.register_forward_hook(routed)
        block.experts.register_forward_pre_hook(handed, with_kwargs=True)


Speaker = LanguageModelSpeaker | CheckpointSpeaker


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the config of a model that is not moectl's own upcycled one."""
    plain = _config(folder)
    return plain is not None and plain.get("model_type") != MODEL_TYPE


def open_checkpoint(folder: Path) -> CheckpointSpeaker:
    """The model of a folder that ``moectl export`` or transformers wrote. No code of the folder is run.

    Raises:
        ConfigError, MoectlError: an architecture that is not known, no weights, or files that do not load.
        CheckError: weights are missing, or it brings a modelling file that is not the one moectl writes.
    """
    plain = _config(folder) or {}
    moe = plain.get("moe")
    if isinstance(moe, dict) and f"{MODELING}.py" in {file.name for file in folder.iterdir()}:
        model = _with_our_code(folder, plain)
        layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        mlps = {number: layers[number].mlp for number in moe["layers"]}
        blocks = {n: Block(f"layer {n}", mlp, mlp.gate, mlp.experts, moe["top_k"]) for n, mlp in mlps.items()}
        return CheckpointSpeaker(model, blocks, sigmoid=moe.get("score") == "sigmoid")
    if plain.get("auto_map"):
        raise ConfigError(
            f"{folder} brings code of its own, which moectl does not run",
            "Generate with transformers itself, if you trust it (trust_remote_code=True).",
        )
    opened = open_folder(folder)
    if opened.skipped:
        raise CheckError(
            f"the weights in {folder} do not fit its config: {'; '.join(opened.skipped[:3])}", "Fetch the folder again."
        )
    sigmoid = any("e_score_correction_bias" in dict(block.router.named_buffers()) for block in opened.blocks.values())
    return CheckpointSpeaker(opened.model, opened.blocks, sigmoid=sigmoid)


def ends_of(config: Any) -> frozenset[int]:
    """The tokens that end a text, by a config of transformers: none, one or several."""
    given = getattr(config, "eos_token_id", None)
    return frozenset(int(each) for each in given) if isinstance(given, (list, tuple)) else _one(given)


def _one(token: int | None) -> frozenset[int]:
    return frozenset() if token is None or token < 0 else frozenset({int(token)})


def _with_our_code(folder: Path, plain: dict[str, Any]) -> Any:
    """A folder with its own modelling file, by moectl's copy of that file."""
    from moectl.hf import modeling_experts

    file = folder / f"{MODELING}.py"
    made = getattr(modeling_experts, str((plain.get("architectures") or [""])[0]), None)
    if made is None or file.read_bytes() != Path(modeling_experts.__file__).read_bytes():
        raise CheckError(
            f"{file} is not the file that this moectl writes, and moectl runs no code of a folder",
            "Export the model again, or generate with transformers itself (trust_remote_code=True).",
        )
    try:
        with quiet_transformers():
            model, info = made.from_pretrained(folder, dtype="auto", local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise MoectlError(f"{folder} does not load: {str(error).splitlines()[0]}", "Export the model again.") from error
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise CheckError(f"the weights in {folder} lack {', '.join(missing[:3])}", "Export the model again.")
    return model.float() if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()) else model


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        plain = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None

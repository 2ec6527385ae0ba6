"""A model folder in Hugging Face's layout, opened to be looked at: on the CPU, its MoE blocks found.

Blocks are found by what they are made of, not by their class: a child ``experts`` with stacked parameters
``[E, ...]`` beside a child (``gate`` or ``router``) with a weight ``[E, D]``. That is the layout of every stacked
family of transformers 5.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moectl.errors import ConfigError, MoectlError, did_you_mean
from moectl.hf.checkpoint_files import CONFIG, PICKLES, find_tensors, json_object
from moectl.hf.refusals import quiet_transformers

_EXPERTISE = re.compile(r"(MoE|MoeBlock|Router|Experts)$")  # how transformers' classes of such parts end
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Block:
    """One MoE block.

    Attributes:
        name: of the module in the model.
        block: router and experts, ``[B, S, D] -> [B, S, D]`` or a tuple that starts so.
        router: has the gate ``weight [E, D]``.
        experts: has the stacked parameters.
        top_k: experts per token.
    """

    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    top_k: int

    @property
    def gate(self) -> nn.Parameter:
        weight = self.router.weight
        assert isinstance(weight, nn.Parameter)
        return weight


class Routed(NamedTuple):
    """One block's routing of a call: ``indices`` and ``weights [T, K]``, the router's ``logits [T, E]`` or None."""

    indices: Tensor
    weights: Tensor
    logits: Tensor | None


@dataclass
class Answer:
    """One call of the model.

    Attributes:
        logits: ``[B, S, V]``.
        routes: layer number -> what its experts were handed.
        inputs: layer number -> its block's input ``[B, S, D]``.
        balance: the model's own balance loss, unweighted; None where it has none.
        router_logits: layer number -> ``[T, E]``, what the model says its router's logits are.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    routes: dict[int, Routed] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    balance: Tensor | None = None
    router_logits: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Opened:
    """A loaded model.

    Attributes:
        model: in eval mode, in float32 at least, its experts computed by the ``eager`` back end.
        blocks: layer number -> its MoE block; empty for a dense model.
        architecture: as config.json names it.
        dtypes: parameter and buffer name -> its dtype as loaded, before this module made it float32.
        skipped: names that files or model have and the other has not, in sentences.
        balance_coef: ``router_aux_loss_coef``, or None.
        balance_on: ``output_router_logits``: without it the balance loss is never computed.
        layers: number of the model's layers.
        vocab_size: of its embeddings.
    """

    model: nn.Module
    blocks: dict[int, Block]
    architecture: str
    dtypes: dict[str, torch.dtype]
    skipped: list[str]
    balance_coef: float | None
    balance_on: bool
    layers: int
    vocab_size: int

    def call(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Answer:
        """Run ``[B, S]`` in the model's present mode; gradients as the caller has them."""
        answer = Answer()
        extra: dict[str, Any] = {"output_router_logits": True} if self.blocks and self.balance_coef is not None else {}
        with ExitStack() as stack:
            for number, block in self.blocks.items():
                self._watch(stack, number, block, answer)
            out = self.model(input_ids, attention_mask=attention_mask, use_cache=False, **extra)
        answer.logits = out.logits
        balance = getattr(out, "aux_loss", None)
        answer.balance = balance if isinstance(balance, Tensor) else None
        recorded = getattr(out, "router_logits", None) or ()
        if len(recorded) == len(self.blocks):
            answer.router_logits = {
                number: logits.reshape(-1, logits.shape[-1])
                for number, logits in zip(self.blocks, recorded, strict=True)
            }
        return answer

    def _watch(self, stack: ExitStack, number: int, block: Block, answer: Answer) -> None:
        """Keep what passes a block: its input, the router's answer, and what the experts are handed."""
        logits: list[Tensor] = []

        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            answer.inputs[number] = (args[0] if args else kwargs["hidden_states"]).detach()

        def routed(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and first.shape[-1] == block.gate.shape[0]:
                logits.append(first.reshape(-1, first.shape[-1]))

        def handed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            indices = next((value for value in given if value.dtype == torch.int64 and value.dim() == 2), None)
            if indices is None:
                return
            weights = [v for v in given if v.is_floating_point() and v.shape == indices.shape]
            if weights:
                answer.routes[number] = Routed(indices, weights[-1], logits[-1] if logits else None)

        stack.callback(block.block.register_forward_pre_hook(entered, with_kwargs=True).remove)
        stack.callback(block.router.register_forward_hook(routed).remove)
        stack.callback(block.experts.register_forward_pre_hook(handed, with_kwargs=True).remove)


def is_model_folder(folder: Path) -> bool:
    """Whether there is a config.json of a model, or weights without one."""
    return folder.is_dir() and (
        (folder / CONFIG).is_file() or any(file.suffix in (".safetensors", *PICKLES) for file in folder.iterdir())
    )


def open_folder(folder: Path) -> Opened:
    """Load the model of a folder with config.json and safetensors files.

    Nothing is fetched, no code of the folder is run, and pickled weights are refused.

    Raises:
        ConfigError: no config.json, or an architecture that is not known (exit 2).
        MoectlError: see :func:`moectl.hf.checkpoint_files.find_tensors`.
    """
    plain = _read_config(folder)
    find_tensors(
        folder
    )  # transformers would read a pickle, leave the folder, or fail on a damaged file in its own words
    architecture = _architecture(plain, folder)
    with quiet_transformers():
        model, skipped = _load(folder, architecture)
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    if any(p.dtype.itemsize < 4 for p in model.parameters()):
        model = model.float()
    config = model.config.get_text_config()
    blocks = _blocks(model, config)
    if not blocks and any(_EXPERTISE.search(type(module).__name__) for module in model.modules()):
        raise ConfigError(
            f"the architecture '{architecture}' is not supported: its experts are not stacked parameters beside a gate",
            "moectl looks into models whose experts are stacked, such as Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE,"
            " DeepSeek-V3 and gpt-oss in transformers 5.",
        )
    coefficient = getattr(config, "router_aux_loss_coef", None)
    return Opened(
        model=model,
        blocks=blocks,
        architecture=architecture,
        dtypes=dtypes,
        skipped=skipped,
        balance_coef=None if coefficient is None else float(coefficient),
        balance_on=bool(getattr(config, "output_router_logits", False)),
        layers=int(getattr(config, "num_hidden_layers", 0)),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds weights but no {CONFIG}", "Put the model's config.json beside them.")
    return json_object(folder / CONFIG)


def _architecture(plain: dict[str, Any], folder: Path) -> str:
    """The architecture that config.json names, if transformers knows it as a causal language model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = plain.get("model_type")
    named = next(iter(plain.get("architectures") or ()), None) or kind or "not named"
    known = list(CONFIG_MAPPING.keys())
    if not isinstance(kind, str) or kind not in known:
        hint = did_you_mean(str(kind), known) or "A newer transformers may know it."
        raise ConfigError(
            f"the architecture '{named}' (model_type {kind!r}) of {folder} is not one that transformers knows", hint
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"the architecture '{named}' is not supported: it is no causal language model",
            "Name a folder with a decoder that predicts the next token.",
        )
    return str(named)


def _load(folder: Path, architecture: str) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            experts_implementation="eager",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MoectlError(
            f"transformers cannot load {folder} as '{architecture}': {first}", "Look at its config.json and files."
        ) from error
    model, info = loaded
    return model.eval(), _skipped(info)


def _skipped(info: dict[str, Any]) -> list[str]:
    kinds = {
        "missing_keys": "not in the files, so drawn at random",
        "unexpected_keys": "in the files and not in the model",
        "mismatched_keys": "of another shape in the files",
    }
    found = []
    for key, what in kinds.items():
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in info.get(key) or ())
        found += [f"{name}: {what}" for name in names]
    return found


def _blocks(model: nn.Module, config: Any) -> dict[int, Block]:
    top_k = int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1)
    blocks: dict[int, Block] = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        number = _LAYER.search(f".{name}.")
        if not (isinstance(experts, nn.Module) and isinstance(router, nn.Module) and number):
            continue
        gate = getattr(router, "weight", None)
        stacked = [p for p in experts.parameters() if isinstance(gate, Tensor) and p.shape[:1] == gate.shape[:1]]
        if isinstance(gate, nn.Parameter) and gate.dim() == 2 and stacked:
            blocks[int(number[1])] = Block(name, module, router, experts, top_k)
    return blocks

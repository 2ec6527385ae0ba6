"""Training a part of a model: what is frozen, which experts' rows move, and the count that proves it.

A frozen weight requires no gradient, so that no optimizer group holds it. The rows of single experts cannot be frozen
so, because the experts of a layer are one stacked parameter: their gradients are set to zero before anything reads
them (the norm, clipping, momentum), and the rows are put back, bit for bit, after every optimizer step, which undoes
weight decay and whatever else a rule does to a whole tensor (:class:`FrozenRows`). The optimizer keeps its numbers
for them all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moectl.config.finetuning import FinetuneConfig, LoraConfig
from moectl.errors import CheckError, ConfigError
from moectl.hf import lora as adapters
from moectl.models.language_model import LanguageModel
from moectl.moe.experts import Experts, GatedExperts, MLPExperts
from moectl.moe.layer import MoELayer


@dataclass(frozen=True)
class TrainableReport:
    """How much of a model is trained.

    Attributes:
        asked: parameters that the config asks for, by formula, by part: router, experts, dense, adapters.
        found: parameters that will move, counted in the model.
        total: of the model, adapters included.
    """

    asked: Mapping[str, int]
    found: int
    total: int

    def to_json(self) -> dict[str, Any]:
        return {"asked": dict(self.asked), "found": self.found, "total": self.total}

    def to_text(self) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.asked.items() if count)
        return f"training {self.found:,} of {self.total:,} parameters ({self.found / self.total:.2%}): {parts}"


def apply(model: LanguageModel, finetune: FinetuneConfig) -> TrainableReport:
    """Freeze parts of ``model``, in place, or give it adapters; without a setting nothing changes.

    A frozen router routes as in evaluation while the rest trains: no noise, no schedule of k, and its balancing
    biases and thresholds do not move. ``experts`` are the routed and the shared ones; with ``train_experts`` shared
    experts are frozen too, because they have no number. Norms, embeddings and the head are ``dense``.

    Raises:
        ConfigError: nothing would be left to train; a layer or expert that the model has not; a target of
            adapters that it has not.
        CheckError: another number of parameters would move than was asked for (exit code 3).
        MissingDependencyError: adapters on linear layers without peft.
    """
    layers = model.moe_layers()
    _refuse_unknown(layers, finetune)
    asked = count_asked(model, finetune)
    if finetune.lora is not None:
        adapters.add_adapters(model, finetune.lora)
    elif finetune.active:
        if sum(asked.values()) == 0:
            raise ConfigError("finetune leaves nothing to train: everything is frozen", "Take a part out of freeze.")
        _freeze(model, finetune)
    _refuse_unlearning(layers, asked)
    report = TrainableReport(asked, count_found(model, finetune), sum(p.numel() for p in model.parameters()))
    if finetune.active and report.found != sum(asked.values()):  # a router may freeze its own gate, unasked
        raise CheckError(
            f"{report.found:,} parameters would be trained, where finetune asks for {sum(asked.values()):,}"
            f" ({', '.join(f'{name} {count:,}' for name, count in asked.items())})",
            "A plug-in may keep parameters where moectl does not look for them: freeze less, or report it.",
        )
    return report


def trained_share(parameters: Mapping[str, int]) -> str:
    """A sentence from a run's record: how many of its parameters are trained."""
    share = parameters["trainable"] / parameters["total"]
    return f"training {parameters['trainable']:,} of {parameters['total']:,} parameters ({share:.2%})"


def count_asked(model: LanguageModel, finetune: FinetuneConfig) -> dict[str, int]:
    """Parameters to be trained, by part, from the sizes of a model that :func:`apply` has not touched yet."""
    layers = model.moe_layers()
    routers = sum(p.numel() for layer in layers.values() for p in layer.router.parameters())
    shared = sum(p.numel() for layer in layers.values() for part in _shared(layer) for p in part.parameters())
    if finetune.lora is not None:
        trained = routers if finetune.lora.train_router else 0
        return {"router": trained, "experts": 0, "dense": 0, "adapters": _adapter_size(model, finetune.lora)}
    each = {number: _expert_size(layer.experts) for number, layer in layers.items()}
    routed = sum(each[number] * layer.experts.num_experts for number, layer in layers.items())
    dense = sum(p.numel() for p in model.parameters()) - routers - shared - routed
    chosen = {n: len(finetune.trained_experts(n, layer.experts.num_experts)) for n, layer in layers.items()}
    whole = "experts" not in finetune.freeze and finetune.train_experts is None
    return {
        "router": 0 if "router" in finetune.freeze else routers,
        "experts": sum(each[number] * count for number, count in chosen.items()) + (shared if whole else 0),
        "dense": 0 if "dense" in finetune.freeze else dense,
        "adapters": 0,
    }


def count_found(model: LanguageModel, finetune: FinetuneConfig) -> int:
    """Parameters that require a gradient, less the rows that are put back after every step."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable - FrozenRows(model.moe_layers(), finetune).size


class FrozenRows:
    """The experts of stacked parameters that stay as they are while others of the same tensor move.

    Args:
        layers: MoE layers by layer number.
        finetune: which experts move.
        optimizer: whose steps put them back, whatever it does to whole tensors.
    """

    def __init__(
        self, layers: Mapping[int, MoELayer], finetune: FinetuneConfig, optimizer: Optimizer | None = None
    ) -> None:
        self._rows: list[tuple[nn.Parameter, Tensor]] = []
        self._before: list[Tensor] = []
        for number, layer in layers.items():
            count = layer.experts.num_experts
            frozen = sorted(set(range(count)) - {*finetune.trained_experts(number, count)})
            if frozen and finetune.train_experts is not None:
                rows = torch.tensor(frozen)
                self._rows += [(parameter, rows) for parameter in layer.experts.parameters() if parameter.requires_grad]
        if self._rows and optimizer is not None:
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._put_back)

    @property
    def size(self) -> int:
        """How many numbers they are."""
        return sum(parameter[0].numel() * len(rows) for parameter, rows in self._rows)

    def clear_gradients(self) -> None:
        """Set their gradients to zero: before the norm is taken, or anything clipped."""
        for parameter, rows in self._rows:
            if parameter.grad is not None:
                parameter.grad.index_fill_(0, rows.to(parameter.device), 0.0)

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        self._before = [parameter.index_select(0, rows.to(parameter.device)) for parameter, rows in self._rows]

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for (parameter, rows), values in zip(self._rows, self._before, strict=True):
            parameter.index_copy_(0, rows.to(parameter.device), values)
        self._before = []


def _freeze(model: LanguageModel, finetune: FinetuneConfig) -> None:
    if "dense" in finetune.freeze:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for number, layer in model.moe_layers().items():
        if "router" in finetune.freeze:
            layer.router.freeze()
        else:
            layer.router.requires_grad_(True)
        layer.experts.requires_grad_(bool(finetune.trained_experts(number, layer.experts.num_experts)))
        for part in _shared(layer):
            part.requires_grad_("experts" not in finetune.freeze and finetune.train_experts is None)


def _refuse_unknown(layers: Mapping[int, MoELayer], finetune: FinetuneConfig) -> None:
    given = finetune.train_experts
    if given is None:
        return
    if isinstance(given, dict) and (unknown := sorted(set(given) - set(layers))):
        raise ConfigError(
            f"finetune.train_experts names layer {unknown[0]}, which has no experts",
            f"The layers with experts: {', '.join(map(str, layers))}.",
        )
    for number, layer in layers.items():
        for expert in finetune.trained_experts(number, layer.experts.num_experts):
            if expert >= layer.experts.num_experts:
                raise ConfigError(
                    f"finetune.train_experts names expert {expert}, but layer {number} has {layer.experts.num_experts}",
                    f"They are numbered 0 to {layer.experts.num_experts - 1}.",
                )


def _refuse_unlearning(layers: Mapping[int, MoELayer], asked: Mapping[str, int]) -> None:
    """Where routers alone would train, they must learn from the loss."""
    others = sum(count for part, count in asked.items() if part != "router")
    if asked["router"] and not others and not any(layer.router.learns for layer in layers.values()):
        raise ConfigError(
            "finetune leaves routers alone to train, and these do not learn from the loss", "Freeze less."
        )


def _expert_size(experts: Experts) -> int:
    """Parameters of one expert."""
    hidden, columns = experts.hidden_size, experts.intermediate_size
    if isinstance(experts, GatedExperts):
        return 3 * hidden * columns
    if isinstance(experts, MLPExperts):
        return 2 * hidden * columns + hidden + columns
    return sum(parameter.numel() for parameter in experts.parameters()) // experts.num_experts


def _adapter_size(model: LanguageModel, lora: LoraConfig) -> int:
    """``rank · (inputs + outputs)`` of every adapted matrix; of each expert's own where experts are adapted."""
    assert isinstance(model, nn.Module)
    sizes = [adapters.linear_size(model.get_submodule(name)) for name in adapters.linear_targets(model, lora)]
    size = sum(lora.rank * (inputs + outputs) for inputs, outputs in sizes)
    for layer in model.moe_layers().values() if "experts" in lora.targets else ():
        experts = layer.experts
        up_columns = experts.intermediate_size * (2 if isinstance(experts, GatedExperts) else 1)
        inner = experts.hidden_size + up_columns + experts.intermediate_size + experts.hidden_size
        size += experts.num_experts * lora.rank * inner
    return size


def _shared(layer: MoELayer) -> list[nn.Module]:
    return [] if layer.shared_experts is None else [layer.shared_experts]

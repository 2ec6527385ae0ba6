"""The upcycle receipt: what became of a dense model, measured and counted before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.errors import CheckError
from moectl.hf.exact import exact_copy
from moectl.hf.language_model import HFLanguageModel
from moectl.models.accounting import (
    BACKWARD,
    Flops,
    ParameterCount,
    TransformerShape,
    count,
    decoder_shape,
    experts_per_token,
    forward_flops,
    weight_bytes,
)
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel
from moectl.models.modes import eval_mode

ROWS, LENGTH = 2, 64  # of the batch that the error is measured on
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
#: What counts as the same function: products over another number of rows round differently. Parts of an MLP have
#: scaled matrices, which round in the model's own dtype: their float64 error says how.
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "copy": {"float32": 1e-4, "float64": 1e-10},
    "split": {"float32": 1e-4},
}


class Dense(NamedTuple):
    """What is kept of the dense model, which upcycling may change in place.

    Attributes:
        ids: the batch ``[B, S]``.
        logits: of it, by the name of the dtype.
        bytes: memory of its weights.
    """

    ids: Tensor
    logits: dict[str, Tensor]
    parameters: ParameterCount
    flops: Flops
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """What upcycling made.

    Attributes:
        base: what was upcycled; ``family`` is its kind of model.
        init: never ``auto``.
        per_token: experts that compute a token, on average: not ``top_k`` where experts choose tokens.
        layers: numbers of the layers with experts.
        error: max |Δlogit| against the dense model, by dtype, on ``tokens`` seeded tokens in eval mode.
        largest_logit: of the dense model there, for scale.
        keeps_function: whether the errors are within rounding; None where the init does not mean to keep it.
        training_error: the same in float64 while experts and routers are in training mode, before the first step:
            with the router's noise, and with a capacity. The rest of the model draws nothing.
        keeps_training: whether that is within rounding; None as above.
        parameters, flops, bytes: of both models: ``dense`` and ``moe``. FLOPs are per token, in rows of
            ``length`` tokens, ``forward`` by part and ``training`` (forward and backward) in total.
    """

    base: str
    family: str
    init: str
    router: str
    num_experts: int
    top_k: int
    per_token: float
    n_shared_experts: int
    expert_size: int
    layers: tuple[int, ...]
    seed: int
    tokens: int
    error: Mapping[str, float]
    largest_logit: float
    keeps_function: bool | None
    training_error: float
    keeps_training: bool | None
    length: int
    parameters: Mapping[str, ParameterCount]
    flops: Mapping[str, Flops]
    bytes: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Everything, with stable keys."""
        plain = {key: value for key, value in vars(self).items() if key not in ("parameters", "flops")}
        return {
            **plain,
            "layers": list(self.layers),
            "error": dict(self.error),
            **counts_json(self.parameters, self.flops),
            "flops_ratio": self.flops["moe"].total / self.flops["dense"].total,
        }

    def to_text(self) -> str:
        """For a reader."""
        dense, moe = self.parameters["dense"], self.parameters["moe"]
        flops, ratio = self.flops["moe"], self.flops["moe"].total / self.flops["dense"].total
        layers = ", ".join(map(str, self.layers))
        shared = f" and {self.n_shared_experts} shared" if self.n_shared_experts else ""
        errors = ", ".join(f"{value:.3g} in {name}" for name, value in self.error.items())
        kept = {True: "the same function", False: "NOT the same function", None: "another function, as the init means"}
        return "\n".join(
            (
                f"{self.base} ({self.family}): layers {layers} have {self.num_experts} experts of"
                f" {self.expert_size:,} neurons, {self.per_token:.3g} per token{shared}, init {self.init}",
                f"max |Δlogit|   {errors} (largest logit {self.largest_logit:.3g}, {self.tokens} tokens):"
                f" {kept[self.keeps_function]}",
                f"in training    {self.training_error:.3g} in float64, with the router's noise and any capacity:"
                f" {kept[self.keeps_training]}",
                f"parameters     {moe.total:,} in total, {moe.active:,} active per token, {moe.inactive:,} inactive"
                f" (dense: {dense.total:,})",
                f"FLOPs / token  {flops.total:,.0f} forward, {flops.total * (1 + BACKWARD):,.0f} with backward, rows of"
                f" {self.length} ({ratio:.4f} of dense; router {flops.router:,.0f})",
                f"weights        {_size(self.bytes['moe'])} (dense: {_size(self.bytes['dense'])})",
            )
        )


def counts_json(parameters: Mapping[str, ParameterCount], flops: Mapping[str, Flops]) -> dict[str, Any]:
    """Parameters and FLOPs per token of several models, by the models' names."""
    return {
        "parameters": {name: counted.to_json() for name, counted in parameters.items()},
        "flops": {
            name: {"forward": counted.to_json(), "training": counted.total * (1 + BACKWARD)}
            for name, counted in flops.items()
        },
    }


def measure_dense(model: LanguageModel, *, seed: int = 0, length: int | None = None) -> Dense:
    """What the receipt needs of the dense model; call it before upcycling.

    Takes memory for a float64 copy of the model while it runs.

    Args:
        seed: of the batch's random tokens.
        length: of a row, for the FLOPs; default: 512, or all that the model takes.

    Raises:
        CheckError: a logit that is not finite.
    """
    columns = min(LENGTH, model.max_length or LENGTH)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.vocab_size, (ROWS, columns), generator=generator)
    logits = {name: logits_in(model, ids, dtype) for name, dtype in DTYPES.items()}
    for name, values in logits.items():
        if not bool(torch.isfinite(values).all()):
            raise CheckError(
                f"the model's logits are not finite in {name}: its weights are damaged",
                "Fetch or train it again; NaN in one weight is enough.",
            )
    return Dense(
        ids=ids,
        logits=logits,
        parameters=count(model),
        flops=forward_flops(shape_of(model), (), length=length or row_length(model)),
        bytes=weight_bytes(model),
    )


def write_receipt(
    dense: Dense, model: LanguageModel, moe: MoEConfig, *, base: str, seed: int = 0, length: int | None = None
) -> Receipt:
    """The receipt of the upcycled ``model``, against what :func:`measure_dense` kept of the dense one.

    Raises:
        CheckError: the upcycled model's logits are not finite.
    """
    exact = exact_copy(model, torch.float64)
    error = {
        "float32": _change(logits_in(model, dense.ids, torch.float32), dense.logits["float32"]),
        "float64": _change(logits_of(exact, dense.ids), dense.logits["float64"]),
    }
    training_error = _change(_training_logits(exact, dense.ids, seed), dense.logits["float64"])
    layers = model.moe_layers()
    first = next(iter(layers.values()))
    meant = moe.init in TOLERANCES and moe.init_noise == 0.0 and not moe.allow_shrinking
    tolerances = TOLERANCES.get(moe.init, {"float64": 0.0})
    within = all(error[name] <= tolerance for name, tolerance in tolerances.items())
    rows = length or row_length(model)
    return Receipt(
        base=base,
        family=model.family.name if isinstance(model, HFLanguageModel) else model.kind,
        init=moe.init,
        router=moe.router_name,
        num_experts=first.experts.num_experts,
        top_k=first.router.top_k,
        per_token=experts_per_token(first),
        n_shared_experts=moe.n_shared_experts,
        expert_size=first.experts.intermediate_size,
        layers=tuple(layers),
        seed=seed,
        tokens=dense.ids.numel(),
        error=error,
        largest_logit=float(dense.logits["float64"].abs().max()),
        keeps_function=within if meant else None,
        training_error=training_error,
        keeps_training=training_error <= list(tolerances.values())[-1] if meant else None,
        length=rows,
        parameters={"dense": dense.parameters, "moe": count(model)},
        flops={"dense": dense.flops, "moe": forward_flops(shape_of(model), layers.values(), length=rows)},
        bytes={"dense": dense.bytes, "moe": weight_bytes(model)},
    )


def logits_in(model: LanguageModel, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits ``[B, S, V]`` in eval mode, of a copy in ``dtype`` unless the model is in float32 and so asked."""
    plain = dtype == torch.float32 and {p.dtype for p in model.parameters()} == {dtype}
    return logits_of(model if plain else exact_copy(model, dtype), ids)


def logits_of(asked: LanguageModel, ids: Tensor) -> Tensor:
    """Logits ``[B, S, V]`` in eval mode, of the model as it is."""
    with eval_mode(asked):  # type: ignore[arg-type]
        return asked(ids.to(next(asked.parameters()).device)).cpu()


def shape_of(model: LanguageModel) -> TransformerShape:
    """The sizes that FLOPs follow from.

    Raises:
        TypeError: a model that is neither our decoder nor one of transformers.
    """
    if isinstance(model, HFLanguageModel):
        return model.family.shape_of(model.config)
    if isinstance(model, Decoder):
        return decoder_shape(model.config)
    raise TypeError(f"no shape is known of {type(model).__name__}")


def row_length(model: LanguageModel) -> int:
    """Of a row, where nothing else says it: 512 tokens, or all that the model takes."""
    return min(512, model.max_length or 512)


def _training_logits(exact: LanguageModel, ids: Tensor, seed: int) -> Tensor:
    """Logits with the MoE layers in training mode; dropout is the dense model's own matter, and stays off."""
    layers = exact.moe_layers().values()
    with torch.random.fork_rng(devices=[]), eval_mode(exact):  # type: ignore[arg-type]
        torch.manual_seed(seed)
        for layer in layers:
            layer.train().dropout = 0.0
        return exact(ids.to(next(exact.parameters()).device)).cpu()


def _change(after: Tensor, before: Tensor) -> float:
    change = float((after - before).abs().max())
    if not math.isfinite(change):
        raise CheckError(
            "the upcycled model's logits are not finite", "Choose a smaller moe.init_noise; nothing was written."
        )
    return change


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"

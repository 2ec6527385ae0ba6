"""``moectl grow``: a model with experts gets more of them and computes what it computed, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl.errors import CheckError, ConfigError
from moectl.hf.exact import exact_copy
from moectl.hf.folder import is_folder, load_folder, save_folder
from moectl.hf.growth import extend_model, mixture_of, multiply_model
from moectl.hf.lora import merge
from moectl.hf.new_folder import refuse_existing
from moectl.hf.pretrained import TOKENIZER_FILES
from moectl.models.accounting import Flops, ParameterCount, count, forward_flops, weight_bytes
from moectl.models.growth import changes, own_top_k
from moectl.models.language_model import LanguageModel
from moectl.walk.loading import load_run
from moectl.walk.receipt import (
    DTYPES,
    TOLERANCES,
    Dense,
    counts_json,
    logits_in,
    logits_of,
    measure_dense,
    row_length,
    shape_of,
)


@dataclass(frozen=True)
class Growth:
    """How experts are to become more.

    Attributes:
        times: every expert becomes so many; 1 for none.
        parts: each of these keeps a part of the neurons, so that a token costs what it did.
        add: new experts, closed until the first optimizer step.
        noise: of added experts, which are copies, in standard deviations of each matrix; of whole copies that a token
            visits together, in those of ``down_proj``, cancelling in their sum.
    """

    times: int = 1
    parts: bool = False
    add: int = 0
    noise: float = 1e-3

    def check(self) -> None:
        """Raises ConfigError unless this is one way to grow."""
        if (self.times > 1) == (self.add > 0) or self.times < 1 or self.add < 0:
            raise ConfigError(
                f"times {self.times} and {self.add} added experts are not one way to grow",
                "Give --times 2 or more, or --add 1 or more.",
            )
        if self.parts and self.times == 1:
            raise ConfigError("--parts divides experts that --times multiplies", "Give --times 2, say.")
        if not 0.0 <= self.noise < float("inf"):
            raise ConfigError(f"noise {self.noise:g} is no number of standard deviations", "Give 0 or more.")


@dataclass(frozen=True)
class GrowthReceipt:
    """What growing made.

    Attributes:
        base: what was grown.
        num_experts, top_k, expert_size: ``before`` and ``after``.
        error: max |Δlogit| by dtype, on ``tokens`` seeded tokens in eval mode, of the model turned into that dtype and
            then grown; within rounding, or nothing is written.
        rounding: max |Δlogit| in float64 of the grown model as it is: what its own ``dtype`` made of scaled matrices.
        notes: what else has changed, in sentences.
        flops: forward, per token, in rows of ``length`` tokens.
    """

    base: str
    num_experts: Mapping[str, int]
    top_k: Mapping[str, int]
    expert_size: Mapping[str, int]
    layers: tuple[int, ...]
    tokens: int
    error: Mapping[str, float]
    rounding: float
    dtype: str
    notes: tuple[str, ...]
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
            "notes": list(self.notes),
            **counts_json(self.parameters, self.flops),
        }

    def to_text(self) -> str:
        """For a reader."""
        before, after = self.parameters["before"], self.parameters["after"]
        ratio = self.flops["after"].total / self.flops["before"].total
        errors = ", ".join(f"{value:.3g} in {name}" for name, value in self.error.items())
        mebi = {when: size / 2**20 for when, size in self.bytes.items()}
        sizes = [
            f"{self.num_experts[when]} experts of {self.expert_size[when]:,} neurons, {self.top_k[when]} per token"
            for when in ("before", "after")
        ]
        return "\n".join(
            (
                f"{self.base}: {sizes[0]}, became {sizes[1]}, in layers {', '.join(map(str, self.layers))}",
                f"max |Δlogit|   {errors} ({self.tokens} tokens): the same function",
                f"rounding       {self.rounding:.3g} once its matrices are {self.dtype}",
                *(f"note           {note}" for note in self.notes),
                f"parameters     {after.total:,} in total (before: {before.total:,}),"
                f" {after.active:,} active per token (before: {before.active:,})",
                f"FLOPs / token  {self.flops['after'].total:,.0f} forward ({ratio:.4f} of before)",
                f"weights        {mebi['after']:.2f} MiB (before: {mebi['before']:.2f} MiB)",
            )
        )


def grow_to_folder(base: str, out: Path, growth: Growth, *, seed: int = 0) -> GrowthReceipt:
    """Grow ``base`` (an upcycled folder, or a run with experts) into the new folder ``out``.

    Raises:
        ConfigError: the folder exists; no experts, or a router that cannot be grown.
        CheckError: the grown model computes something else; nothing is written.
        NotFoundError, MoectlError: a base that is not there, or does not load.
    """
    growth.check()
    refuse_existing(out)
    model, beside = _open(base)
    receipt = grow(model, growth, base=base, seed=seed)
    for name, tolerance in TOLERANCES["copy"].items():
        error = receipt.error[name]
        if not error <= tolerance:
            raise CheckError(
                f"the grown model's logits differ by {error:.3g} in {name}: it is not the same function",
                "Nothing was written. Choose a smaller --noise; without any, this is a mistake in moectl or in the"
                " router: please report it.",
            )
    save_folder(model, out, receipt=receipt.to_json(), beside=beside)
    return receipt


def grow(model: LanguageModel, growth: Growth, *, base: str, seed: int = 0) -> GrowthReceipt:
    """Grow ``model`` in place, and say what that did.

    Raises:
        ConfigError: no experts, or a router that cannot be grown.
    """
    growth.check()
    before, moe = _numbers(model), mixture_of(model)
    measured = measure_dense(model, seed=seed)
    # Turned into the dtype before growing: scaled matrices round in the model's own, which is no other function.
    error = {name: _error(exact_copy(model, dtype), growth, measured, seed) for name, dtype in DTYPES.items()}
    _apply(model, growth, seed)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise CheckError("the grown experts' weights are not finite", "Choose a smaller --noise.")
    after = _numbers(model)
    exact = logits_in(model, measured.ids, torch.float64)
    return GrowthReceipt(
        base=base,
        layers=tuple(model.moe_layers()),
        tokens=measured.ids.numel(),
        error=error,
        rounding=float((exact - measured.logits["float64"]).abs().max()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        notes=(*changes(moe, mixture_of(model)), *_copies(model, growth)),
        length=row_length(model),
        **{key: {"before": before[key], "after": after[key]} for key in before},
    )


def _apply(model: LanguageModel, growth: Growth, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if growth.add:
        extend_model(model, growth.add, noise=growth.noise, generator=generator)
    else:
        multiply_model(model, growth.times, parts=growth.parts, noise=growth.noise, generator=generator)


def _error(copied: LanguageModel, growth: Growth, measured: Dense, seed: int) -> float:
    """Of a copy in one dtype, which is grown."""
    dtype = next(copied.parameters()).dtype
    _apply(copied, growth, seed)
    logits = measured.logits[str(dtype).removeprefix("torch.")]
    return float((logits_of(copied, measured.ids) - logits).abs().max())


def _copies(model: LanguageModel, growth: Growth) -> tuple[str, ...]:
    """What parts the copies of one expert."""
    if growth.add or growth.parts:
        return ()
    if own_top_k(next(iter(model.moe_layers().values())).router) == 1:
        return ("the copies of an expert are the same: a token visits one of them, and training parts them",)
    if not growth.noise:
        return ("the copies of an expert are the same, and may stay so: --noise parts them",)
    return (f"the copies of an expert differ by {growth.noise:g} standard deviations, which cancel in their sum",)


def _numbers(model: LanguageModel) -> dict[str, Any]:
    layers = model.moe_layers()
    if not layers:
        raise ConfigError("the model has no experts to grow", "Upcycle it first: moectl upcycle.")
    first = next(iter(layers.values()))
    return {
        "num_experts": first.experts.num_experts,
        "top_k": own_top_k(first.router),
        "expert_size": first.experts.intermediate_size,
        "parameters": count(model),
        "flops": forward_flops(shape_of(model), layers.values(), length=row_length(model)),
        "bytes": weight_bytes(model),
    }


def _open(base: str) -> tuple[LanguageModel, list[Path]]:
    """The model and its tokenizer's files."""
    folder = Path(base).expanduser()
    if is_folder(folder):
        model, tokenizer = load_folder(folder), folder
    else:
        loaded = load_run(base)
        model, tokenizer = merge(loaded.model), loaded.data
    return model, [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]

"""``moectl grow``: a model with experts gets more of them and computes what it computed, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl.errors import CheckError, ConfigError
from moectl.hf.folder import is_folder, load_folder, refuse_existing, save_folder
from moectl.hf.growth import extend_model, multiply_model
from moectl.hf.pretrained import TOKENIZER_FILES
from moectl.models.accounting import BACKWARD, Flops, ParameterCount, count, forward_flops, weight_bytes
from moectl.models.language_model import LanguageModel
from moectl.walk.loading import load_run
from moectl.walk.receipt import TOLERANCES, logits_in, measure_dense, row_length, shape_of


@dataclass(frozen=True)
class Growth:
    """How experts are to become more.

    Attributes:
        times: every expert becomes so many; 1 for none.
        parts: each of these keeps a part of the neurons, so that a token costs what it did.
        add: new experts, closed until the first optimizer step.
        noise: of the added ones, which are copies, in standard deviations of each matrix.
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
        error: max |Δlogit| by dtype, on ``tokens`` seeded tokens in eval mode; within rounding, or nothing is written.
        flops: forward, per token, in rows of ``length`` tokens.
    """

    base: str
    num_experts: Mapping[str, int]
    top_k: Mapping[str, int]
    expert_size: Mapping[str, int]
    layers: tuple[int, ...]
    tokens: int
    error: Mapping[str, float]
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
            "parameters": {when: counted.to_json() for when, counted in self.parameters.items()},
            "flops": {
                when: {"forward": flops.to_json(), "training": flops.total * (1 + BACKWARD)}
                for when, flops in self.flops.items()
            },
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
    # Multiplied experts may have scaled matrices, which round in the model's own dtype, as parts do.
    for name, tolerance in TOLERANCES["copy" if growth.add else "split"].items():
        error = receipt.error[name]
        if not error <= tolerance:
            raise CheckError(
                f"the grown model's logits differ by {error:.3g} in {name}: it is not the same function",
                "Nothing was written. This is a mistake in moectl or in the router: please report it.",
            )
    save_folder(model, out, receipt=receipt.to_json(), beside=beside)
    return receipt


def grow(model: LanguageModel, growth: Growth, *, base: str, seed: int = 0) -> GrowthReceipt:
    """Grow ``model`` in place, and say what that did.

    Raises:
        ConfigError: no experts, or a router that cannot be grown.
    """
    growth.check()
    before = _numbers(model)
    measured = measure_dense(model, seed=seed)
    if growth.add:
        extend_model(model, growth.add, noise=growth.noise, generator=torch.Generator().manual_seed(seed))
    else:
        multiply_model(model, growth.times, parts=growth.parts)
    after = _numbers(model)
    return GrowthReceipt(
        base=base,
        layers=tuple(model.moe_layers()),
        tokens=measured.ids.numel(),
        error={
            name: float((logits_in(model, measured.ids, logits.dtype) - logits).abs().max())
            for name, logits in measured.logits.items()
        },
        length=row_length(model),
        **{key: {"before": before[key], "after": after[key]} for key in before},
    )


def _numbers(model: LanguageModel) -> dict[str, Any]:
    layers = model.moe_layers()
    if not layers:
        raise ConfigError("the model has no experts to grow", "Upcycle it first: moectl upcycle.")
    first = next(iter(layers.values()))
    return {
        "num_experts": first.experts.num_experts,
        "top_k": first.router.top_k,
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
        model, tokenizer = loaded.model, loaded.data
    return model, [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]

"""Somebody's module at one config: built, mapped, and given the case's weights.

Sizes: D hidden, F expert intermediate, E experts, H heads, P head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moectl.parity.adapter import Adapter, bound
from moectl.parity.candidate.expressions import ExpressionError, Source, evaluate, unread
from moectl.parity.candidate.guess import Guess, Mapped, guess_mapping
from moectl.parity.candidate.settings import Settings
from moectl.parity.candidate.sizes import sizes_of
from moectl.parity.candidate.user_code import AdapterError, CandidateError, Failure, a_level, attempt
from moectl.parity.candidate.wiring import Wiring, wire
from moectl.parity.case import Level, Weights
from moectl.parity.families import config_of, formula_of, weight_shapes
from moectl.parity.formula import Formula


@dataclass
class Built:
    """A module for one config.

    Attributes:
        module: in the case's dtype.
        formula: what the config means.
        guess: the mapping, with what was left over.
        wiring: where its parts are.
        shown: how it was built.
        asked: settings that its constructor read.
        initial: what extra parameters began with.
    """

    module: nn.Module
    formula: Formula
    guess: Guess
    wiring: Wiring
    shown: str
    asked: frozenset[str] = frozenset()
    initial: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loose_head(self) -> str | None:
        """The candidate's own output matrix, where the config has the embedding's used."""
        if not self.formula.tie_embeddings:
            return None
        return next(
            (name for name, each in self.guess.roles.items() if each.role == "head" and name in self.guess.extra), None
        )

    @property
    def sources(self) -> Mapping[str, Source]:
        return self.guess.sources

    def load(self, weights: Weights, zeroed: Collection[str] = ()) -> None:
        """Give the module the canonical weights; what is not mapped gets its initial values, or zeros.

        Raises:
            CandidateError: an expression does not fit a parameter's shape.
        """
        tensors = {**dict(self.module.named_buffers()), **dict(self.module.named_parameters())}
        with torch.no_grad():
            for name, source in self.sources.items():
                given = evaluate(source, weights, sizes_of(self.formula))
                if given.shape != tensors[name].shape:
                    raise CandidateError(
                        f"{name} is {list(tensors[name].shape)}, '{source}' is {list(given.shape)}",
                        "Mend its line in the adapter's weights(); .mT turns a matrix around.",
                    )
                tensors[name].copy_(given)
            for name, initial in self.initial.items():
                tensors[name].copy_(torch.zeros_like(initial) if name in zeroed else initial)


def build(
    cls: Callable[..., Any],
    adapter: Adapter,
    *,
    family: str,
    level: Level,
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> Built:
    """Build ``cls`` for ``config`` and map it, to be called under ``lifted()`` in float64.

    Raises:
        CandidateError: it cannot be built, or not be mapped; what was found is listed.
        AdapterError: the adapter raises.
    """
    formula = formula_of(family, config)
    bound(adapter, family=family, level=level, config=config, formula=formula, dtype=dtype)
    module = made(adapter, cls)
    cast(module, dtype)
    shapes = weight_shapes(formula, level, _layer_of(formula, level))
    guess = guess_mapping(module, formula, level, shapes)
    if guess.unclear or guess.missing:
        if type(adapter).build is Adapter.build:
            module, guess = _with_other_settings(cls, adapter, module, guess, shapes)
        guess = _at_othersizes_of(cls, adapter, module, guess, config)
    adapter._guesses.guess = guess  # type: ignore[attr-defined]
    shown, asked = adapter.shown, adapter.asked
    if type(adapter).weights is not Adapter.weights:
        guess = _from_adapter(adapter, module, guess, shapes)
    parameters = dict(module.named_parameters())
    initial = {name: parameters[name].detach().clone() for name in guess.extra}
    return Built(module, formula, guess, wire(module, level, guess.roles), shown, asked, initial)


def checked(built: Built, level: Level, *, own: bool) -> Built:
    """``built``, if what must be mapped is.

    Args:
        own: whether an adapter maps the weights; what it leaves out is meant.

    Raises:
        CandidateError: matrices that find no home; nothing is mapped.
    """
    guess = built.guess
    matrices = {
        name: count
        for name, count in guess.missing.items()
        if not name.endswith(("norm.weight", "bias")) and not (name == "lm_head.weight" and guess.tied)
    }
    if not own and (matrices or not guess.mapped):
        missing = ", ".join(list(matrices)[:4]) + (f" and {len(matrices) - 4} more" if len(matrices) > 4 else "")
        found = "; ".join(guess.unclear[:4]) or _left_over(guess)
        raise CandidateError(
            f"the weights of {type(built.module).__name__} cannot be mapped as {a_level(level)}: "
            f"nothing found for {missing}. {found}",
            "Say it in an adapter's weights(): `moectl compare-hf new-adapter` writes a template; or name the --level.",
        )
    return built


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers to ``dtype``, as ``module.to(dtype)`` does; tables of frequencies keep their precision.

    ``.to(bfloat16)`` would turn complex tables into real ones, and rotary frequencies into other frequencies: people
    who run in bfloat16 keep those, as Hugging Face does.
    """
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and "freq" not in name:
                part._buffers[name] = buffer.to(dtype)


def _layer_of(formula: Formula, level: Level) -> int:
    return formula.moe_layers[0] if level == "layer" and formula.moe_layers else 0


def made(adapter: Adapter, cls: Callable[..., Any]) -> nn.Module:
    """A fresh module, by the adapter.

    Raises:
        CandidateError: the guess cannot build it.
        AdapterError: the adapter's own build() fails.
    """
    built = attempt(lambda: _seeded(lambda: adapter.build(cls)))
    if isinstance(built, Failure):
        raise AdapterError(f"the adapter's build() fails: {built}", "Mend that line of the adapter.")
    if not isinstance(built, nn.Module):
        raise AdapterError(f"the adapter's build() returns a {type(built).__name__}", "It returns the nn.Module.")
    return built


def _seeded(action: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return action()


def _with_other_settings(
    cls: Callable[..., Any], adapter: Adapter, module: nn.Module, guess: Guess, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[nn.Module, Guess]:
    """Experts built with ``intermediate_size``, where the family means a dense layer's by it: try the experts' own."""
    original = adapter.settings

    def settings() -> Settings:
        values = original()
        values["intermediate_size"] = adapter.formula.experts.intermediate_size
        return values

    adapter.settings = settings  # type: ignore[method-assign]
    try:
        other = attempt(lambda: made(adapter, cls))
    finally:
        del adapter.settings
    if not isinstance(other, nn.Module):
        return module, guess
    cast(other, adapter.dtype)
    better = guess_mapping(other, adapter.formula, adapter.level, shapes)
    if sum(better.missing.values()) >= sum(guess.missing.values()):
        adapter.build(cls)  # so that what is shown is what is used
        return module, guess
    adapter.shown += ", with intermediate_size = the experts'"
    return other, better


def _at_othersizes_of(
    cls: Callable[..., Any], adapter: Adapter, module: nn.Module, guess: Guess, config: Mapping[str, Any]
) -> Guess:
    """What is square at these sizes may not be at others: build it there, and keep the expressions."""
    if not any("square" in text for text in guess.unclear):
        return guess
    keep = (adapter.config, adapter.formula, adapter.sizes, adapter.shown)
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    for other_config in _othersizes_of(config):
        formula = formula_of(adapter.family, other_config)
        bound(
            adapter,
            family=adapter.family,
            level=adapter.level,
            config=other_config,
            formula=formula,
            dtype=adapter.dtype,
        )
        other = attempt(lambda: made(adapter, cls))
        adapter.config, adapter.formula, adapter.sizes, adapter.shown = keep
        if not isinstance(other, nn.Module):
            continue
        layer = _layer_of(formula, adapter.level)
        found = guess_mapping(other, formula, adapter.level, weight_shapes(formula, adapter.level, layer))
        known = {line.name: line for line in found.mapped if line.name in tensors}
        mapped = list(guess.mapped)
        for name in tensors:
            if name in known and name not in guess.sources and name in guess.extra:
                remark = "; ".join(filter(None, [known[name].remark, "which way round: seen at other sizes"]))
                mapped.append(known[name]._replace(remark=remark))
        shapes = weight_shapes(keep[1], adapter.level, _layer_of(keep[1], adapter.level))
        if len(mapped) > len(guess.mapped) and _fit(mapped, tensors, shapes, keep[1]):
            unclear = tuple(text for text in guess.unclear if text.partition(" ")[0] not in known)
            return _completed(replace(guess, mapped=tuple(mapped), unclear=unclear), module, shapes, keep[1])
    return guess


def _othersizes_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    heads = int(config.get("num_attention_heads", 4))
    others = []
    for hidden, head_dim in ((20 * heads, 12), (12 * heads, 12)):
        other = {**config, "hidden_size": hidden, "vocab_size": 88}
        other |= {"head_dim": head_dim} if "head_dim" in config else {}
        inner = [key for key in ("moe_intermediate_size", "intermediate_size") if key in config]
        other |= dict(zip(inner, (28, 60), strict=False))
        others.append(other)
    return others


def _fit(
    lines: list[Mapped], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], formula: Formula
) -> bool:
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        return all(evaluate(each.source, empty, sizes_of(formula)).shape == tensors[each.name].shape for each in lines)
    except ExpressionError:
        return False


def _completed(guess: Guess, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], formula: Formula) -> Guess:
    left = {name: torch.empty(shape) for name, shape in shapes.items()}
    done = set(guess.sources)
    extra = {name: tuple(p.shape) for name, p in module.named_parameters() if name not in done}
    return replace(guess, extra=extra, missing=unread(guess.sources, left, sizes_of(formula)))


def _from_adapter(adapter: Adapter, module: nn.Module, guess: Guess, shapes: Mapping[str, tuple[int, ...]]) -> Guess:
    sources = attempt(lambda: dict(adapter.weights(module)))
    if isinstance(sources, Failure):
        raise AdapterError(f"the adapter's weights() fails: {sources}", "Mend that line of the adapter.")
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    for name in sources:
        if name not in tensors:
            raise AdapterError(
                f"the adapter's weights() names '{name}', which the module has not",
                f"It has {', '.join(list(tensors)[:12])}.",
            )
    remarks = {line.name: line.remark for line in guess.mapped if line.source == sources.get(line.name)}
    mapped = tuple(Mapped(name, source, remarks.get(name, "by the adapter")) for name, source in sources.items())
    empty = {name: torch.empty(shape) for name, shape in shapes.items()}
    for line in mapped:
        given = attempt(lambda line=line: evaluate(line.source, empty, adapter.sizes))  # type: ignore[misc]
        if isinstance(given, Failure):
            raise AdapterError(
                f"the adapter's source of '{line.name}' fails: {given}", "Mend that line of the adapter."
            )
        if given.shape != tensors[line.name].shape:
            raise AdapterError(
                f"the adapter's source of '{line.name}' is {list(given.shape)}; "
                f"the parameter is {list(tensors[line.name].shape)}",
                "Mend that line: .mT turns a matrix around.",
            )
    return _completed(replace(guess, mapped=mapped, unclear=()), module, shapes, adapter.formula)


def _left_over(guess: Guess) -> str:
    names = [f"{name} {list(shape)}" for name, shape in guess.extra.items()]
    return f"Not recognised: {', '.join(names[:6])}" if names else "Every parameter is taken"


def guess_level(module: nn.Module, family: str, config: Mapping[str, Any], levels: tuple[Level, ...]) -> Level:
    """The component that ``module`` is: where most of its parameters and most of the canonical weights are mapped."""
    formula = formula_of(family, config)
    best: tuple[float, Level] | None = None
    total = sum(parameter.numel() for parameter in module.parameters()) or 1
    for level in levels:
        shapes = weight_shapes(formula, level, _layer_of(formula, level))
        guess = guess_mapping(module, formula, level, shapes)
        extra = sum(_numel(shape) for shape in guess.extra.values())
        wanted = sum(_numel(shape) for shape in shapes.values())
        score = (1 - extra / total) * (1 - sum(guess.missing.values()) / wanted)
        if level == "router" and extra > total / 2:
            continue  # a block whose experts are not recognised has a router, but is none
        if best is None or score > best[0] + 1e-9:
            best = (score, level)
    if best is None or best[0] <= 0.0:
        names = ", ".join(f"{name} {list(p.shape)}" for name, p in list(module.named_parameters())[:6])
        raise CandidateError(
            f"cannot tell what {type(module).__name__} is: {names or 'it has no parameters'}",
            f"Name it with --level {' | '.join(levels)}; an adapter maps what has unusual names.",
        )
    return best[1]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def tiny_config(family: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config for the first look."""
    return dict(config) if config is not None else config_of(family, "tiny")

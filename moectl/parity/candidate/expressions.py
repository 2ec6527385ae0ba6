"""Where a candidate's parameters come from: expressions over canonical weights, applied forwards and backwards.

``experts.3.gate_proj.weight <- experts.gate_up_proj[3, :F]`` is such an expression. It is Python's own syntax, cut
down: canonical names, indices, ``.T``, ``.mT``, a few rearranging methods, ``cat`` and ``stack``, and arithmetic with
numbers. ``D F E H G P V`` stand for the sizes. What is shown to a user can be pasted into an adapter.

Every expression is linear (or affine) in the weights, so that a gradient goes back to the canonical names through
the expression's own vector-Jacobian product: stacked, fused, transposed and repeated weights are all covered.

Sizes: D hidden, F expert intermediate, E experts, H heads, G key/value heads, P head dimension, V vocabulary.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moectl.errors import MoectlError
from moectl.parity.candidate.sizes import LETTERS
from moectl.parity.case import Weights

#: An expression, or a function of the weights.
Source = str | Callable[[Weights], Tensor]
#: Candidate's name -> where its tensor comes from.
Sources = Mapping[str, Source]

_METHODS = {"flatten", "unflatten", "reshape", "permute", "transpose", "repeat", "repeat_interleave", "unsqueeze"}
_METHODS |= {"squeeze", "flip", "roll", "expand", "contiguous", "narrow", "chunk", "split", "unbind"}
_PROPERTIES = {"T", "mT"}
_FUNCTIONS = {"cat": torch.cat, "stack": torch.stack}
_NODES = (
    ast.Expression, ast.Call, ast.Attribute, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Name, ast.Constant,
    ast.Load, ast.keyword, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv,
)  # fmt: skip


class ExpressionError(MoectlError):
    """An expression that cannot be read or evaluated."""


def evaluate(source: Source, weights: Weights, sizes: Mapping[str, int]) -> Tensor:
    """The tensor that ``source`` describes.

    Raises:
        ExpressionError: it cannot be read, names no weight, or does not fit the shapes.
    """
    if not isinstance(source, str):
        return source(weights)
    tree, names = _parse(source, weights)
    values: dict[str, Any] = {**_FUNCTIONS, **sizes, **{key: weights[name] for key, name in names.items()}}
    values["__builtins__"] = {}
    try:
        result = eval(compile(tree, "<expression>", "eval"), values)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ExpressionError(f"'{source}' cannot be computed: {reason}", _shapes(names.values(), weights)) from error
    if not isinstance(result, Tensor):
        raise ExpressionError(f"'{source}' is a {type(result).__name__}, not a tensor", "Index it, or use cat(…).")
    return result


def names_in(source: Source, weights: Weights) -> tuple[str, ...]:
    """The canonical names that an expression reads; of a function, none are known."""
    return tuple(_parse(source, weights)[1].values()) if isinstance(source, str) else ()


def pull_back(
    sources: Sources, gradients: Mapping[str, Tensor], weights: Weights, sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Gradients by canonical name from gradients by the candidate's; zero where nothing came.

    Canonical weights that no source reads are left out.
    """
    leaves = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in weights.items()}
    with torch.enable_grad():
        made = {name: evaluate(source, leaves, sizes) for name, source in sources.items() if name in gradients}
    made = {name: tensor for name, tensor in made.items() if tensor.requires_grad}
    found = torch.autograd.grad(
        list(made.values()),
        list(leaves.values()),
        [gradients[name].to(tensor.dtype).reshape(tensor.shape) for name, tensor in made.items()],
        allow_unused=True,
    ) if made else ()  # fmt: skip
    return {name: gradient for name, gradient in zip(leaves, found, strict=False) if gradient is not None}


def unread(sources: Sources, weights: Weights, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many entries of each canonical weight no source reads; names that are read whole are left out."""
    ones = {name: torch.ones(tensor.shape) for name, tensor in weights.items()}
    touched = pull_back(
        sources, {name: torch.ones_like(evaluate(s, ones, sizes)) for name, s in sources.items()}, ones, sizes
    )
    left = {name: int((touched[name] == 0).sum()) if name in touched else one.numel() for name, one in ones.items()}
    return {name: count for name, count in left.items() if count}


def _parse(source: str, weights: Weights) -> tuple[ast.Expression, dict[str, str]]:
    names: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        name, rest = match.group(), ""
        while name and name not in weights:  # what follows the name is a property or method
            name, dot, last = name.rpartition(".")
            rest = f"{dot}{last}{rest}"
        if not name:
            return match.group()
        key = f"weight_{len(names)}"
        names[key] = name
        return key + rest

    text = re.sub(r"(?<![\w.\])])[A-Za-z_]\w*(?:\.\w+)*", placeholder, source)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"'{source}' is not an expression: {error.msg}", _example(weights)) from error
    for node in ast.walk(tree):
        unknown = isinstance(node, ast.Name) and node.id not in {*names, *_FUNCTIONS, *LETTERS}
        called = isinstance(node, ast.Attribute) and node.attr not in _METHODS | _PROPERTIES
        if not isinstance(node, _NODES) or unknown or called:
            raise ExpressionError(f"'{source}': '{ast.unparse(node)}' is not known here", _example(weights))
    return tree, names


def _example(weights: Weights) -> str:
    name = next(iter(weights), "weight")
    return f"As in '{name}.mT' or 'cat([{name}[:2], {name}[2:]])'. Weights: {', '.join(list(weights)[:12])}."


def _shapes(names: Iterable[str], weights: Weights) -> str:
    return "; ".join(f"{name} is {tuple(weights[name].shape)}" for name in dict.fromkeys(names)) or "See the template."

"""Marks: what every number of a run must be read with, wherever it is printed, drawn or written down.

A model in which later tokens change earlier outputs has seen what it is asked to predict: its loss is
not that of a language model, and must not be quoted as one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: A router or capacity that lets later tokens change earlier outputs, in training or in evaluation.
NON_CAUSAL = "non-causal"


def marks_of(model: Any) -> tuple[str, ...]:
    """The marks of a model, from its own MoE layers: what it was built as, not what a record says."""
    layers = model.moe_layers().values() if hasattr(model, "moe_layers") else ()
    return () if all(layer.causal for layer in layers) else (NON_CAUSAL,)


def marked(text: str, marks: Iterable[str]) -> str:
    """``text`` with each mark behind it in brackets, once.

    >>> marked("2.1034", ["non-causal"])
    '2.1034 [non-causal]'
    """
    for mark in marks:
        text = text if f"[{mark}]" in text else f"{text} [{mark}]"
    return text

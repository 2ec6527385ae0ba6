"""Run code that asks for float32 in float64 instead, so that formulas are compared and not roundings.

Hugging Face's models compute RMSNorm's statistic, rotary tables, softmaxes and losses in float32 even when
everything else is float64. Two sides of a comparison that place those casts differently then differ by
4e-8 although their formulas agree. Under :func:`lifted` every request for float32 is a request for float64.
What asks for bfloat16 or float16 keeps getting it: that is a loss of precision on purpose, and seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LIFTED: dict[Any, Any] = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_LIFTED_NAMES = {
    "torch.FloatTensor": "torch.DoubleTensor",
    "torch.cuda.FloatTensor": "torch.cuda.DoubleTensor",
    torch.FloatTensor: torch.DoubleTensor,
}
_LIFTED_CALLS: dict[Any, Callable[..., Any]] = {
    Tensor.float: Tensor.double,
    Tensor.cfloat: Tensor.cdouble,  # type: ignore[attr-defined]
}
#: These read bytes as numbers of a dtype: another dtype would be other numbers.
_READS_BYTES = frozenset({torch.frombuffer, torch.from_file, Tensor.view, Tensor.set_})
#: Numbers that come from Python or numpy; a numpy array brings a dtype of its own along.
_READS_DATA = frozenset({torch.tensor, torch.as_tensor, torch.asarray})


class Lift(TorchFunctionMode):
    """Replaces float32 by float64, and complex64 by complex128, in the arguments of every torch function."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS_BYTES:
            return func(*args, **kwargs)
        if func is Tensor.type:
            args = tuple(_LIFTED_NAMES.get(a, a) if isinstance(a, str | type) else a for a in args)
            kwargs = {k: _LIFTED_NAMES.get(v, v) if isinstance(v, str | type) else v for k, v in kwargs.items()}
        func = _LIFTED_CALLS.get(func, func)
        result = func(*(_lift(a) for a in args), **{k: _lift(v) for k, v in kwargs.items()})
        if func in _READS_DATA and not isinstance(args[0] if args else None, Tensor) and result.dtype in _LIFTED:
            result = result.detach().to(_LIFTED[result.dtype]).requires_grad_(result.requires_grad)
        return result


def _lift(value: Any) -> Any:
    return _LIFTED[value] if isinstance(value, torch.dtype) and value in _LIFTED else value


_lock = threading.Lock()
_depth = 0
_default_before = torch.float32


@contextmanager
def lifted() -> Iterator[None]:
    """Within: what asks for float32 gets float64, and the default dtype is float64.

    May be nested, and left by an exception; the default dtype is restored when the last one ends, in whatever
    order they end (a generator that yields inside may outlive its caller's). The functions' lift holds for the
    calling thread; the default dtype is the process's.

    Build *and* run under it: a float32 parameter made outside stays float32, and meets float64 inside.
    ``torch.autocast`` leaves float64 alone by itself. Not lifted: ``torch.FloatTensor(...)`` called as a
    constructor, and what reads bytes or shares memory (``torch.frombuffer``, ``torch.from_numpy``,
    ``Tensor.view(dtype)``).
    """
    global _depth, _default_before
    with _lock:
        if _depth == 0:
            _default_before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
        _depth += 1
    try:
        with Lift():
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.set_default_dtype(_default_before)

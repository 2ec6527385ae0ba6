"""Matrix products of one expert on a few rows: in which dtype, and by which of torch's kernels.

With tens of rows and weights that come from memory, a large product is bound by how it walks the
weights. Three habits take 5-40 % off it here (``benchmarks/moe_layer.py`` shows the sum): oneDNN for
``x · Wᵀ``, and 128 rows of ``W`` or of its gradient at a time. Shape suffixes: N rows, I input
features, O output features, P piece.
"""

from __future__ import annotations

import functools
import os
import platform
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_ROWS = range(4, 192)
MANY_WEIGHTS = 2**18  # elements of one expert's matrix: a megabyte in float32
MANY_TOKENS = 32  # of one call: more than decoding has
PIECE = 128
PAGE = 4096  # bytes
#: What oneDNN may be held to: instruction sets without bfloat16 products, which it then emulates.
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or ARM's BF16), and oneDNN may use it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BFLOAT16:
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        # Only here: on x86 it says yes to AVX512 alone, with which oneDNN emulates bfloat16.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_dtype(x_TD: Tensor, *, training: bool) -> torch.dtype:
    """The dtype to multiply ``x`` in: its own, but float32 where a CPU has no instructions for it.

    Without them a bfloat16 product takes about ten times as long as converting one expert's weights
    and multiplying in float32, or thirty in a backward. In decoding, a few tokens at a time, the
    conversion would cost more than it saves.
    """
    lower = x_TD.dtype in (torch.bfloat16, torch.float16) and x_TD.device.type == "cpu"
    native = x_TD.dtype == torch.bfloat16 and cpu_has_bfloat16() and torch.backends.mkldnn.enabled
    return torch.float32 if lower and not native and (training or x_TD.shape[0] >= MANY_TOKENS) else x_TD.dtype


def cast_for_autocast(x: Tensor) -> Tensor:
    """``x`` in the autocast dtype where autocast is on (it spares float64), else as it is.

    Warns once where autocast asks a CPU for bfloat16 that it has no instructions for.
    """
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and not torch.compiler.is_compiling():
        _warn_slow_autocast(dtype)
    return x.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """For products whose dtype is chosen already: autocast would choose again."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # entering torch's costs a decoding step some 15 µs


@functools.cache
def _warn_slow_autocast(dtype: torch.dtype) -> None:
    if not cpu_has_bfloat16():
        warnings.warn(
            f"autocast to {dtype} on a CPU without bfloat16 instructions saves no time: experts are multiplied in"
            " float32 and the rest of the model is many times slower. Train in float32 here.",
            stacklevel=4,
        )


def times_transposed(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x · Wᵀ + b``: ``[N, O]``."""
    if _bound_by_weights(x_NI, weight_OI) and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_NI, weight_OI, bias_O)


def times(grad_NO: Tensor, weight_OI: Tensor) -> Tensor:
    """``grad · W``: ``[N, I]``."""
    if not _bound_by_weights(grad_NO, weight_OI) or weight_OI.shape[1] * weight_OI.element_size() % PAGE:
        return grad_NO @ weight_OI
    # Rows a whole number of pages apart fall on the same cache sets: a few at a time do not push each other out.
    first, *others = zip(grad_NO.split(PIECE, dim=1), weight_OI.split(PIECE), strict=True)
    product_NI = first[0] @ first[1]
    for grad_NP, weight_PI in others:
        product_NI.addmm_(grad_NP, weight_PI)
    return product_NI


def outer_product(grad_NO: Tensor, x_NI: Tensor, *, out: Tensor, add: bool) -> None:
    """``gradᵀ · x`` written into ``out [O, I]``, or added to it."""
    grad_ON = grad_NO.t()
    pieces = [(grad_ON, out)]
    if _bound_by_weights(grad_NO, out):
        pieces = list(zip(grad_ON.split(PIECE), out.split(PIECE), strict=True))
    for left, part in pieces:
        if add:
            part.addmm_(left, x_NI)
        else:
            torch.mm(left, x_NI, out=part)


def _bound_by_weights(x_NI: Tensor, weight: Tensor) -> bool:
    """Where walking a matrix takes longer than multiplying with it, on a CPU in float32."""
    return (
        x_NI.shape[0] in FEW_ROWS
        and weight.numel() >= MANY_WEIGHTS
        and x_NI.dtype == torch.float32
        and x_NI.device.type == "cpu"
    )

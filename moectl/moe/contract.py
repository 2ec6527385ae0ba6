"""What :meth:`moectl.moe.Router.route` must return: shapes and dtypes on every call, values on the first.

A wrong router is named here, with the field that is wrong, and not felt later as a crash elsewhere or as
a loss of NaN. Shape suffixes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moectl.errors import ConfigError
from moectl.moe.types import RouterOutput

EXACT = (torch.float32, torch.float64)

#: Field -> its dimensions, and the dtypes that it may have.
FORM: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "topk_indices": ("TK", (torch.int64,)),
    "topk_weights": ("TK", EXACT),
    "router_logits": ("TE", EXACT),
    "router_probs": ("TE", EXACT),
    "router_probs_clean": ("TE", EXACT),
    "entropy": ("T", EXACT),
    "keep": ("TK", (torch.bool,)),
}


class RouterError(ConfigError, ValueError):
    """A router that does not hold to the contract."""


def check_form(out: object, label: str, *, tokens: int, slots: int, num_experts: int) -> None:
    """Fields, shapes and dtypes. Reads no value: no sync, and nothing that ``torch.compile`` could break on.

    Raises:
        RouterError: naming the router by ``label``, and the field.
    """
    if not isinstance(out, RouterOutput):
        raise RouterError(f"{label}: route() returned {type(out).__name__}, not a RouterOutput")
    sizes = {"T": tokens, "K": slots, "E": num_experts}
    for name, (dims, dtypes) in FORM.items():
        value = getattr(out, name)
        if value is None and name == "keep":
            continue
        if not isinstance(value, Tensor):
            raise RouterError(f"{label}: route() returned {name} as {type(value).__name__}, not a tensor")
        shape = tuple(sizes[dim] for dim in dims)
        if tuple(value.shape) != shape:
            legend = ", ".join(f"{dim} = {sizes[dim]}" for dim in dims)
            raise RouterError(
                f"{label}: route() returned {name} of shape {tuple(value.shape)}, not {shape} ({legend})",
                f"Another number of experts per token is what Router.slots says, {slots} here."
                if "K" in dims
                else None,
            )
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise RouterError(f"{label}: route() returned {name} as {value.dtype}, not {wanted}")


@torch.no_grad()  # a tensor saved for backward here would be one too many for activation checkpointing
def check_values(out: RouterOutput, label: str, *, inputs: Sequence[Tensor]) -> None:
    """Indices in range, weights finite, nothing NaN. Waits for the device once.

    Args:
        out: of :func:`check_form`'s form, unused slots at weight 0.
        label: how errors name the router.
        inputs: all that the router computed from, its parameters too. Where one of these is not finite,
            only the indices are looked at: a NaN that came in is not this router's doing.

    Raises:
        RouterError: naming the router and the first field that is wrong.
    """
    num_experts = out.router_probs.shape[-1]
    sound = torch.stack([tensor.isfinite().all() for tensor in inputs]).all()
    outside_TK = (out.topk_indices < 0) | (out.topk_indices >= num_experts)
    wrong = {f"topk_indices outside [0, {num_experts})": outside_TK.any()}
    wrong["topk_weights that are not finite"] = ~out.topk_weights.isfinite().all() & sound
    for name in ("router_logits", "router_probs", "router_probs_clean", "entropy"):
        wrong[f"{name} with NaN in it"] = getattr(out, name).isnan().any() & sound
    for what, found in zip(wrong, torch.stack(list(wrong.values())).tolist(), strict=True):
        if found:
            raise RouterError(f"{label}: route() returned {what}")

"""What is known of transformers releases, and how to find out what is not.

``router_logits`` are what the balance loss takes a softmax of. Some releases put probabilities there: the loss
then sees ``softmax(softmax(logits))``, which is nearly uniform whatever the router does, and teaches it nothing.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

#: Sums of a float32 (or bfloat16) softmax over up to some hundred experts round by far less than this; sums of
#: logits are one only by chance, and never in every row.
ROW_SUM_TOLERANCE = 2e-2
#: The shape of the model that is built to find out.
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class KnownRelease:
    """Releases in which ``router_logits`` are probabilities.

    Attributes:
        families: transformers' names of the model families.
        first: the first such release that was read.
        fixed: the first release in which they are logits again; None where there was none up to ``last_read``.
        last_read: the newest release that was read.
        source: the report, or where it was mended.
        balance_loss: whether the family computes a balance loss from them.
    """

    families: tuple[str, ...]
    first: str
    fixed: str | None
    last_read: str
    source: str
    balance_loss: bool = True


# Read in the published wheels: 4.57.6 (logits), 5.0.0, 5.1.0, 5.3.0, 5.5.0 and 5.5.4 (probabilities), 5.6.0, 5.17.0
# and 5.23.0 (logits again, but for the second entry). Some of the first entry's families came after 5.0.0.
KNOWN: tuple[KnownRelease, ...] = (
    KnownRelease(
        families=(
            "flex_olmo", "minimax", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe", "qwen3_vl_moe",
        ),
        first="5.0.0",
        fixed="5.6.0",
        last_read="5.23.0",
        source="huggingface/transformers issue 45120, mended by pull request 45131",
    ),
    KnownRelease(
        families=("diffusion_gemma", "gemma4"),
        first="5.5.4",
        fixed=None,
        last_read="5.23.0",
        source="huggingface/transformers pull request 46642",
        balance_loss=False,
    ),
)  # fmt: skip


def installed_version() -> str | None:
    """Of transformers, without importing it; None where it is not installed."""
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None


def known_bad(version: str) -> list[KnownRelease]:
    """The entries of :data:`KNOWN` that ``version`` falls under; a release candidate counts as its release."""
    number = _number(version)
    return [
        entry
        for entry in KNOWN
        if _number(entry.first) <= number and (entry.fixed is None or number < _number(entry.fixed))
    ]


class RouterLogits(NamedTuple):
    """What a tiny model's ``router_logits`` turned out to be.

    Attributes:
        probabilities: all rows are non-negative and sum to one.
        smallest: of all values; a logit may be negative.
        row_sums: least and largest sum of a row.
        exact: largest deviation from ``x · Wᵀ``; what logits are.
    """

    probabilities: bool
    smallest: float
    row_sums: tuple[float, float]
    exact: float


def probe_router_logits() -> RouterLogits:
    """Build a tiny Qwen3-MoE and look at what it returns as ``router_logits``: catches releases nobody has listed.

    Raises:
        ImportError: transformers is missing or broken, or has no Qwen3-MoE.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**TINY)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config).eval()
        gate = model.model.layers[0].mlp.gate
        gate.weight.normal_()  # no tiny logits, which are near their own softmax's zero mean
        inputs: list[torch.Tensor] = []
        handle = gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        logits_TE = model(torch.arange(24).view(2, 12), output_router_logits=True).router_logits[0].float()
        handle.remove()
    exact_TE = inputs[0].reshape(-1, config.hidden_size).float() @ gate.weight.detach().float().T
    sums_T = logits_TE.sum(-1)
    return RouterLogits(
        probabilities=are_probabilities(logits_TE),
        smallest=float(logits_TE.min()),
        row_sums=(float(sums_T.min()), float(sums_T.max())),
        exact=float((logits_TE - exact_TE).abs().max()),
    )


def are_probabilities(logits_TE: Tensor) -> bool:
    """Whether every row is non-negative and sums to one: no logits."""
    sums_T = logits_TE.float().sum(-1)
    return bool((logits_TE >= 0).all()) and bool(((sums_T - 1).abs() < ROW_SUM_TOLERANCE).all())


def _number(version: str) -> tuple[int, ...]:
    """``5.6.0rc1`` as ``(5, 6, 0)``; what is no number counts as 0."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return tuple((*numbers, 0, 0, 0)[:3])

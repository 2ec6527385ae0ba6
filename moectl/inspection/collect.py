"""Collecting a routing trace: which experts every held-out token went to, layer by layer.

Shape suffixes: T tokens, D hidden, E experts, K experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError, MoectlError
from moectl.inspection.random_router import UNUSED, chosen_experts
from moectl.inspection.specialization import GroupCounts
from moectl.models.modes import eval_mode
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router

#: Called with the layer's number, its input ``[T, D]``, the tokens' groups ``[T]`` and the mask ``[T]`` or None.
Observer = Callable[[int, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class LayerTrace:
    """One layer's decisions for all tokens of the split.

    Attributes:
        router: the router's class name.
        num_experts: ``E``.
        top_k: experts per token that the router is set to; on average, where the experts choose.
        topk_indices: ``[T, K]`` int64, -1 where a slot is unused; ``K`` is the router's ``slots``.
        topk_weights: ``[T, K]`` float32.
        probs: ``[T, E]`` float32, the clean (noise-free) distribution.
        entropy: ``[T]`` float32, nats, of the clean distribution.
        hidden: ``[T, D]`` the layer's input, or None when it was not asked for.
        dropped: ``[E]`` int64, assignments that a capacity in evaluation dropped, by the expert that
            was chosen; None where the layer is dropless.
    """

    router: str
    num_experts: int
    top_k: int
    topk_indices: Tensor
    topk_weights: Tensor
    probs: Tensor
    entropy: Tensor
    hidden: Tensor | None = None
    dropped: Tensor | None = None


@dataclass(frozen=True)
class RoutingTrace:
    """Every held-out token's route.

    Attributes:
        layers: layer number -> :class:`LayerTrace`.
        token_ids: ``[T]`` int64.
        token_domains: ``[T]`` int64, index into ``domain_names``.
        token_groups: ``[T]`` int64, index into the groups of this split, ``[0, G)``.
        group_domains: ``[G]`` domain of each group.
        domain_names: the dataset's domains.
        split: the dataset's split, ``eval``.
    """

    layers: Mapping[int, LayerTrace]
    token_ids: Tensor
    token_domains: Tensor
    token_groups: Tensor
    group_domains: NDArray[np.int64]
    domain_names: tuple[str, ...]
    split: str = "eval"

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    def group_counts(self, layer: int) -> GroupCounts:
        """Kept assignments of ``layer`` per group and expert."""
        trace = self.layers[layer]
        groups = len(self.group_domains)
        slots = self.token_groups[:, None] * trace.num_experts + trace.topk_indices
        flat = torch.bincount(slots[trace.topk_indices != UNUSED], minlength=groups * trace.num_experts)
        return GroupCounts(flat.reshape(groups, trace.num_experts).numpy(), self.group_domains, len(self.domain_names))


@dataclass(frozen=True)
class TokenGroups:
    """The groups of a split, numbered without gaps: ``ids [num_documents]`` (-1: none), ``domains [G]``."""

    ids: Tensor
    domains: NDArray[np.int64]


def moe_layers(model: Any) -> dict[int, MoELayer]:
    """The model's MoE layers by number.

    Raises:
        ConfigError: it has none.
    """
    layers: dict[int, MoELayer] = dict(model.moe_layers())
    if not layers:
        raise ConfigError(
            "this model has no Mixture-of-Experts layers, so there is no routing to look at",
            "Name a run that was trained with experts ('moectl train --router top1' makes one).",
        )
    return layers


def token_groups(dataset: PackedDataset) -> TokenGroups:
    """The groups that occur in the held-out split, with their domains."""
    split = dataset.eval
    documents = np.asarray(split.doc_ids)
    present = np.unique(dataset.group_ids[documents])
    number = np.full(int(dataset.group_ids.max()) + 1, -1, dtype=np.int64)
    number[present] = np.arange(len(present))
    compact = number[dataset.group_ids]
    domains = np.zeros(len(present), dtype=np.int64)
    domains[compact[documents]] = np.asarray(split.domain_ids, dtype=np.int64)[:, None]
    return TokenGroups(torch.from_numpy(compact), domains)


def collect(
    model: Any,
    dataset: PackedDataset,
    *,
    batch_size: int = 16,
    groups: TokenGroups | None = None,
    keep_hidden: bool = False,
    observer: Observer | None = None,
) -> RoutingTrace:
    """Run the whole held-out split through ``model`` and keep every layer's routing.

    The model is put into eval mode (no noise, no training-only paths) and left as it was found.

    Args:
        model: has ``moe_layers()`` and takes ``(input_ids, doc_ids=...)``.
        dataset: its ``eval`` split is read.
        batch_size: blocks per forward pass.
        groups: of the split, when they are at hand already.
        keep_hidden: also keep each layer's input (``T · D`` numbers per layer).
        observer: sees each layer's input as it passes, so that nothing large need be kept.

    Raises:
        ConfigError: the model has no MoE layers.
        MoectlError: the held-out split is empty.
    """
    layers = moe_layers(model)
    split = dataset.eval
    if split.num_blocks == 0:
        raise MoectlError("the held-out split is empty", "Prepare the data again with more text.")
    groups = groups or token_groups(dataset)
    device = next(model.parameters()).device
    recorders = {number: _Recorder(number, keep_hidden, observer) for number in layers}
    ids, domains, group_ids = [], [], []
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for number, layer in layers.items():
            stack.callback(layer.register_forward_hook(recorders[number].hook, with_kwargs=True).remove)
        for start in range(0, split.num_blocks, batch_size):
            batch = split.batch(range(start, min(start + batch_size, split.num_blocks)))
            group_T = groups.ids[batch.doc_ids].reshape(-1)
            for recorder in recorders.values():
                recorder.group_T = group_T.to(device)
            model(batch.input_ids.to(device), doc_ids=batch.doc_ids.to(device))
            ids.append(batch.input_ids.reshape(-1))
            domains.append(batch.domain_ids.repeat_interleave(batch.input_ids.shape[1]))
            group_ids.append(group_T)
    return RoutingTrace(
        layers={number: recorders[number].trace(layer.router) for number, layer in layers.items()},
        token_ids=torch.cat(ids),
        token_domains=torch.cat(domains),
        token_groups=torch.cat(group_ids),
        group_domains=groups.domains,
        domain_names=tuple(dataset.domains),
        split=split.name,
    )


class _Recorder:
    """The forward hook of one layer: moves each call's routing to the CPU."""

    def __init__(self, number: int, keep_hidden: bool, observer: Observer | None) -> None:
        self.number = number
        self.keep_hidden = keep_hidden
        self.observer = observer
        self.group_T: Tensor = torch.empty(0, dtype=torch.int64)
        self.dropped: Tensor | None = None
        self.parts: dict[str, list[Tensor]] = {"indices": [], "weights": [], "probs": [], "entropy": [], "hidden": []}

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, MoELayer) and layer.routing is not None
        out = layer.routing
        x = args[0] if args else kwargs["x"]
        x_TD = x.detach().reshape(-1, x.shape[-1])
        if self.observer is not None:
            self.observer(self.number, x_TD, self.group_T, layer.token_mask)
        self._keep("indices", chosen_experts(out))
        self._keep("weights", out.topk_weights.float())
        self._keep("probs", out.router_probs_clean.float())
        self._keep("entropy", out.entropy.float())
        if self.keep_hidden:
            self._keep("hidden", x_TD)
        if layer.dropped is not None:
            dropped_E = layer.dropped.detach().cpu()
            self.dropped = dropped_E if self.dropped is None else self.dropped + dropped_E

    def _keep(self, name: str, value: Tensor) -> None:
        self.parts[name].append(value.detach().cpu())

    def trace(self, router: Router) -> LayerTrace:
        whole = {name: torch.cat(parts) if parts else None for name, parts in self.parts.items()}
        indices, weights, probs, entropy = (whole[name] for name in ("indices", "weights", "probs", "entropy"))
        assert indices is not None and weights is not None and probs is not None and entropy is not None
        shape = (router.num_experts, router.top_k)
        hidden, dropped = whole["hidden"], self.dropped
        return LayerTrace(type(router).__name__, *shape, indices, weights, probs, entropy, hidden, dropped)

"""What our own modules compute on the way, by the names of a tape.

Hooks see what goes in and out of modules. Queries and keys after their rotation pass through no module;
they are seen where ``scaled_dot_product_attention`` is called. Nothing in the decoder knows of this.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K slots per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from moectl.models.decoder import Attention, Decoder, DecoderLayer
from moectl.moe.dispatch import dispatch
from moectl.moe.experts import Experts
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router
from moectl.moe.types import RouterOutput
from moectl.parity.case import Reroute
from moectl.parity.tape import Tape, model_order

#: Tokens first, ``[T, ...]``; in all others the sequence is a dimension of its own.
_BY_TOKEN = ("router_logits", "chosen", "weights", "experts_input")
#: ``[B, H, S, P]``; in all others the sequence comes second.
_BY_HEAD = ("q", "k", "v", "q_rotated", "k_rotated")


class Capture(AbstractContextManager["Capture"]):
    """Watches a component while it runs; once per call, so that cached chunks can be put together again.

    Args:
        module: a component of ours.
        reroute: another side's routing, injected into every router.

    Attributes:
        on: whether what passes is kept; routes are injected in any case.
        routings: of each MoE layer, one per call.
    """

    def __init__(self, module: nn.Module, reroute: Reroute | None = None) -> None:
        self.module, self.reroute, self.on = module, reroute, True
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self.routings: dict[int, list[RouterOutput]] = defaultdict(list)
        self.experts: dict[str, Experts] = {}
        self._handles: list[RemovableHandle] = []
        self._attention = _WatchAttention(self)

    def __enter__(self) -> Self:
        module = self.module
        if isinstance(module, Decoder):
            self._output("embeddings", module.embed_tokens)
            for number, layer in enumerate(module.layers):
                assert isinstance(layer, DecoderLayer)
                self._watch_layer(layer, number, f"layers.{number}.")
            self._output("final_norm", module.norm)
        elif isinstance(module, DecoderLayer):
            self._watch_layer(module, 0, "")
        elif isinstance(module, Attention):
            self._watch_attention(module, "")
        elif isinstance(module, MoELayer):
            self._watch_moe(module, 0, "")
        elif isinstance(module, Router):
            self._watch_router(module, 0, "")
        self._attention.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attention.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def keep(self, name: str, tensor: Tensor) -> None:
        if self.on:
            self.seen[name].append(tensor)

    def tape(self, batch: int) -> Tape:
        """What was seen, of all calls together, with every expert's own output on every token."""
        joined = {name: _joined(name, parts, batch) for name, parts in self.seen.items()}
        for prefix, experts in self.experts.items():
            joined[f"{prefix}mlp.expert_outputs"] = expert_outputs(experts, joined.pop(f"{prefix}mlp.experts_input"))
        tape = Tape()
        for name in sorted(joined, key=model_order):
            tape.record(name, joined[name])
        return tape

    # --- who is watched

    def _watch_layer(self, layer: DecoderLayer, number: int, prefix: str) -> None:
        self._output(f"{prefix}attn.input", layer.input_layernorm)
        self._watch_attention(layer.self_attn, prefix)
        self._input(f"{prefix}attn.residual", layer.post_attention_layernorm)
        self._output(f"{prefix}mlp.input", layer.post_attention_layernorm)
        if isinstance(layer.mlp, MoELayer):
            self._watch_moe(layer.mlp, number, prefix)
        else:
            self._output(f"{prefix}mlp.output", layer.mlp)
        self._output(f"{prefix}mlp.residual", layer)

    def _watch_attention(self, attention: Attention, prefix: str) -> None:
        def begins(_: nn.Module, args: tuple[Any, ...]) -> None:
            x_BSD, tables = args[0], args[1]
            self._attention.prefix = prefix
            if attention.layer == 0:
                for name, table in zip(("rope.cos", "rope.sin"), tables, strict=True):
                    by_row = table.squeeze(1) if table.dim() == 4 else table
                    self.keep(name, by_row.expand(x_BSD.shape[0], *by_row.shape[-2:]))

        def value(_: nn.Module, __: object, v_BSX: Tensor) -> None:
            self.keep(f"{prefix}attn.v", v_BSX.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2))

        self._handles.append(attention.register_forward_pre_hook(begins))
        self._output(f"{prefix}attn.q", attention.q_norm, lambda q_BSHP: q_BSHP.transpose(1, 2))
        self._output(f"{prefix}attn.k", attention.k_norm, lambda k_BSGP: k_BSGP.transpose(1, 2))
        self._handles.append(attention.v_proj.register_forward_hook(value))
        self._input(f"{prefix}attn.heads", attention.o_proj)
        self._output(f"{prefix}attn.output", attention)

    def _watch_moe(self, layer: MoELayer, number: int, prefix: str) -> None:
        def shaped(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._shape = args[0].shape

        def routed(_: nn.Module, args: tuple[Any, ...], out_TD: Tensor) -> None:
            self.keep(f"{prefix}mlp.experts_input", args[0])
            self.keep(f"{prefix}mlp.routed", out_TD.reshape(self._shape))

        self.experts[prefix] = layer.experts
        self._handles.append(layer.register_forward_pre_hook(shaped))
        self._watch_router(layer.router, number, prefix)
        self._handles.append(layer.experts.register_forward_hook(routed))
        if layer.shared_experts is not None:
            self._output(f"{prefix}mlp.shared", layer.shared_experts)
        self._output(f"{prefix}mlp.output", layer)

    def _watch_router(self, router: Router, number: int, prefix: str) -> None:
        def decided(_: nn.Module, __: object, out: RouterOutput) -> RouterOutput:
            out = out if self.reroute is None else _rerouted(out, self.reroute, number)
            if self.on:
                self.routings[number].append(out)
            self.keep(f"{prefix}mlp.router_logits", out.router_logits)
            keep_TK = torch.ones_like(out.topk_indices, dtype=torch.bool) if out.keep is None else out.keep
            none_TE = torch.zeros_like(out.router_logits)
            self.keep(f"{prefix}mlp.chosen", none_TE.bool().scatter(1, out.topk_indices, keep_TK))
            self.keep(f"{prefix}mlp.weights", none_TE.scatter(1, out.topk_indices, out.topk_weights.to(none_TE.dtype)))
            return out

        self._handles.append(router.register_forward_hook(decided))

    def _output(self, name: str, module: nn.Module, view: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            self.keep(name, view(out))

        self._handles.append(module.register_forward_hook(hook))

    def _input(self, name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.keep(name, args[0])

        self._handles.append(module.register_forward_pre_hook(hook))


class _WatchAttention(TorchFunctionMode):
    """Sees the queries and keys that attention is called with; of cached keys, the new ones."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture, self.prefix = capture, ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q_BHSP, k_BGCP = args[0], args[1]
            self.capture.keep(f"{self.prefix}attn.q_rotated", q_BHSP)
            self.capture.keep(f"{self.prefix}attn.k_rotated", k_BGCP[:, :, -q_BHSP.shape[2] :])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def expert_outputs(experts: Experts, x_TD: Tensor) -> Tensor:
    """Every expert's unweighted output on every token, ``[T, E, D]``, as its backend computes it.

    One call: the tokens once per expert, each copy sent to its expert alone with weight 1.
    """
    tokens, count = x_TD.shape[0], experts.num_experts
    expert_A1 = torch.arange(count, device=x_TD.device).repeat_interleave(tokens)[:, None]
    ones_A1 = torch.ones_like(expert_A1, dtype=x_TD.dtype)
    none_AE = x_TD.new_zeros(()).expand(count * tokens, count)  # dispatch reads its width alone
    everywhere = RouterOutput(expert_A1, ones_A1, none_AE, none_AE, none_AE, none_AE[:, 0])
    out_AD = experts(x_TD.repeat(count, 1), dispatch(everywhere))
    return out_AD.view(count, tokens, -1).transpose(0, 1)


def _rerouted(out: RouterOutput, reroute: Reroute, layer: int) -> RouterOutput:
    """The same decision with another side's experts and weights; padding stays unrouted."""
    weights_TK, indices_TK = reroute(layer, out.router_logits)
    keep_TK = None if out.keep is None else out.keep[:, :1].expand_as(indices_TK)
    weights_TK = weights_TK.to(out.topk_weights.dtype)
    if keep_TK is not None:
        weights_TK = weights_TK.masked_fill(~keep_TK, 0.0)
    return out._replace(topk_weights=weights_TK, topk_indices=indices_TK, keep=keep_TK)


def _joined(name: str, parts: list[Tensor], batch: int) -> Tensor:
    """One tensor of all calls, in the order of positions."""
    if len(parts) == 1:
        return parts[0]
    kind = name.rpartition(".")[2]
    if kind in _BY_TOKEN:
        return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(parts, dim=2 if kind in _BY_HEAD else 1)

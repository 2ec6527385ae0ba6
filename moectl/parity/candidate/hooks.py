"""Recording what somebody's module computes inside, in the tape's names and shapes.

Hooks sit on the submodules that the mapping identified and are gone when the context ends; what has no module is
seen by :mod:`moectl.parity.candidate.watching`.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, H heads, G key/value heads, P head dimension,
E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moectl.parity.candidate.experts_again import every_expert
from moectl.parity.candidate.outputs import Routed, RouterReading, main_output, routed, spread_out, tensors_in
from moectl.parity.candidate.pieces import Pieces
from moectl.parity.candidate.rotary import rotary_functions, rotary_modules
from moectl.parity.candidate.shapes import Orientations, as_heads, as_rope_table, as_sequence, unrepeated
from moectl.parity.candidate.user_code import AdapterError
from moectl.parity.candidate.watching import Routing, Watch
from moectl.parity.candidate.wiring import LayerWiring, Wiring
from moectl.parity.case import Reroute, Unsupported
from moectl.parity.formula import Formula


@dataclass
class Learned:
    """What the first run taught, where all sizes differ.

    Attributes:
        readings: path of a router module -> what it returns.
        orientations: of tensors with heads.
        inline: whether combine weights are read off functions, where the router has no module of its own.
        fused: whether fused experts could be asked one by one.
    """

    readings: dict[str, RouterReading] = field(default_factory=dict)
    orientations: Orientations = field(default_factory=dict)
    inline: bool = True
    fused: bool = True


class Recorder(Pieces):
    """Records one run.

    Args:
        module: the candidate's.
        wiring: where its parts are.
        formula: the family's, for sizes.
        learned: from the first run.
        reroute: another side's choice, to be put in.
    """

    def __init__(
        self, module: nn.Module, wiring: Wiring, formula: Formula, *, learned: Learned, reroute: Reroute | None = None
    ) -> None:
        super().__init__(formula, learned.orientations, Watch(self._attended))
        self.module, self.wiring = module, wiring
        self.learned, self.reroute = learned, reroute
        self._layer: LayerWiring | None = None
        self._input: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, readers: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Hooks are in place as long as this lasts; ``readers`` are an adapter's own: tape name -> path."""
        with ExitStack() as stack:
            self.told = {name for name, reader in (readers or {}).items() if reader is not None}
            for name, reader in (readers or {}).items():
                if isinstance(reader, str):
                    self._read(stack, name, reader)
            modules = self.wiring.modules
            if "embed" in modules:
                self._after(stack, modules["embed"], self._embedded)
            for layer in self.wiring.layers:
                self._hook_attention(stack, layer)
                self._hook_mlp(stack, layer)
                if layer.layer is not None:
                    self._output(stack, layer.layer, layer.at + "mlp.residual")
            if "final_norm" in modules:
                self._output(stack, modules["final_norm"], "final_norm")
            for path in rotary_modules(self.module):
                self._after(stack, path, self._rotary)
            stack.enter_context(rotary_functions(self.module, self._rotary))
            with self.watch:
                yield

    def _read(self, stack: ExitStack, name: str, reader: str) -> None:
        path, _, side = reader.partition(":")
        if path and path not in dict(self.module.named_modules()):
            raise AdapterError(
                f"the adapter reads '{name}' from '{path}', which the module has not", "Name a submodule."
            )
        if side == "input":
            self._before(stack, path, lambda x: self.put_as(name, x))
        else:
            self._after(stack, path, lambda out: self.put_as(name, next(t for _, t in tensors_in(out))))

    # Attention

    def _hook_attention(self, stack: ExitStack, layer: LayerWiring) -> None:
        at, modules = layer.at, layer.modules
        heads = {"q": self.formula.attention.num_heads, "k": self.formula.attention.num_kv_heads}
        heads["v"] = heads["k"]
        if "attn_norm" in modules:
            self._output(stack, modules["attn_norm"], at + "attn.input")
            if layer is self.wiring.layers[0] and self.wiring.modules:
                self._before(stack, modules["attn_norm"], lambda x: self.once("embeddings", x))
        entered = layer.attention if layer.attention is not None else layer.layer
        if entered is not None:
            self._before(stack, entered, lambda x: setattr(self, "_layer", layer))
        if self.formula.attention.clip_qkv is None:
            for role, count in heads.items():
                source = self._source(layer, role)
                if source is not None:
                    name = f"{at}attn.{role}"
                    self._after(stack, source, partial(self._heads, name, count))
            if "qkv" in modules and self.formula.attention.qk_norm == "none":
                self._after(stack, modules["qkv"], lambda out: self._split(at, out))
        if "o" in modules:
            self._before(stack, modules["o"], lambda x: self.put(at + "attn.heads", as_sequence(x, self.leading)))
        output = layer.attention if layer.attention is not None else modules.get("o")
        if output is not None:
            self._output(stack, output, at + "attn.output")

    def _source(self, layer: LayerWiring, role: str) -> str | None:
        """The module whose output is the query (key, value) before the rotation."""
        if role == "v" or self.formula.attention.qk_norm == "none":
            return layer.modules.get(role)
        norm = f"{role}_norm"
        return layer.modules.get(norm) if norm in layer.modules or norm in layer.roles else layer.modules.get(role)

    def _split(self, at: str, out: Any) -> None:
        attention = self.formula.attention
        queries, keys = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        if isinstance(out, Tensor) and out.shape[-1] == queries + 2 * keys:
            for role, part in zip("qkv", out.split([queries, keys, keys], dim=-1), strict=True):
                self._heads(f"{at}attn.{role}", attention.num_heads if role == "q" else attention.num_kv_heads, part)

    def _heads(self, name: str, count: int, out: Any) -> None:
        if isinstance(out, Tensor):
            self.put_heads(name, out, count)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Arguments of ``scaled_dot_product_attention``."""
        self._rotated(query, "q_rotated")
        self._rotated(key, "k_rotated")
        self._rotated(value, "v")

    def _rotary(self, out: Any) -> None:
        """A rotary helper gave tables ``(cos, sin)``, a rotated tensor, or rotated ``(q, k)``."""
        tensors = [tensor for _, tensor in tensors_in(out)]
        head_dim = self.formula.attention.head_dim
        if len(tensors) == 2:
            tables = [as_rope_table(tensor, self.leading, head_dim) for tensor in tensors]
            if all(table is not None for table in tables):
                for name, table in zip(("rope.cos", "rope.sin"), tables, strict=True):
                    self.once(name, table)
                return
            self._rotated(tensors[0], "q_rotated")
            self._rotated(tensors[1], "k_rotated")
        elif len(tensors) == 1 and self._layer is not None:
            self._rotated(tensors[0], "k_rotated" if self.shown(f"{self._layer.at}attn.q_rotated") else "q_rotated")

    def _rotated(self, tensor: Tensor, name: str) -> None:
        layer, attention = self._layer, self.formula.attention
        if layer is None or tensor.is_complex():
            return
        full = f"{layer.at}attn.{name}"
        if self.shown(full):
            return  # by a helper
        groups = attention.num_heads if name == "q_rotated" else attention.num_kv_heads
        with self.asleep():
            for count in dict.fromkeys((groups, attention.num_heads)):
                found = as_heads(tensor, self.leading, count, attention.head_dim, key=name, known=self.orientations)
                if found is not None:
                    self.put(full, unrepeated(found, attention.num_heads, groups) if count != groups else found, 2)
                    return

    # Feed-forward

    def _hook_mlp(self, stack: ExitStack, layer: LayerWiring) -> None:
        at, modules = layer.at, layer.modules
        if "mlp_norm" in modules:
            self._before(
                stack, modules["mlp_norm"], lambda x: self.put(at + "attn.residual", as_sequence(x, self.leading))
            )
            self._output(stack, modules["mlp_norm"], at + "mlp.input")
            self._after(stack, modules["mlp_norm"], lambda out: self._keep_input(layer, out))
        if layer.has_experts:
            for path in layer.routers:
                self._after(stack, path, partial(self._router, layer, path))
            if layer.shared is not None:
                self._after(stack, layer.shared, lambda out: self._shared(layer, out))
                if layer.stack is not None:
                    self._after(stack, layer.stack, partial(self._routed_sum, layer))
            if "shared_router" in modules:
                self._after(stack, modules["shared_router"], lambda out: self._shared_gate(layer, out))
            for path in layer.experts:
                self._before(stack, path, lambda x: self._expert_begins())
            around = layer.block if layer.block is not None else layer.layer
            if around is not None:
                self._before(stack, around, lambda x: self._block_begins(layer, x))
                self._after(stack, around, lambda out: self._block_ends(layer, out))
        elif layer.block:
            self._output(stack, layer.block, at + "mlp.output")

    def _keep_input(self, layer: LayerWiring, x: Any) -> None:
        if isinstance(x, Tensor):
            self._input[layer.at] = x.detach().clone()

    def _block_begins(self, layer: LayerWiring, x: Tensor) -> None:
        if layer.block is not None:
            self._input[layer.at] = x.detach().clone()  # it may be changed in place
        router, tensors = self.formula.router, dict(self.module.named_parameters())
        self.watch.routing = Routing(
            self.leading[0] * self.leading[1],
            router.num_experts,
            router.top_k,
            weight=tensors.get(layer.router_weight or ""),
            bias=tensors.get(layer.router_bias or ""),
            experts=tuple(tensors[name] for name in layer.matrices if name in tensors),
            choose=None if self.reroute is None else lambda logits: self._chosen(layer, logits),
        )

    def _chosen(self, layer: LayerWiring, logits: Tensor) -> Tensor:
        assert self.reroute is not None
        with self.asleep():
            indices_TK = self.reroute(layer.number, logits)[1]
        if indices_TK.shape[1] != self.formula.router.top_k:
            raise Unsupported("the route to be put in does not have k experts for every token")
        return indices_TK

    def _expert_begins(self) -> None:
        if self.watch.routing is not None and self.watch.routing.indices is not None:
            self.watch.routing.ended = True

    def _router(self, layer: LayerWiring, path: str, out: Any) -> None:
        module, router = self.module.get_submodule(path), self.formula.router
        tokens = self.leading[0] * self.leading[1]
        if isinstance(module, nn.Linear) and isinstance(out, Tensor):
            if out.numel() == tokens * router.num_experts:
                self.once(layer.at + "mlp.router_logits", out.reshape(tokens, -1), -1)
            return
        reading = self.learned.readings.get(path)
        if reading is not None:
            self._routed(layer, routed(out, reading, num_experts=router.num_experts))

    def _routed(self, layer: LayerWiring, seen: Routed) -> None:
        for name, tensor in zip(("router_logits", "chosen", "weights"), seen, strict=True):
            if tensor is not None:
                self.once(f"{layer.at}mlp.{name}", tensor, -1)

    def _block_ends(self, layer: LayerWiring, out: Any) -> None:
        routing, self.watch.routing = self.watch.routing, None
        with self.asleep():
            if routing is not None:
                if self.reroute is not None and not routing.replaced:
                    raise Unsupported(
                        "its choice of experts cannot be replaced: no torch.topk of its scores was seen; "
                        "an adapter's reroute() does it"
                    )
                if routing.logits is not None:
                    self.once(layer.at + "mlp.router_logits", routing.logits.reshape(routing.tokens, -1), -1)
                if routing.indices is not None:
                    seen = _inline(routing)
                    self._routed(layer, seen if self.learned.inline else seen._replace(weights_TE=None))
            if layer.block is None:
                return
            output = main_output(out, self.leading, self.formula.experts.hidden_size)
            self.put(layer.at + "mlp.output", output)
            if layer.shared is None and self.formula.experts.shared == "none":
                self.put(layer.at + "mlp.routed", output)
            given = self._input.get(layer.at)
            if given is not None and (layer.experts or (layer.stack and self.learned.fused)):
                x_TD = given.reshape(-1, given.shape[-1])
                outputs = every_expert(self.module, layer, x_TD, self.formula.router.num_experts)
                self.put(layer.at + "mlp.expert_outputs", outputs, -1)

    def _routed_sum(self, layer: LayerWiring, out: Any) -> None:
        """Of fused experts beside shared ones, where they give the weighted sum themselves."""
        self.put(layer.at + "mlp.routed", main_output(out, self.leading, self.formula.experts.hidden_size))

    def _shared(self, layer: LayerWiring, out: Any) -> None:
        if isinstance(out, Tensor):
            shaped = as_sequence(out, self.leading)
            if "shared_router" in layer.modules:
                self._input[layer.at + "shared"] = out if shaped is None else shaped
            else:
                self.put(layer.at + "mlp.shared", shaped)

    def _shared_gate(self, layer: LayerWiring, out: Any) -> None:
        shared = self._input.pop(layer.at + "shared", None)
        if isinstance(out, Tensor) and shared is not None and (gate := as_sequence(out, self.leading)) is not None:
            self.put(layer.at + "mlp.shared", torch.sigmoid(gate) * shared)

    # Plumbing

    def _embedded(self, out: Any) -> None:
        if isinstance(out, Tensor) and not any("attn_norm" in layer.modules for layer in self.wiring.layers):
            self.put("embeddings", as_sequence(out, self.leading))

    def _output(self, stack: ExitStack, path: str, name: str) -> None:
        self._after(
            stack, path, lambda out: self.put(name, main_output(out, self.leading, self.formula.experts.hidden_size))
        )

    def _after(self, stack: ExitStack, path: str, look: Callable[[Any], None]) -> None:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not self.watch.asleep:  # moectl itself asks experts once more
                with self.asleep():
                    look(out)

        stack.callback(self.module.get_submodule(path).register_forward_hook(hook).remove)

    def _before(self, stack: ExitStack, path: str, look: Callable[[Tensor], None]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is not None and not self.watch.asleep:
                with self.asleep():
                    look(first)

        target = self.module.get_submodule(path)
        stack.callback(target.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _inline(routing: Routing) -> Routed:
    """What a router without a module of its own chose."""
    assert routing.indices is not None
    indices_TK = routing.indices.reshape(routing.tokens, -1)
    weights = routing.weights
    weights_TK = None if weights is None or weights.numel() != indices_TK.numel() else weights.reshape(indices_TK.shape)
    chosen_TE, weights_TE = spread_out(weights_TK, indices_TK, routing.num_experts)
    dense = routing.dense
    if dense is not None and dense.is_floating_point():
        dense_TE = dense.reshape(routing.tokens, -1)
        if bool(((dense_TE != 0) <= chosen_TE).all()) and not bool(((dense_TE == 0) | (dense_TE == 1)).all()):
            weights_TE = dense_TE
    return Routed(None, chosen_TE, weights_TE)

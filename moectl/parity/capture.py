"""What a Hugging Face module computes inside, by hooks that are gone when the context ends.

A model that is fed in pieces computes each tensor in pieces: they are put together along the sequence.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, H heads, P head dimension, E experts, K experts
per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.hf.attention import listened
from moectl.hf.family import Family
from moectl.hf.releases import are_probabilities
from moectl.parity.case import Level, Reroute
from moectl.parity.tape import Tape

_TOKENS = "tokens"


class Capture:
    """Collects tensors by their names on a :class:`Tape`.

    Attributes:
        router_logits: by layer, the pieces ``[B, s, E]`` with their graph, for the balance loss.
        embedded: the pieces ``[B, s, D]`` that the embedding gave, gradients retained.
        weights: by layer, the last combine weights ``[T, E]`` with their graph: a lone router's output.
    """

    def __init__(self, family: Family, reroute: Reroute | None) -> None:
        self.family = family
        self.reroute = reroute
        self.router_logits: dict[int, list[Tensor]] = {}
        self.embedded: list[Tensor] = []
        self.weights: dict[int, Tensor] = {}
        self.shape: tuple[int, int] = (1, 1)
        self._pieces: dict[str, tuple[list[Tensor], int | str]] = {}
        self._unrotated: dict[nn.Module, dict[str, Tensor]] = {}
        self._attention_of: dict[nn.Module, str] = {}
        self._shared: Tensor | None = None

    def put(self, name: str, tensor: Tensor, along: int | str = 1, *, copy: bool = True) -> None:
        """Keep one piece.

        Args:
            name: on the tape.
            tensor: as computed.
            along: the sequence's dimension, or "tokens" where the first dimension is batch and sequence at once.
            copy: whether somebody else may still change it.
        """
        kept = tensor.detach()
        kept = kept.clone() if copy else kept
        if along == _TOKENS:
            kept = kept.reshape(*self.shape, *kept.shape[1:])
        self._pieces.setdefault(name, ([], along))[0].append(kept)

    def tape(self) -> Tape:
        """The pieces put together."""
        tape = Tape()
        for name, (pieces, along) in self._pieces.items():
            dim = 1 if along == _TOKENS else int(along)
            whole = torch.cat(pieces, dim=dim) if len(pieces) > 1 else pieces[0]
            tape.record(name, whole.flatten(0, 1) if along == _TOKENS else whole)
        return tape

    def hook(self, stack: ExitStack, level: Level, module: nn.Module) -> None:
        """Register on ``module`` what lasts as long as ``stack``."""
        if level == "model":
            decoder: Any = module.model
            _after(stack, decoder.embed_tokens, self._embedded)
            _after(stack, decoder.rotary_emb, self.rope)
            for index, layer in enumerate(decoder.layers):
                self._layer(stack, layer, index, f"layers.{index}.")
            _after(stack, decoder.norm, lambda out: self.put("final_norm", out))
            stack.enter_context(listened(decoder.config, self._rotated))
        elif level == "layer":
            self._layer(stack, module, 0, "")
            stack.enter_context(listened(module.self_attn.config, self._rotated))  # type: ignore[union-attr]
        elif level == "attention":
            self._attention(stack, module, "")
            stack.enter_context(listened(module.config, self._rotated))
        elif level == "moe":
            self._moe(stack, module, 0, "")
            _after(stack, module, lambda out: self.put("mlp.output", _first(out)))
        else:
            self._router(stack, module, 0, "")

    def rope(self, tables: tuple[Tensor, Tensor]) -> None:
        """The rotary tables, ``[B, S, P]`` each."""
        for name, table in zip(("rope.cos", "rope.sin"), tables, strict=True):
            self.put(name, table)

    def _embedded(self, out_BSD: Tensor) -> None:
        self.shape = (out_BSD.shape[0], out_BSD.shape[1])
        self.put("embeddings", out_BSD)
        if out_BSD.requires_grad:
            out_BSD.retain_grad()
            self.embedded.append(out_BSD)

    def _layer(self, stack: ExitStack, layer: Any, index: int, at: str) -> None:
        _after(stack, layer.input_layernorm, lambda out: self.put(at + "attn.input", out))
        self._attention(stack, layer.self_attn, at)
        _before(stack, layer.post_attention_layernorm, lambda x: self.put(at + "attn.residual", x))
        _after(stack, layer.post_attention_layernorm, lambda out: self.put(at + "mlp.input", out))
        if hasattr(layer.mlp, "experts"):
            self._moe(stack, layer.mlp, index, at)
        _after(stack, layer.mlp, lambda out: self.put(at + "mlp.output", _first(out)))
        _after(stack, layer, lambda out: self.put(at + "mlp.residual", _first(out)))

    def _attention(self, stack: ExitStack, attention: Any, at: str) -> None:
        # Kept by reference until they are rotated: OLMoE clamps them in place on the way.
        sources = self._unrotated[attention] = {}
        for name in "qkv":
            normed = self.family.qk_norm and name != "v"
            source = getattr(attention, f"{name}_norm" if normed else f"{name}_proj")
            _after(stack, source, partial(sources.__setitem__, name))
        self._attention_of[attention] = at
        _before(stack, attention.o_proj, lambda x: self.put(at + "attn.heads", x))
        _after(stack, attention, lambda out: self.put(at + "attn.output", _first(out)))

    def _rotated(self, attention: nn.Module, query_BHSP: Tensor, key_BGCP: Tensor) -> None:
        at, sources = self._attention_of[attention], self._unrotated[attention]
        length, head_dim = query_BHSP.shape[2:]
        for name, source in sources.items():
            split = source.reshape(source.shape[0], length, -1, head_dim).transpose(1, 2)
            self.put(f"{at}attn.{name}", split, 2)
        self.put(at + "attn.q_rotated", query_BHSP, 2)
        self.put(at + "attn.k_rotated", key_BGCP[:, :, -length:], 2)  # before these: what the cache held
        sources.clear()

    def _moe(self, stack: ExitStack, block: Any, layer: int, at: str) -> None:
        self._router(stack, getattr(block, self.family.gate), layer, at)
        handle = block.experts.register_forward_hook(lambda module, args, out: self._experts(module, args, out, at))
        stack.callback(handle.remove)
        if self.family.shared is None:
            return
        shared = getattr(block, self.family.shared)
        if self.family.shared_gate is None:
            _after(stack, shared, lambda out: self._put_shared(out, at))
        else:
            _after(stack, shared, lambda out: setattr(self, "_shared", out))
            _after(stack, getattr(block, self.family.shared_gate), lambda out: self._put_shared(self._gated(out), at))

    def _gated(self, gate: Tensor) -> Tensor:
        assert self._shared is not None, "the shared expert runs before its gate"
        return F.sigmoid(gate) * self._shared

    def _put_shared(self, out: Tensor, at: str) -> None:
        self.put(at + "mlp.shared", out.reshape(*self.shape, -1))

    def _router(self, stack: ExitStack, gate: Any, layer: int, at: str) -> None:
        def choose(module: Any, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            logits_TE, weights_TK, indices_TK = out
            raw_TE = logits_TE
            if are_probabilities(logits_TE.detach()):  # as releases before 5.6 returned; the tape holds logits
                raw_TE = F.linear(args[0].reshape(-1, args[0].shape[-1]), module.weight, getattr(module, "bias", None))
            if self.reroute is not None:
                chosen = self.reroute(layer, raw_TE)
                weights_TK, indices_TK = chosen[0].to(weights_TK.dtype), chosen[1]
            self.router_logits.setdefault(layer, []).append(logits_TE.reshape(*self.shape, -1))
            spread_TE = torch.zeros_like(raw_TE, dtype=weights_TK.dtype)
            self.put(at + "mlp.router_logits", raw_TE, _TOKENS)
            self.put(at + "mlp.chosen", spread_TE.bool().scatter(1, indices_TK, True), _TOKENS, copy=False)
            self.weights[layer] = spread_TE.scatter(1, indices_TK, weights_TK)
            self.put(at + "mlp.weights", self.weights[layer], _TOKENS)
            return None if self.reroute is None else (logits_TE, weights_TK, indices_TK)

        stack.callback(gate.register_forward_hook(choose).remove)

    @torch.no_grad()
    def _experts(self, experts: Any, args: tuple[Tensor, ...], out_TD: Tensor, at: str) -> None:
        hidden_TD = args[0].reshape(-1, args[0].shape[-1])
        one_T1 = torch.ones(len(hidden_TD), 1, dtype=hidden_TD.dtype, device=hidden_TD.device)
        each = [
            experts.forward(hidden_TD, torch.full_like(one_T1, expert, dtype=torch.int64), one_T1)
            for expert in range(experts.num_experts)
        ]
        self.put(at + "mlp.expert_outputs", torch.stack(each, dim=1), _TOKENS, copy=False)
        self.put(at + "mlp.routed", out_TD.reshape(*self.shape, -1))


@contextmanager
def captured(
    family: Family, level: Level, module: nn.Module, *, shape: tuple[int, int], reroute: Reroute | None = None
) -> Iterator[Capture]:
    """Watch ``module`` while the context lasts.

    Args:
        family: of the module.
        level: what it is.
        module: as :func:`moectl.hf.build.build` made it.
        shape: batch and sequence of a lone component's input.
        reroute: another side's choice, put in place of the gate's own.
    """
    capture = Capture(family, reroute)
    capture.shape = shape
    with ExitStack() as stack:
        capture.hook(stack, level, module)
        yield capture


def _after(stack: ExitStack, module: nn.Module, look: Callable[[Any], None]) -> None:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        look(out)

    stack.callback(module.register_forward_hook(hook).remove)


def _before(stack: ExitStack, module: nn.Module, look: Callable[[Any], None]) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        look(args[0])

    stack.callback(module.register_forward_pre_hook(hook).remove)


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found

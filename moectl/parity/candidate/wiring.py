"""Where in somebody's module the parts of a decoder are, found from the parameters whose role is known.

The MoE block is what the router and the experts have in common, an expert what its matrices have in common, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from moectl.parity.candidate.roles import Named
from moectl.parity.case import Level

_FFN = ("gate", "up", "down", "gate_up", "up_gate")


@dataclass
class LayerWiring:
    """Paths of submodules of one layer; None where it has none of its own. ``""`` is the module itself.

    Attributes:
        at: prefix of the tape's names: ``layers.3.``, or nothing.
        number: of the layer; 0 in a lone component.
        modules: role -> path of the module that holds that role's weight and nothing else's.
        experts: paths of the experts in order, where each is a module.
        routers: paths from the block's child down to the module that holds the router's weight.
        router_weight, router_bias, matrices: names of parameters; ``matrices`` are the experts'.
        roles: all that are known in this layer.
    """

    at: str
    number: int
    layer: str | None = None
    attention: str | None = None
    block: str | None = None
    shared: str | None = None
    stack: str | None = None
    modules: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    has_experts: bool = False
    router_weight: str | None = None
    router_bias: str | None = None
    matrices: tuple[str, ...] = ()
    roles: frozenset[str] = frozenset()


@dataclass
class Wiring:
    """Of a whole module."""

    layers: list[LayerWiring]
    modules: dict[str, str]

    @property
    def shown(self) -> dict[str, str]:
        """Tape name -> submodule, of the first layer, for people."""
        found = {_TAPE[role]: path for role, path in self.modules.items() if role in _TAPE}
        for layer in self.layers[:1]:
            found |= {_TAPE[role]: path for role, path in layer.modules.items() if role in _TAPE}
            named = {"attn.output": layer.attention, "mlp.output": layer.block, "mlp.shared": layer.shared}
            found |= {name: path for name, path in named.items() if path}
            if layer.experts:
                found["mlp.expert_outputs"] = f"{layer.experts[0]} … {layer.experts[-1]}"
        return found


_TAPE = {
    "embed": "embeddings", "attn_norm": "attn.input", "mlp_norm": "mlp.input", "final_norm": "final_norm",
    "q_norm": "attn.q", "k_norm": "attn.k", "v": "attn.v", "router": "mlp.router_logits", "head": "logits",
    "o": "attn.heads (input)",
}  # fmt: skip


def wire(module: nn.Module, level: Level, roles: Mapping[str, Named]) -> Wiring:
    """Find the parts of ``module`` from the roles of its tensors."""
    by_layer: dict[int | None, list[Named]] = {}
    for named in roles.values():
        if named.role is not None:
            by_layer.setdefault(named.layer, []).append(named)
    outside = by_layer.pop(None, []) if level == "model" else []
    layers = [_layer(module, level, number, tensors) for number, tensors in sorted(by_layer.items(), key=_first)]
    return Wiring(
        layers, {each.role: path for each in outside if each.role and (path := _own(module, each)) is not None}
    )


def _first(item: tuple[int | None, list[Named]]) -> int:
    return -1 if item[0] is None else item[0]


def _layer(module: nn.Module, level: Level, number: int | None, tensors: list[Named]) -> LayerWiring:
    found = LayerWiring("" if number is None else f"layers.{number}.", number or 0)
    paths: dict[str, list[str]] = {}
    experts: dict[int, list[str]] = {}
    for each in tensors:
        assert each.role is not None
        owner = each.name.rpartition(".")[0]
        paths.setdefault(each.role.removesuffix(".bias"), []).append(owner)
        if each.expert is not None:
            experts.setdefault(each.expert, []).append(owner)
        own = _own(module, each)
        if own is not None and each.expert is None and each.head is None and not each.role.endswith(".bias"):
            found.modules[each.role] = own
    found.roles = frozenset(each.role for each in tensors if each.role)
    found.router_weight = next((each.name for each in tensors if each.role == "router"), None)
    found.router_bias = next((each.name for each in tensors if each.role == "router.bias"), None)
    found.matrices = tuple(each.name for each in tensors if each.role in _FFN)
    found.layer = "" if level == "layer" else _layer_path(tensors, number) if number is not None else None
    attention = [path for role in ("q", "k", "v", "o", "qkv", "kv") for path in paths.get(role, ())]
    ffn = [path for role in _FFN for path in paths.get(role, ())]
    router = paths.get("router", [])
    found.has_experts = bool(router)
    found.attention = "" if level == "attention" else _part(attention, found.layer)
    found.block = "" if level in ("moe", "router") else _part([*router, *ffn], found.layer)
    shared = [path for role in ("shared_gate", "shared_up", "shared_down") for path in paths.get(role, ())]
    found.shared = _part(shared, found.block)
    if experts and sorted(experts) == list(range(len(experts))):
        each_path = [_common(experts[number]) for number in sorted(experts)]
        if all(path.rpartition(".")[2] == str(n) and len(experts[n]) > 1 for n, path in enumerate(each_path)):
            found.experts = tuple(each_path)
    elif ffn and router:
        found.stack = _part(ffn, found.block)
    if router and found.block is not None:
        found.routers = tuple(_between(found.block, router[0], include=level == "router"))
    return found


def _own(module: nn.Module, named: Named) -> str | None:
    """The module that holds this tensor and nothing else of another role (its bias aside)."""
    path = named.name.rpartition(".")[0]
    owner = module.get_submodule(path)
    own = [name for name, _ in owner.named_parameters(recurse=True)]
    leaf = named.name.rpartition(".")[2]
    return path if path and all(name in (leaf, "bias", "shift") for name in own) else None


def _layer_path(tensors: list[Named], number: int) -> str | None:
    parts = tensors[0].name.split(".")
    at = next((place for place, part in enumerate(parts) if part == str(number)), None)
    return None if at is None else ".".join(parts[: at + 1])


def _part(paths: list[str], whole: str | None) -> str | None:
    """What the paths have in common, if that is less than ``whole``."""
    if not paths:
        return None
    common = _common(paths)
    return common if common and common != whole else None


def _common(paths: Iterable[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _between(block: str, owner: str, *, include: bool) -> list[str]:
    """Paths from ``block`` (left out unless ``include``) down to ``owner``, outermost first."""
    parts = owner.split(".") if owner else []
    depth = len(block.split(".")) if block else 0
    paths = [".".join(parts[:end]) for end in range(depth + 1, len(parts) + 1)]
    return [block, *paths] if include else paths

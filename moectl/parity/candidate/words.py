"""What people call the parts of a decoder: from a parameter's path to its role.

Roles: ``embed head final_norm attn_norm mlp_norm q k v o qkv kv q_norm k_norm router choice_bias gate up down gate_up``
and, for always-on experts, ``shared_gate shared_up shared_down shared_gate_up shared_router``.
"""

from __future__ import annotations

import re
from typing import NamedTuple


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ENDINGS = re.compile(r"(?:_?(?:projections?|projs?|linears?|layers?|weights?|kernels?|matrix|matrices|mat|params?))+$")
_BEGINNINGS = re.compile(r"^(?:(?:linear|proj|weight|fused|expert|experts|moe)_)+")
_LEAVES = _set("weight bias scale gamma kernel w b g shift beta weights")
_BIASES = _set("bias b shift beta")

ATTENTION = _set(
    "attn attention selfattn selfattention mha gqa att sa mixer multiheadattention causalselfattention csa"
)
EXPERTS = _set("experts expert expertlist deepspeedexperts localexperts ffns mlps routedexperts expertmlps")
SHARED = _set("shared sharedexpert sharedexperts sharedmlp sharedffn sharedexpertmlp alwayson residualmlp")
LAYERS = _set("layers layer h blocks block decoderlayers trfblocks transformerblocks trf decoder resblocks stack")

_ATTENTION_ROLES = {
    "q": _set("q wq query wquery toq cq qw queries wqueries"),
    "k": _set("k wk key wkey tok ck kw keys wkeys"),
    "v": _set("v wv value wvalue tov cv vw values wvalues"),
    "o": _set("o wo out output wout toout co cproj proj dense attnout oproj outproj outputproj wo"),
    "qkv": _set("qkv wqkv cattn attn inproj in toqkv qkvw querykeyvalue packed qkvproj cqkv qkvlinear linqkv"),
    "kv": _set("kv wkv tokv ckv keyvalue"),
    "q_norm": _set("qnorm normq qlayernorm qln querynorm querylayernorm qrmsnorm lnq normquery rmsq qrms"),
    "k_norm": _set("knorm normk klayernorm kln keynorm keylayernorm krmsnorm lnk normkey rmsk krms"),
}
_LAYER_NORMS = {
    "attn_norm": _set(
        "inputlayernorm ln1 norm1 attentionnorm attnnorm preattnnorm preattentionnorm lnattn normattn rms1 rmsnorm1 "
        "rmsatt preattentionlayernorm attnln attentionlayernorm inputnorm sanorm n1 layernorm1 attnprenorm normsa "
        "rmsattn preattnlayernorm norma"
    ),
    "mlp_norm": _set(
        "postattentionlayernorm ln2 norm2 ffnnorm mlpnorm moenorm preffnnorm premlpnorm lnmlp normmlp rms2 rmsnorm2 "
        "ffnorm feedforwardnorm preffnorm prefeedforwardlayernorm postattnnorm postattentionnorm lnffn lnff lnmoe "
        "ffwnorm n2 layernorm2 premlplayernorm mlpln rmsffn normffn normff normmoe premoenorm normb rmsmlp rmsmoe"
    ),
}
_MODEL_ROLES = {
    "embed": _set(
        "embedtokens tokembeddings wte embed embedding embeddings tokemb tokenembedding tokenembeddingtable "
        "tokembedding emb wordembeddings tokenembeddings embedin tokensembed embedtok tokenemb tokembed tokenembed"
    ),
    "head": _set(
        "lmhead output head outhead unembed unembedding outputproj classifier embedout logits tologits vocabproj out "
        "fcout outproj headproj lm predictionhead outputhead"
    ),
    "final_norm": _set(
        "norm lnf finalnorm lnout normf finallayernorm rmsfinal normout outputnorm outnorm finalrmsnorm lnfinal "
        "normfinal rmsnorm ln normfinalrms finalln rmsf rmsnormf"
    ),
}
_ROUTER = _set(
    "gate router gating wg wgate classifier gatenetwork switch routing routergate gatelinear gatingnetwork "
    "tokenrouter gater routelinear selector topkrouter wr wrouter gatelogits routerlogits scorer noisygate route"
)
_SHARED_ROUTER = _set("sharedexpertgate sharedgate sharedexpertrouter gateshared")
_CHOICE_BIAS = _set(
    "escorecorrectionbias expertbias expertbiases scorecorrectionbias correctionbias balancebias routingbias "
    "loadbalancebias ebias routerbias gatebias selectionbias"
)
_GATE = _set("gate wgate wg g fcgate gatefc gw gateup0 wi0 gates")
_UP = _set("up wup wu u fcup upfc uw v v1 wi1 value ups wv")
_DOWN = _set("down wdown wd d wo out output wout proj cproj fcdown downfc dw fcout o downs outproj oproj outputproj")
_FUSED = _set(
    "gateup gateandup gateupfused w13 w12 w1w3 wi in win input inproj fusedgateup gu fcin wgateup gateups w1v1 gateinup"
)
_UP_FIRST = _set("upgate upandgate w31 w3w1 upgates wupgate")
_NUMBERED = re.compile(r"(w|fc|linear|lin|l|proj|cfc|lyr|dense|mat|layer|kernel|weight|v|f|m)(\d)")


class Words(NamedTuple):
    """A path taken apart.

    Attributes:
        segments: normal forms (lower case, without underscores and fillers), indices and the leaf left out.
        indices: (place among the segments, number) of each index.
        bias: whether it is a bias.
        last: the plain last name, for messages.
    """

    segments: tuple[str, ...]
    indices: tuple[tuple[int, int], ...]
    bias: bool
    last: str


def words_of(path: str) -> Words:
    """Take a parameter's path apart."""
    parts = path.split(".")
    named = [part for part in parts if not part.isdigit()]
    leaf = parts[-1].lower()
    keep_leaf = leaf not in _LEAVES or len(named) == 1
    if not keep_leaf:
        parts = parts[:-1]
    segments: list[str] = []
    indices: list[tuple[int, int]] = []
    for part in parts:
        if part.isdigit():
            indices.append((len(segments), int(part)))
        else:
            segments.append(plain(part))
    bias = leaf in _BIASES or leaf.endswith(("_bias", "_b", "bias"))
    return Words(tuple(segments), tuple(indices), bias, parts[-1])


def plain(segment: str) -> str:
    """A segment's normal form: ``W_query`` -> ``wquery``, ``gate_proj`` -> ``gate``, ``linear_v`` -> ``v``."""
    lowered = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", segment).lower().strip("_")
    lowered = re.sub(r"_?bias$", "", lowered) if lowered != "bias" and "correction" not in lowered else lowered
    short = _BEGINNINGS.sub("", _ENDINGS.sub("", lowered))
    chosen = short if short and not (len(short) == 1 and short not in "qkvogudw") else lowered
    return chosen.replace("_", "")


def attention_role(segment: str, *, inside: bool = True) -> str | None:
    """Of a segment in an attention module; outside of one, only names that nothing else has."""
    safe = {"q", "k", "v", "qkv", "kv", "q_norm", "k_norm"}
    found = _lookup(segment, _ATTENTION_ROLES)
    return found if inside or found in safe else None


def norm_role(segment: str) -> str | None:
    """``attn_norm`` or ``mlp_norm`` of a layer."""
    return _lookup(segment, _LAYER_NORMS)


def model_role(segment: str) -> str | None:
    """``embed``, ``head`` or ``final_norm``."""
    return _lookup(segment, _MODEL_ROLES)


def is_router(segment: str) -> bool:
    return segment in _ROUTER


def is_shared_router(segment: str) -> bool:
    return segment in _SHARED_ROUTER


def is_choice_bias(segment: str) -> bool:
    return segment in _CHOICE_BIAS


def ffn_roles(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, str | None]]:
    """Which of an expert's (or a stack's) own names are gate, up and down: name -> (role, remark).

    Args:
        shapes: by normal form, all of one expert or stack. Numbered names are told apart by convention (``w1 w2 w3``:
            gate, down, up as in Mixtral; ``fc1 fc2 fc3``: gate, up, down), and by which shape is the odd one.

    Names that stay unclear are left out.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for name in shapes:
        if name in _UP_FIRST:
            found[name] = ("up_gate", "up before gate, by its name")
        elif name in _FUSED:
            found[name] = ("gate_up", "gate before up: assumed")
        elif name in _GATE:
            found[name] = ("gate", None)
        elif name in _UP:
            found[name] = ("up", None)
        elif name in _DOWN:
            found[name] = ("down", None)
    numbered = sorted((name for name in shapes if name not in found and _NUMBERED.fullmatch(name)), key=lambda n: n[-1])
    have = {role for role, _ in found.values()}
    found.update(_numbered_roles(numbered, shapes, have))
    return found


def _numbered_roles(
    names: list[str], shapes: dict[str, tuple[int, ...]], have: set[str]
) -> dict[str, tuple[str, str | None]]:
    if len(names) == 3:
        odd = [name for name in names if sum(shapes[other] == shapes[name] for other in names) == 1]
        by_custom = names[1] if names[0].startswith("w") else names[2]
        down = odd[0] if len(odd) == 1 else by_custom
        if down == names[0]:
            return {}
        why = "the odd shape is down, the other two are gate and up in order" if odd else "by custom"
        gate, up = [name for name in names if name != down]
        return {gate: ("gate", why), up: ("up", why), down: ("down", why)}
    if len(names) == 2 and "down" in have:
        return {names[0]: ("gate", "in order"), names[1]: ("up", "in order")}
    if len(names) == 2 and "up" in have:
        return {names[0]: ("gate", None), names[1]: ("down", None)}
    if len(names) == 2 and have & {"gate_up", "up_gate"} == set() and not have:
        first, second = (_numel(shapes[name]) for name in names)
        return (
            {names[0]: ("gate_up", "gate before up: assumed"), names[1]: ("down", None)} if first == 2 * second else {}
        )
    if len(names) == 1 and have & {"gate_up", "up_gate"}:
        return {names[0]: ("down", None)}
    return {}


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _lookup(segment: str, table: dict[str, frozenset[str]]) -> str | None:
    return next((role for role, names in table.items() if segment in names), None)

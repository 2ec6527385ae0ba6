"""How to call somebody's ``forward``: from its parameters' names, and by trying.

What a name leaves open is found out by running: which form of mask makes the module causal or hides padding, in which
shape it takes cosines and sines, whether it takes ``[B, S, D]`` or ``[T, D]``. Sizes of the trial are all different,
so that a wrong shape fails instead of broadcasting.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, P head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moectl.parity.candidate.user_code import CandidateError
from moectl.parity.case import Inputs, Level, Unsupported, positions_of
from moectl.parity.formula import AttentionFormula

_MASKS = {"attention_mask", "mask", "attn_mask", "causal_mask", "padding_mask", "key_padding_mask", "token_mask",
          "src_mask", "pad_mask", "attention_bias", "input_mask"}  # fmt: skip
_POSITIONS = {"position_ids", "positions", "position", "pos", "input_pos", "pos_ids", "positions_ids"}
_STARTS = {"start_pos", "past_len", "offset", "start", "past_length", "position_offset"}
_COS, _SIN = {"cos", "freqs_cos", "rope_cos", "cos_cached"}, {"sin", "freqs_sin", "rope_sin", "sin_cached"}
_PAIRS = {"position_embeddings", "rope", "rotary", "cos_sin", "rotary_emb", "freqs", "rope_cache", "rotary_pos_emb"}
_COMPLEX = {"freqs_cis", "freqs_complex", "freq_cis", "cis"}
_TARGETS = {"targets", "target"}
_DOCUMENTS = {"doc_ids", "document_ids", "doc_id", "seq_ids", "segment_ids", "document_id"}
_CACHES = {"past_key_values", "kv_cache", "cache", "past", "layer_past", "past_key_value"}
_INPUTS = {"input_ids", "idx", "tokens", "ids", "x", "input", "inputs", "token_ids", "in_idx", "hidden_states",
           "hidden", "h", "hidden_state", "inp", "tok", "src"}  # fmt: skip

_ROPE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "[B, S, P]": lambda c: c,
    "[S, P]": lambda c: c[0],
    "[B, 1, S, P]": lambda c: c[:, None],
    "[B, S, 1, P]": lambda c: c[:, :, None],
    "[B, S, P/2]": lambda c: c[..., : c.shape[-1] // 2],
    "[S, P/2]": lambda c: c[0, :, : c.shape[-1] // 2],
    "[B, 1, S, P/2]": lambda c: c[:, None, :, : c.shape[-1] // 2],
    "[B, S, 1, P/2]": lambda c: c[:, :, None, : c.shape[-1] // 2],
}
CAUSAL_MASKS = (
    "additive [B, 1, S, S]", "bool [B, 1, S, S], True = may see", "bool [S, S], True = hidden", "additive [S, S]",
    "bool [S, S], True = may see", "bool [B, 1, S, S], True = hidden",
)  # fmt: skip
PADDING_MASKS = (
    "int [B, S], 1 = real", "bool [B, S], True = real", "additive [B, 1, S, S]", "bool [B, 1, S, S], True = may see",
    "bool [B, 1, S, S], True = hidden", "additive [B, 1, 1, S]", "bool [B, S], True = padding",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a forward is called.

    Attributes:
        level: of the module.
        attention: for rotary tables.
        given: role (input, mask, positions, start, cos, sin, pair, complex, targets, documents, cache) -> parameter.
        flat: the input as ``[T, D]``.
        rope: the shape of cosines and sines.
        positions: ``[B, S]`` or ``[S]``.
        causal_mask: the form handed over always, None for none.
        padding_mask: the form handed over where there is padding or there are documents, None where it takes none.
        targets: whether targets are given, for models that return all logits only then.
        remarks: what was found out by trying.
    """

    level: Level
    attention: AttentionFormula
    given: Mapping[str, str]
    flat: bool = False
    rope: str = "[B, S, P]"
    positions: str = "[B, S]"
    causal_mask: str | None = None
    padding_mask: str | None = None
    targets: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The call, for people."""
        forms = {"positions": self.positions, "cos": self.rope, "sin": self.rope, "pair": f"(cos, sin) {self.rope}",
                 "mask": self.causal_mask or self.padding_mask, "input": "[T, D]" if self.flat else None}  # fmt: skip
        used = {role: name for role, name in self.given.items() if role not in ("cache", "use_cache")}
        return ", ".join(f"{name}: {forms[role]}" if forms.get(role) else name for role, name in used.items())


def plan_of(module: nn.Module, level: Level, attention: AttentionFormula, *, strict: bool = True) -> Plan:
    """What the parameters' names say.

    Args:
        strict: whether what cannot be filled is an error; not where an adapter calls.

    Raises:
        CandidateError: a parameter without default whose name says nothing.
    """
    given: dict[str, str] = {}
    tables = (
        ("mask", _MASKS), ("positions", _POSITIONS), ("start", _STARTS), ("cos", _COS), ("sin", _SIN), ("pair", _PAIRS),
        ("complex", _COMPLEX), ("targets", _TARGETS), ("documents", _DOCUMENTS), ("cache", _CACHES),
        ("use_cache", {"use_cache"}),
    )  # fmt: skip
    parameters = parameters_of(module)
    for place, each in enumerate(parameters):
        role = next((role for role, names in tables if each.name.lower() in names), None)
        if role is None and "input" not in given and (each.name.lower() in _INPUTS or place == 0):
            role = "input"
        if role is not None and role not in given:
            given[role] = each.name
        elif each.default is inspect.Parameter.empty and strict:
            takes = ", ".join(each.name for each in parameters)
            raise CandidateError(
                f"forward({takes}): nothing is known to give for '{each.name}'",
                "Give it in an adapter's call(): `moectl compare-hf new-adapter` writes a template.",
            )
    if "input" not in given and strict:
        raise CandidateError(
            f"forward of {type(module).__name__} takes no input",
            "Its first parameter is the input: token ids or hidden.",
        )
    return Plan(level, attention, given)


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """Of ``forward``, without ``*args`` and ``**kwargs``."""
    skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in inspect.signature(module.forward).parameters.values() if each.kind not in skipped]


def required(module: nn.Module, name: str) -> bool:
    """Whether a parameter of ``forward`` has no default."""
    return any(each.name == name and each.default is inspect.Parameter.empty for each in parameters_of(module))


def arguments(plan: Plan, inputs: Inputs, dtype: torch.dtype, *, past: int = 0) -> dict[str, Any]:
    """The keyword arguments for ``inputs``.

    Raises:
        Unsupported: padding, documents or positions that this forward has no parameter for.
    """
    given, values = plan.given, dict[str, Any]()
    x = inputs.input_ids if plan.level == "model" else inputs.hidden
    assert x is not None, f"a {plan.level} takes {'input_ids' if plan.level == 'model' else 'hidden'}"
    values[given["input"]] = x.reshape(-1, x.shape[-1]) if plan.flat and plan.level != "model" else x
    if plan.level in ("moe", "router"):
        if "mask" in given and inputs.attention_mask is not None:
            values[given["mask"]] = inputs.attention_mask
        return values
    places = positions_of(inputs)
    if not given.keys() & {"positions", "cos", "pair", "complex"}:
        counted = torch.arange(past, past + places.shape[1], device=places.device)
        if not bool((places == counted).all()) and "start" not in given:
            raise Unsupported("its forward takes no positions, and these are not 0, 1, 2, …")
    if "positions" in given:
        values[given["positions"]] = places if plan.positions == "[B, S]" else _one_row(places)
    if "start" in given:
        values[given["start"]] = past
    _put_rope(plan, values, places, dtype)
    masked = _mask(plan, inputs, dtype)
    if masked is not None:
        values[given["mask"]] = masked
    if inputs.doc_ids is not None and "documents" in given:
        values[given["documents"]] = inputs.doc_ids
    if plan.targets and "targets" in given and inputs.input_ids is not None:
        values[given["targets"]] = inputs.input_ids.roll(-1, dims=1)
    return values


def _put_rope(plan: Plan, values: dict[str, Any], places_BS: Tensor, dtype: torch.dtype) -> None:
    given = plan.given
    if not given.keys() & {"cos", "sin", "pair", "complex"}:
        return
    head_dim = plan.attention.head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=places_BS.device) / head_dim
    angles_BSP = places_BS[..., None].to(torch.float32) * plan.attention.rope_theta**-exponents
    if "complex" in given:
        values[given["complex"]] = torch.polar(torch.ones_like(angles_BSP[0]), angles_BSP[0])
    angles_BSP = torch.cat([angles_BSP, angles_BSP], dim=-1)
    form = _ROPE[plan.rope]
    if "[S" in plan.rope or "complex" in given:
        _one_row(places_BS)
    cos, sin = form(angles_BSP.cos().to(dtype)), form(angles_BSP.sin().to(dtype))
    for role, value in (("cos", cos), ("sin", sin), ("pair", (cos, sin))):
        if role in given:
            values[given[role]] = value


def _one_row(places_BS: Tensor) -> Tensor:
    if not bool((places_BS == places_BS[:1]).all()):
        raise Unsupported("it takes one row of positions for the whole batch, and these differ from row to row")
    return places_BS[0]


def _mask(plan: Plan, inputs: Inputs, dtype: torch.dtype) -> Tensor | None:
    special = inputs.attention_mask is not None or inputs.doc_ids is not None
    form = plan.causal_mask
    if special and not (inputs.attention_mask is None and "documents" in plan.given):
        if form is None:
            form = plan.padding_mask
        elif "B" not in form:
            raise Unsupported(f"its mask is {form}: it has no room for padding or documents")
        if form is None or (inputs.doc_ids is not None and "S, S" not in form and "documents" not in plan.given):
            raise Unsupported(f"its forward takes no {'documents' if inputs.doc_ids is not None else 'padding mask'}")
    return None if form is None or "mask" not in plan.given else mask_in(form, inputs, dtype)


def mask_in(form: str, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The mask of ``inputs`` in one of :data:`CAUSAL_MASKS` or :data:`PADDING_MASKS`."""
    given = inputs.input_ids if inputs.input_ids is not None else inputs.hidden
    assert given is not None
    batch, length = given.shape[:2]
    real_BS = inputs.attention_mask
    real_BS = torch.ones(batch, length, dtype=torch.bool, device=given.device) if real_BS is None else real_BS.bool()
    if form.startswith("int"):
        return real_BS.long()
    if "[B, S]" in form:
        return real_BS if "real" in form else ~real_BS
    lowest = torch.finfo(dtype).min
    if "[B, 1, 1, S]" in form:
        return torch.zeros(batch, 1, 1, length, dtype=dtype, device=given.device).masked_fill(
            ~real_BS[:, None, None], lowest
        )
    seen_BSS = torch.ones(length, length, dtype=torch.bool, device=given.device).tril() & real_BS[:, None, :]
    if inputs.doc_ids is not None:
        seen_BSS = seen_BSS & (inputs.doc_ids[:, :, None] == inputs.doc_ids[:, None, :])
    seen_BSS = seen_BSS | torch.eye(length, dtype=torch.bool, device=given.device)  # padding sees itself: a finite row
    seen = seen_BSS[:, None] if "[B, 1" in form else seen_BSS[0]
    if form.startswith("additive"):
        return torch.zeros(seen.shape, dtype=dtype, device=given.device).masked_fill(~seen, lowest)
    return ~seen if "hidden" in form else seen


def variants(plan: Plan, module: nn.Module) -> list[Plan]:
    """Ways to call that the names leave open, the likeliest first."""
    plans = [plan]
    if plan.level in ("moe", "router"):
        shapes = (True, False) if plan.level == "router" else (False, True)
        return [replace(plan, flat=flat) for flat in shapes]
    if plan.given.keys() & {"cos", "sin", "pair"}:
        plans = [replace(each, rope=form) for form in _ROPE for each in plans]
    if "positions" in plan.given:
        plans = [replace(each, positions=form) for each in plans for form in ("[B, S]", "[S]")]
    if "mask" in plan.given and required(module, plan.given["mask"]):
        plans = [replace(each, causal_mask=form) for form in CAUSAL_MASKS for each in plans]
    return plans


def takes_input(name: str) -> bool:
    """Whether a parameter of that name is what goes in."""
    return name.lower() in _INPUTS

"""An optimizer's state as named tensors and JSON, keyed by parameter name, and back, exactly.

Torch's own ``state_dict`` numbers parameters by position, so a reordered model would silently get another
parameter's moments, and ``load_state_dict`` casts them to the parameter's dtype. Here names, shapes and
dtypes must agree, and every bit comes back. Works for every torch optimizer that keeps a flat dict of tensors
and numbers per parameter (AdamW, SGD, Muon, ...).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moectl.errors import CheckError

NamedParameters = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]

# Optimizers whose kernels read a parameter's tensors element by element and look at no shape: what these hold of a
# parameter, one set or the other, and what may be there besides.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_LAYOUTS: dict[str, list[set[str]]] = {"AdamW": [_ADAM], "MuonAdamW": [_ADAM, {"momentum"}]}
_EXTRA = {"max_exp_avg_sq", "master"}


def pack_optimizer(optimizer: Optimizer, named_params: NamedParameters) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors ``<parameter>/<key>`` and ``group.<i>/<option>``, and the JSON that holds all the rest.

    The tensors are the optimizer's own, not copies: write them before the next step.

    Raises:
        ValueError: the optimizer has a parameter without a name, or state that is no tensor or number.
    """
    names = _names(optimizer, named_params)
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    params: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        split = _split(f"group.{index}", options, tensors)
        groups.append({"params": [names[id(param)] for param in group["params"]], **split})
        for param in group["params"]:
            name = names[id(param)]
            kept = _split(name, optimizer.state[param], tensors) if param in optimizer.state else None
            params[name] = {"shape": list(param.shape), "dtype": str(param.dtype), "state": kept}
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "params": params}


def unpack_optimizer(
    optimizer: Optimizer,
    named_params: NamedParameters,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put a packed state into an optimizer built like the one packed; options (``lr``, ...) come back too.

    All of it or nothing: the optimizer is unchanged when this raises.

    Raises:
        CheckError: another optimizer or number of groups, or a list of every parameter, option or tensor that
            is missing, unexpected or of another shape or dtype.
    """
    names = _names(optimizer, named_params)
    own, saved = type(optimizer).__name__, state["optimizer"]
    if own != saved or len(optimizer.param_groups) != len(state["groups"]):
        raise CheckError(
            f"the checkpoint holds {saved} with {len(state['groups'])} parameter group(s), "
            f"this run uses {own} with {len(optimizer.param_groups)}"
        )
    if problems := _problems(optimizer, names, tensors, state):
        raise CheckError(
            f"the checkpoint does not fit the optimizer in {len(problems)} place(s):\n  " + "\n  ".join(problems),
            "Use the config that the checkpoint was trained with.",
        )
    optimizer.state.clear()
    for index, (group, packed) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        for key in packed["tensors"]:
            group[key] = _copy(tensors[f"group.{index}/{key}"], group[key])
        group.update(packed["values"])
        # Where torch keeps the step count: beside the parameter only for kernels that read it there.
        on_device = bool(group.get("capturable") or group.get("fused"))
        for param in group["params"]:
            name = names[id(param)]
            kept = state["params"][name]["state"]
            if kept is None:
                continue
            restored = dict(kept["values"])
            for key in kept["tensors"]:
                tensor = tensors[f"{name}/{key}"]
                host = key == "step" and not on_device
                restored[key] = tensor.to("cpu" if host else param.device, copy=True)
            optimizer.state[param] = restored


def _names(optimizer: Optimizer, named_params: NamedParameters) -> dict[int, str]:
    pairs = named_params.items() if isinstance(named_params, Mapping) else named_params
    names: dict[int, str] = {}
    for name, param in pairs:
        names.setdefault(id(param), name)  # tied parameters go by their first name
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if id(param) not in names:
                raise ValueError(f"parameter {position} of group {index} {list(param.shape)} has no name")
    return names


def _split(prefix: str, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move tensors into ``tensors`` under ``prefix/key``; what each is, by key, and the plain values are returned."""
    kinds, plain = {}, {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            kinds[key] = _kind(value)
            tensors[f"{prefix}/{key}"] = value.detach()
        elif _is_plain(value):
            plain[key] = value
        else:
            raise ValueError(f"optimizer state '{prefix}/{key}' is a {type(value).__name__}: cannot be saved")
    return {"tensors": kinds, "values": plain}


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _copy(tensor: Tensor, like: Any) -> Tensor:
    return tensor.to(like.device if isinstance(like, Tensor) else tensor.device, copy=True)


def _problems(
    optimizer: Optimizer, names: Mapping[int, str], tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> list[str]:
    """Everything that keeps ``state`` from fitting, one line each."""
    found: list[str] = []
    expected: dict[str, str] = {}
    for index, (group, packed) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        live = {names[id(param)]: param for param in group["params"]}
        found += _difference(f"parameter of group {index}", live.keys(), packed["params"])
        options = group.keys() - {"params", "param_names"}
        found += _difference(f"option of group {index}", options, (*packed["tensors"], *packed["values"]))
        expected |= {f"group.{index}/{key}": kind for key, kind in packed["tensors"].items()}
        for name in packed["params"]:
            entry = state["params"][name]
            param = live.get(name)
            have = f"{entry['shape']} {entry['dtype']}"
            if param is not None and have != (want := _kind(param)):
                found.append(f"differs: {name} is {have} in the checkpoint, {want} in the model")
            if entry["state"] is not None:
                kinds = entry["state"]["tensors"]
                expected |= {f"{name}/{key}": kind for key, kind in kinds.items()}
                if param is not None and type(optimizer).__name__ in _LAYOUTS:
                    found += _unfit(name, kinds, param, _LAYOUTS[type(optimizer).__name__])
    found += _difference("tensor", expected, tensors)
    return found + [
        f"differs: {name} is {_kind(tensors[name])}, not {kind} as it was saved"
        for name, kind in expected.items()
        if name in tensors and _kind(tensors[name]) != kind
    ]


def _unfit(name: str, kinds: Mapping[str, str], param: nn.Parameter, layouts: Collection[set[str]]) -> list[str]:
    """Why these are not the tensors that the optimizer keeps beside ``param``: its kernels take them as they are."""
    found = []
    if not any(kinds.keys() - _EXTRA == layout for layout in layouts):
        found.append(f"differs: {name} has the state {', '.join(sorted(kinds))}")
    shape = list(param.shape)
    moments = {f"{shape} {dtype}" for dtype in (param.dtype, torch.promote_types(param.dtype, torch.float32))}
    for key, kind in kinds.items():
        fitting = {"[] torch.float32"} if key == "step" else moments
        if kind not in fitting:
            found.append(f"differs: {name}/{key} is {kind} in the checkpoint, not {' or '.join(sorted(fitting))}")
    return found


def _difference(kind: str, wanted: Iterable[str], given: Iterable[str]) -> list[str]:
    wanted, given = set(wanted), set(given)
    missing = [f"missing {kind}: {name}" for name in sorted(wanted - given)]
    return missing + [f"unexpected {kind}: {name}" for name in sorted(given - wanted)]

"""Building somebody's class from a family's config: by a config object, or by named arguments.

Nothing is filled with a guess that the family's config does not answer: what is left over is listed.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from moectl.parity.candidate.settings import Settings, UnknownSetting, setting_of
from moectl.parity.candidate.user_code import CandidateError, Failure, attempt

_CONFIG_NAMES = {"config", "cfg", "args", "conf", "params", "model_args", "hparams", "settings", "c", "opt", "hp"}
_CONFIG_NAMES |= {"model_config", "moe_args", "model_cfg", "configuration", "moe_config", "moe_cfg", "opts"}
#: Beside one of these, ``hidden_dim`` or ``hidden`` is the experts' size; alone, it is the model's.
_HIDDEN = {"hidden_size", "dim", "d_model", "emb_dim", "embed_dim", "n_embd", "n_embed", "model_dim", "input_dim"}
_HIDDEN |= {"in_dim", "d_in", "in_features", "embedding_dim"}
ADAPTER_HINT = "An adapter's build() gives it: `moectl compare-hf new-adapter` writes a template."


class Construction(NamedTuple):
    """A built module, and how.

    Attributes:
        module: in eval mode, on the CPU.
        shown: the call as it was made, for people: ``MoE(dim=32, n_experts=8)``.
    """

    module: nn.Module
    shown: str


def construct(cls: Callable[..., Any], settings: Settings) -> Construction:
    """Build ``cls``.

    Raises:
        CandidateError: a parameter that cannot be filled; a setting that the config has not; the constructor raises;
            what it returns is no ``nn.Module``.
    """
    name = getattr(cls, "__name__", str(cls))
    positional, named, shown, unfilled = _arguments(cls, settings)
    if unfilled:
        takes = ", ".join(str(each) for each in _parameters(cls))
        raise CandidateError(
            f"cannot tell what to build {name} with: {', '.join(map(repr, unfilled))} of {name}({takes})",
            ADAPTER_HINT,
        )
    built = attempt(lambda: cls(*positional, **named))
    if isinstance(built, Failure):
        raise _explained(name, shown, built)
    if not isinstance(built, nn.Module):
        raise CandidateError(f"{name} builds a {type(built).__name__}, not an nn.Module", "Name a module's class.")
    return Construction(built, f"{name}({', '.join(shown)})")


def _explained(name: str, shown: list[str], failure: Failure) -> CandidateError:
    error = failure.error
    if isinstance(error, UnknownSetting):
        place = f" ({failure.place})" if failure.place else ""
        return CandidateError(
            f"{name} reads the setting '{error.name}'{place}, which the family's config has not",
            f"{ADAPTER_HINT} There: settings = self.settings(); settings['{error.name}'] = …; return cls(settings).",
        )
    if isinstance(error, RecursionError):
        return CandidateError(f"building {name} never ends: {failure}", "It calls itself: see that line.")
    return CandidateError(f"{name}({', '.join(shown)}) fails: {failure}", f"Mend it, or: {ADAPTER_HINT}")


def _parameters(cls: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return []
    skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in signature.parameters.values() if each.kind not in skipped]


def _arguments(cls: Callable[..., Any], settings: Settings) -> tuple[list[Any], dict[str, Any], list[str], list[str]]:
    """(positional, named, as shown, names that could not be filled)."""
    parameters = _parameters(cls)
    hints = _hints(cls)
    named: dict[str, Any] = {}
    shown: list[str] = []
    unfilled: list[str] = []
    positional: list[Any] = []
    others = {each.name.lower() for each in parameters}
    for each in parameters:
        required = each.default is inspect.Parameter.empty
        wants_config = each.name.lower() in _CONFIG_NAMES or dataclasses.is_dataclass(hints.get(each.name))
        if wants_config:
            value: Any = _config_for(hints.get(each.name), settings)
            text = each.name
        else:
            found = _value(each.name, others, settings)
            if found is None and not required:
                continue
            if found is None:
                unfilled.append(each.name)
                continue
            value = found[0]
            if each.name in ("dtype", "device", "max_batch_size", "pad_token_id", "initializer_range") and not required:
                continue
            text = f"{each.name}={value}"
        if each.kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[each.name] = value
        shown.append(text)
    return positional, named, shown, unfilled


def _value(name: str, others: set[str], settings: Settings) -> tuple[Any] | None:
    """The setting of that name, in a tuple; None where none is known."""
    lowered = name.lower()
    if lowered in ("hidden_dim", "hidden"):
        name = "moe_intermediate_size" if others & _HIDDEN else "hidden_size"
    if lowered == "intermediate_size" and "moe_intermediate_size" not in others:
        name = "moe_intermediate_size"
    if lowered in ("output_dim", "out_dim", "d_out", "out_features"):
        name = "hidden_size"
    if lowered in ("activation", "act", "act_fn"):  # a callable or a name: its default is as good
        return None
    try:
        return (settings.lookup(name),)
    except UnknownSetting:
        return None


def _config_for(hint: Any, settings: Settings) -> Any:
    """The settings as the annotated class where that can be filled, as an attribute-style object otherwise."""
    if hint is None or not isinstance(hint, type) or hint in (dict, object) or issubclass(hint, Mapping):
        return settings
    if dataclasses.is_dataclass(hint):
        values = {}
        for each in dataclasses.fields(hint):
            if not each.init:
                continue
            found = _value(each.name, {other.name.lower() for other in dataclasses.fields(hint)}, settings)
            if found is not None and setting_of(each.name) not in ("dtype", "device"):
                values[each.name] = found[0]
        made = attempt(lambda: hint(**values))
    else:
        plain = {key: value for key, value in settings.to_dict().items() if key not in ("dtype", "device", "layer_idx")}
        made = attempt(lambda: hint(**plain))
    return settings if isinstance(made, Failure) else made


def _hints(cls: Callable[..., Any]) -> dict[str, Any]:
    target: Any = vars(cls).get("__init__", cls) if isinstance(cls, type) else cls
    hints = attempt(lambda: typing.get_type_hints(target))
    return {} if isinstance(hints, Failure) else hints

"""The built-in routers, and the way to build any router by name.

Importing this package loads no torch; building a router does.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from moectl.errors import ConfigError, MoectlError

if TYPE_CHECKING:
    from moectl.config.schema import ExperimentConfig
    from moectl.moe.router import Router, RouterConfig

__all__ = [
    "RouterOptionError",
    "build_router",
    "describe_router",
    "resolve_router",
    "router_class",
]


class RouterOptionError(ConfigError, ValueError):
    """A router option that does not exist, has the wrong type, or does not fit the layer."""


def build_router(name: str, *, hidden_size: int, num_experts: int, top_k: int | None = None, **options: Any) -> Router:
    """A fresh router.

    Args:
        name: a router's name, or ``path.py:Class``.
        hidden_size: ``D``.
        num_experts: ``E``.
        top_k: experts per token, for routers that let it be chosen; None is the router's default.
        options: the router's own, checked by its ``Config``.

    Raises:
        ConfigError: no such router; RouterOptionError (also a ValueError) for its options; RouterError where
            its constructor fails.

    >>> build_router("topk", hidden_size=64, num_experts=8, top_k=2).weight.shape
    torch.Size([8, 64])
    """
    cls = router_class(name)
    config = _validate(cls, name, options, top_k)
    from moectl.moe.router import RouterError

    try:
        router = cls(config, hidden_size=hidden_size, num_experts=num_experts)
    except MoectlError:
        raise
    except (TypeError, ValueError) as error:
        raise RouterOptionError(f"router '{name}': {error}", f"See `moectl routers show {name}`.") from error
    except Exception as error:
        what = f"router '{name}' cannot be built: {type(error).__name__}: {error}"
        raise RouterError(what, f"`moectl routers check {name}` says more.") from error
    router.label = f"router '{name}'"
    return router


def router_class(name: str) -> type[Router]:
    """The class of a router; anything that is no :class:`moectl.moe.Router` with a ``Config`` is refused."""
    from moectl.plugins import load_router_class

    cls = load_router_class(name)  # before torch is loaded: a misspelt name is answered at once
    from moectl.moe.router import Router, RouterConfig

    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise ConfigError(
            f"the router '{name}' is {cls!r}, not a subclass of moectl.moe.Router",
            "Subclass moectl.moe.Router and implement route().",
        )
    if not (isinstance(cls.Config, type) and issubclass(cls.Config, RouterConfig)):
        raise ConfigError(
            f"the Config of the router '{name}' is {cls.Config!r}, not a subclass of moectl.moe.RouterConfig",
            "Declare its options so: class Config(RouterConfig): ...",
        )
    return cls


def resolve_router(config: ExperimentConfig) -> ExperimentConfig:
    """``config`` with its router's options checked and written out in full, and ``lb_coef`` a number.

    Two configs that mean the same router then have the same content hash, however they spelt it. Where experts are
    the parts of one MLP (``moe.init: split``), the noise is 0 unless ``noise_std`` says otherwise.
    """
    if config.moe is None:
        return config
    name = config.moe.router_name
    cls = router_class(name)
    given = config.moe.router_options
    if config.moe.init == "split" and "noise_std" in cls.Config.model_fields:
        given = {"noise_std": 0.0, **given}  # noise would mix the parts of one MLP with those of another
    checked = _validate(cls, name, given, None, prefix="moe.router.")
    options = checked.model_dump(mode="json")
    moe = config.moe.with_lb_coef(cls.default_lb_coef).model_copy(update={"router": {"name": name, **options}})
    return config.model_copy(update={"moe": moe})


def describe_router(name: str) -> dict[str, Any]:
    """A router's class, documentation, nature and options, with stable keys.

    ``causal`` is None where it depends on the options; an option without a default is ``required``.
    """
    cls = router_class(name)
    options = [
        {
            "name": key,
            "type": _type_name(field.annotation),
            "required": field.is_required(),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "description": field.description,
        }
        for key, field in cls.Config.model_fields.items()
    ]
    return {
        "name": name,
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "doc": inspect.cleandoc(cls.__doc__ or ""),
        "causal": cls.causal if isinstance(cls.causal, bool) else None,
        "token_choice": cls.token_choice if isinstance(cls.token_choice, bool) else None,
        "learns": cls.learns if isinstance(cls.learns, bool) else None,
        "options": options,
    }


def _type_name(annotation: Any) -> str:
    """A type as a reader writes it: ``float | None``, ``'a' | 'b'``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "None"
    if origin is Annotated:
        return _type_name(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    plain = isinstance(annotation, type) and origin is None
    return annotation.__name__ if plain else str(annotation).replace("typing.", "")


def _validate(
    cls: type[Router], name: str, options: dict[str, Any], top_k: int | None, prefix: str = ""
) -> RouterConfig:
    from pydantic import ValidationError

    from moectl.config.loading import explain_validation

    known = list(cls.Config.model_fields)
    if top_k is not None and "top_k" in known:
        options = {**options, "top_k": top_k}
    elif top_k not in (None, 1):
        raise RouterOptionError(
            f"router '{name}' does not let top_k be chosen, but top_k={top_k} was given",
            "Use the router 'topk', or leave top_k away.",
        )
    listing = f"Its options: {', '.join(known)}." if known else "It has no options."
    try:
        return cls.Config.model_validate(options)
    except ValidationError as error:
        explained = explain_validation(error, cls.Config, noun="option", prefix=prefix, fallback=listing)
        elsewhere = _options_of_others([key for key in options if key not in known])
        raise RouterOptionError(f"router '{name}': {explained.message}", elsewhere or explained.hint) from error
    except ValueError as error:  # raised by the Config's own code
        raise RouterOptionError(f"router '{name}': {error}", listing) from error


def _options_of_others(keys: list[str]) -> str:
    """``"'n_group' is an option of the router 'sigmoid'."`` for what other built-in routers know; else ""."""
    from moectl.plugins import BUILT_IN

    known = {}
    for name, target in BUILT_IN.items():  # not by name: a plug-in may lay claim to that
        module, _, attribute = target.partition(":")
        known[name] = getattr(import_module(module), attribute).Config.model_fields
    sentences = []
    for key in keys:
        owners = [f"'{name}'" for name, fields in known.items() if key in fields]
        if owners:
            sentences.append(f"'{key}' is an option of the router{'s' * (len(owners) > 1)} {', '.join(owners)}.")
    return " ".join(sentences)

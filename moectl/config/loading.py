"""From presets, YAML, flags and ``--set`` to one validated config, or to an error that says which key.

Precedence, lowest first: the schema's defaults, the preset, the file, flags, ``--set``. One exception:
a preset named on the command line stands above the file in the few keys that make it what it is, so
that ``--preset dense`` is dense and ``--preset no-lb`` has no balance loss, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moectl import paths
from moectl.config.keys import Origin, dotted, nearest_key, source_of
from moectl.config.presets import preset_values
from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.errors import ConfigError, MoectlError, NotFoundError, unknown

Values = dict[str, Any]


def load_config(
    path: Path | str | None,
    *,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> ExperimentConfig:
    """The config of one run.

    Args:
        path: a YAML file, the name of a shipped one (``moe``), or None for the defaults.
        sets: ``a.b=value`` assignments; the value is YAML (``null``, ``[1, 2]``, ``{name: top2}``).
        overrides: dotted key -> value, from flags. None means "flag not given" and is skipped.
        preset: dense, moe, no-lb or top2.

    Raises:
        NotFoundError: no such file.
        ConfigError: YAML that does not parse, an unknown key, a value of the wrong type.
    """
    file = None if path is None else find_config(path)
    in_file, lines = ({}, {}) if file is None else read_yaml(file)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    assigned = dict(parse_set(text) for text in sets)
    origin = Origin(file, lines, tuple(given), tuple(assigned))

    chosen = assigned.get("preset") or given.get("preset") or preset
    values: Values = {}
    if chosen is None and isinstance(in_file.get("preset"), str):
        values = _merge({}, preset_values(in_file["preset"]), "")
    values = _merge(values, in_file, "")
    if chosen is not None:
        values = _apply_preset(values, str(chosen))
    _replace_router(values, given.get("moe.router.name"))
    for key, value in (*given.items(), *assigned.items()):
        _assign(values, key, value)
    _refuse_contradiction(values)
    _complete_router(values)
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise explain_validation(error, ExperimentConfig, origin) from error


def find_config(path: Path | str) -> Path:
    """``path`` if it is a file; a bare name is looked up among the configs that ship."""
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise ConfigError(f"{file} is a folder", "Name a YAML file.")
    names = shipped_configs()
    if file.suffix in ("", ".yaml", ".yml") and file.parent == Path() and file.stem in names:
        return names[file.stem]
    if file.parent == Path() and not file.suffix:
        raise unknown("config", str(path), names, NotFoundError)
    raise NotFoundError(f"no config file {file}", f"Shipped ones: {', '.join(names)}.")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that ship with moectl."""
    return {file.stem: file for file in sorted(paths.shipped("configs").glob("*.yaml"))}


def read_yaml(file: Path) -> tuple[Values, dict[str, int]]:
    """A YAML file's mapping, and the line (from 1) of each of its dotted keys.

    An empty file is an empty mapping. A key given twice is an error: YAML would keep the last in silence.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text", "A config is a YAML text file.") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _yaml_error(file, error) from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{file} holds a {type(values).__name__}, not a mapping of sections",
            "Write sections such as 'train:' with indented keys; see `moectl config show --resolved`.",
        )
    lines: dict[str, int] = {}
    _collect_lines(file, node, "", lines)
    return values, lines


def parse_set(text: str) -> tuple[str, Any]:
    """``a.b=value`` as (key, value), the value read as YAML.

    >>> parse_set("train.steps=300")
    ('train.steps', 300)
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--set {text!r} is not of the form key=value", "Example: --set train.steps=300")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(
            f"--set {key}: cannot read {value!r} ({problem})", "Quote text that has special characters."
        ) from error


def resolved_yaml(config: BaseModel, *, only_set: bool = False) -> str:
    """The config as YAML that loads back to an equal one.

    Args:
        only_set: leave out what equals the schema's default.
    """
    values = config.model_dump(mode="json", exclude_defaults=only_set)
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))


def explain_validation(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    origin: Origin | None = None,
    *,
    noun: str = "config key",
    prefix: str = "",
    fallback: str = "`moectl config show --resolved` shows every key and its value.",
) -> ConfigError:
    """One ConfigError for all that pydantic found: full dotted key, what was given, what is allowed.

    Args:
        model: where to look for the nearest key.
        origin: where values came from, so that the message can say it.
        noun: what a key is called here.
        prefix: put before every key, for a section that is validated on its own.
        fallback: the hint when no key is near.
    """
    model = model or (ExperimentConfig if error.title == ExperimentConfig.__name__ else None)
    messages: list[str] = []
    hints: list[str] = []
    for item in error.errors(include_url=False):
        key = dotted(item["loc"], item["input"] if item["type"] == "extra_forbidden" else None)
        where = source_of(key, origin)
        if item["type"] == "extra_forbidden":
            messages.append(f"unknown {noun} '{prefix}{key}'{where}")
            suggestion = nearest_key(key, model, prefix)
            hints += [suggestion] if suggestion else []
            continue
        reason = _reason(item["type"], item["msg"], key)
        if item["type"] == "value_error" and f"{key}." in reason:  # a section's own check, which names the key
            messages.append(reason)
        elif not key or item["type"] == "missing":
            messages.append(f"{prefix}{key}: {reason}" if key else reason)
        else:
            messages.append(f"{prefix}{key} = {_short(item['input'])}{where}: {reason}")
    return ConfigError("; ".join(messages), " ".join(dict.fromkeys(hints)) or fallback)


def _reason(kind: str, message: str, key: str) -> str:
    """pydantic's words, in ours where they speak of Python classes."""
    if kind == "model_type":
        return f"this is a section: give its keys, for example {key}.… = …"
    reason = message.removeprefix("Value error, ").removeprefix("Input ")
    return reason[:1].lower() + reason[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _merge(base: Values, over: Mapping[str, Any], prefix: str) -> Values:
    """Deep merge; a scalar or null replaces a section, a section replaces a scalar or null."""
    merged = dict(base)
    for key, value in over.items():
        name = f"{prefix}{key}"
        value = _section(name, value)
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge(dict(below), value, f"{name}.")
        else:
            merged[key] = _merge({}, value, f"{name}.") if isinstance(value, Mapping) else deepcopy(value)
    return merged


def _section(name: str, value: Any) -> Any:
    """``router: top2`` is short for ``router: {name: top2}``, ``capacity: 1.25`` for ``capacity: {factor: 1.25}``,
    ``lora: 8`` for ``lora: {rank: 8}``."""
    if name == "moe.router" and isinstance(value, str):
        return {"name": value}
    if name == "moe.capacity" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"factor": value}
    if name == "finetune.lora" and isinstance(value, (int, str)) and not isinstance(value, bool):
        return {"rank": value}
    return value


def _apply_preset(values: Values, name: str) -> Values:
    """A preset from the command line: above the file in what makes it what it is."""
    settings = preset_values(name)
    _replace_router(values, ((settings.get("moe") or {}).get("router") or {}).get("name") if name != "moe" else None)
    if name == "moe":  # its numbers are only defaults; that there are experts at all is its essence
        values = _merge(settings, {key: v for key, v in values.items() if key != "moe" or v is not None}, "")
    else:
        values = _merge(values, settings, "")
    values["preset"] = name
    return values


def _refuse_contradiction(values: Values) -> None:
    """A run called dense is dense."""
    if values.get("preset") == "dense" and values.get("moe") is not None:
        raise ConfigError("the preset is dense, but moe is set", "Drop one of the two, or choose --preset moe.")


def _assign(values: Values, key: str, value: Any) -> None:
    """Put ``value`` at a dotted key, making sections on the way."""
    *sections, leaf = key.split(".")
    place = values
    for depth, name in enumerate(sections, start=1):
        path = ".".join(sections[:depth])
        if path == "moe" and "moe" in place and place["moe"] is None:
            raise ConfigError(
                f"{key} is set, but the model is dense (moe: null)",
                "Choose --preset moe, or drop what made it dense.",
            )
        below = _section(path, place.get(name))
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{key} cannot be set: {path} is {below!r}, not a section", "Check the key.")
        place[name] = place = dict(below or {})
    place[leaf] = _section(key, deepcopy(value))


def _replace_router(values: Values, name: Any) -> None:
    """``--router`` with another router than the file names: the file's options were that router's, and go with it."""
    moe = values.get("moe")
    router = moe.get("router") if isinstance(moe, dict) else None
    if name is not None and isinstance(moe, dict) and isinstance(router, dict) and router.get("name", name) != name:
        values["moe"] = {**moe, "router": {"name": name}}


def _complete_router(values: Values) -> None:
    """Router options without a name are those of the default router."""
    moe = values.get("moe")
    if isinstance(moe, dict) and isinstance(moe.get("router"), dict) and "name" not in moe["router"]:
        moe["router"] = {**MoEConfig().router, **moe["router"]}


def _collect_lines(file: Path, node: Any, prefix: str, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(
                f"{file}, line {line}: '{key}' is given twice (first in line {lines[key]})", "Remove one of them."
            )
        lines[key] = line
        _collect_lines(file, value_node, f"{key}.", lines)


def _yaml_error(file: Path, error: yaml.YAMLError) -> MoectlError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else str(file)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return ConfigError(f"{where}: not valid YAML: {problem}", "Indent with spaces, and put a space after each colon.")

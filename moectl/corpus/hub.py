"""Texts from Hugging Face datasets, streamed: three presets, or any dataset by its id.

``hub`` takes the preset of the domain's name. ``hub:OWNER/NAME`` takes any dataset, with options
after a question mark: ``hub:OWNER/NAME?config=en&split=train&text=content&group=repo_name``.
A local folder in the hub's layout may stand in for ``OWNER/NAME``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from moectl import paths
from moectl.corpus.texts import DomainTexts, Text, checked_group, checked_text, texts_hash
from moectl.errors import ConfigError, MissingDependencyError, MoectlError, unknown

PREFIX = "hub:"
DEFAULT_LIMIT = 20_000
MAX_BYTES = 64 * 2**20
_TIMEOUT_S = 20
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class HubSource:
    """Where texts lie on the hub. ``text`` is a column or a template such as ``{Problem}\\n\\n{Rationale}``;
    ``group`` a column (a URL counts by its host), None for each text by itself; the first ``limit``
    texts are taken, or 64 MiB if that comes first."""

    repo: str
    config: str | None = None
    split: str = "train"
    text: str = "text"
    group: str | None = None
    revision: str | None = None
    limit: int = DEFAULT_LIMIT
    licence: str = "see the dataset's page"


PRESETS: dict[str, HubSource] = {
    "code": HubSource(
        "codeparrot/codeparrot-clean",
        text="content",
        group="repo_name",
        licence="each file's own, named in the dataset's 'license' column",
    ),
    # The dataset itself is a loading script, which `datasets` no longer runs; this branch is the
    # hub's own conversion of it.
    "math": HubSource(
        "allenai/math_qa",
        text="{Problem}\n\n{Rationale}",
        revision="refs/convert/parquet",
        licence="Apache-2.0",
    ),
    "prose": HubSource("allenai/c4", config="en", group="url", licence="ODC-BY"),
}


def parse(spec: str, domain: str) -> HubSource:
    """The source that ``hub`` or ``hub:OWNER/NAME?...`` names; options of a preset's own dataset are kept.

    Raises:
        ConfigError: no preset for this domain, an unknown option or a bad value (exit 2).
    """
    if spec == "hub":
        if domain not in PRESETS:
            error = unknown("domain", domain, PRESETS)
            raise ConfigError(
                f"{error.message} for source 'hub'", f"{error.hint} Or name a dataset: hub:OWNER/NAME?text=COLUMN"
            )
        return PRESETS[domain]
    repo, _, query = spec.removeprefix(PREFIX).partition("?")
    if not repo:
        raise ConfigError(f"source '{spec}' names no dataset", "Write hub:OWNER/NAME, or hub for the presets.")
    source = next((preset for preset in PRESETS.values() if preset.repo == repo), HubSource(repo))
    options = dict(parse_qsl(query, keep_blank_values=True))
    allowed = ("config", "split", "text", "group", "revision", "limit")
    for key, value in options.items():
        if key not in allowed:
            raise unknown("option of a hub source", key, allowed)
        if key == "limit" and not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ConfigError(f"source '{spec}': limit is '{value}'", "Give a positive whole number.")
    changes: dict[str, Any] = {key: int(value) if key == "limit" else value for key, value in options.items()}
    return replace(source, **changes)


def read(source: HubSource, domain: str, spec: str) -> DomainTexts:
    """Stream the texts of ``source``.

    Raises:
        MoectlError: no network, no such dataset, a column missing or not text (exit 1).
    """
    paths.use_project_cache()
    revision = _revision(source)
    texts: list[Text] = []
    empty = size = 0
    for number, record in enumerate(_records(source, revision)):
        where = f"{source.repo}, record {number + 1}"
        text = _text(source, record, where)
        if not text.strip():
            empty += 1
            continue
        texts.append(Text(text, checked_group(_group(source, record, where), text, where), source.repo))
        size += len(text.encode())
        if len(texts) >= source.limit or size >= MAX_BYTES:
            break
    return DomainTexts(domain, texts, spec, revision or texts_hash(texts)[:12], source.licence, empty)


def _records(source: HubSource, revision: str | None) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("source 'hub' needs the package 'datasets'", "pip install datasets") from error
    try:
        yield from datasets.load_dataset(
            source.repo, source.config, split=source.split, revision=revision, streaming=True
        )
    except (*_hub_errors(), ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _failed(source, error) from error


def _revision(source: HubSource) -> str | None:
    """The commit to pin, asked of the hub before anything is streamed; None for a local folder."""
    if Path(source.repo).is_dir():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.repo, revision=source.revision, timeout=_TIMEOUT_S).sha
    except _hub_errors() as error:
        raise _failed(source, error) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a hub call may raise: its own errors, and those of its HTTP client (which one depends on
    the version; the base class of the hub's HTTP error is the client's)."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)


def _failed(source: HubSource, error: Exception) -> MoectlError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return MoectlError(
        f"cannot read the Hugging Face dataset '{source.repo}': {reason}",
        "Check the network, HF_HUB_OFFLINE and the dataset's name; without a network use --source sample "
        "or a local file or folder.",
    )


def _text(source: HubSource, record: Mapping[str, Any], where: str) -> str:
    columns = _PLACEHOLDER.findall(source.text)
    if not columns:
        return checked_text(_column(record, source.text, where), where, field=source.text)
    values = {name: checked_text(_column(record, name, where), where, field=name) for name in columns}
    return checked_text(_PLACEHOLDER.sub(lambda match: values[match[1]], source.text), where)


def _group(source: HubSource, record: Mapping[str, Any], where: str) -> Any:
    if source.group is None:
        return None
    value = _column(record, source.group, where)
    return urlsplit(value).hostname or value if isinstance(value, str) and "://" in value else value


def _column(record: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise MoectlError(
            f"{where}: there is no column '{name}'",
            f"Name the column, for example hub:OWNER/NAME?text=COLUMN. Columns: {', '.join(map(str, record))}.",
        )
    return record[name]

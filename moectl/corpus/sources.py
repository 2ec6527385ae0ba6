"""Where a domain's texts come from: the shipped sample, the hub, or the user's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from moectl import paths
from moectl.config.schema import DataConfig
from moectl.corpus import hub
from moectl.corpus.files import Row, read_records, read_text_files, text_files
from moectl.corpus.texts import DomainTexts, Text, texts_hash
from moectl.errors import ConfigError, MoectlError, NotFoundError, did_you_mean, unknown

RECORD_SUFFIXES = (".jsonl", ".parquet")
SAMPLE_LICENCES: Mapping[str, str] = {
    "code": "PSF-2.0",
    "math": "CC0-1.0 (set.mm); Apache-2.0 (generated problems)",
    "prose": "public domain",
}
_LOCAL_LICENCE = "not recorded"


def read_domain(config: DataConfig, domain: str) -> DomainTexts:
    """All texts of one domain from its source, checked, empty ones left out and counted.

    Raises:
        ConfigError: the source has no such domain (the nearest is named; exit 2).
        NotFoundError: the source does not exist (exit 4).
        MoectlError: the source cannot be read as text, or has none (exit 1).
    """
    spec = config.sources.get(domain, config.source)
    if spec == "hub" or spec.startswith(hub.PREFIX):
        found = hub.read(hub.parse(spec, domain), domain, spec)
    elif spec == "sample":
        found = _sample(domain)
    else:
        found = _local(spec, domain, alone=domain in config.sources or len(config.domains) == 1)
    if not found.texts:
        raise MoectlError(
            f"domain '{domain}' has no text in {spec} ({found.empty} empty)", "Give a source with at least ten texts."
        )
    return found


def check_sources(config: DataConfig) -> None:
    """Refuse a key of ``sources`` that names no domain (exit 2)."""
    for domain in config.sources:
        if domain not in config.domains:
            raise unknown("domain in data.sources", domain, config.domains)


def _sample(domain: str) -> DomainTexts:
    folder = paths.shipped("corpora")
    path = folder / f"{domain}.jsonl"
    known = [file.stem for file in folder.glob("*.jsonl")]
    if domain not in known:
        error = unknown("domain", domain, known)
        raise ConfigError(error.message, f"{error.hint} A domain of your own needs --source or data.sources.")
    licence = SAMPLE_LICENCES.get(domain, "see LICENCES/ beside the sample")
    return _collect((row.text for row in read_records(path)), domain, "sample", licence)


def _local(spec: str, domain: str, *, alone: bool) -> DomainTexts:
    path = Path(spec).expanduser()
    if path.is_dir():
        return _folder(path, spec, domain, alone=alone)
    if not path.exists():
        nearest = did_you_mean(spec, ("sample", "hub"))
        hint = "A source is sample, hub, hub:OWNER/NAME, a folder, or a .jsonl or .parquet file."
        raise NotFoundError(f"there is no source '{spec}'", f"{nearest} {hint}" if nearest else hint)
    if path.suffix not in RECORD_SUFFIXES:
        raise ConfigError(
            f"source {path} is neither .jsonl nor .parquet",
            "Write one JSON object a line with a field 'text', or give a folder of text files.",
        )
    return _file(path, spec, domain, alone=alone)


def _file(path: Path, spec: str, domain: str, *, alone: bool) -> DomainTexts:
    """One file for all domains: its records name their domain, unless only one is wanted."""
    seen: set[str] = set()

    def wanted(rows: Iterable[Row]) -> Iterable[Text]:
        for row in rows:
            if row.domain is None and not alone:
                raise MoectlError(
                    f"{row.where}: there is no field 'domain', and several domains are to be prepared",
                    "Give every record a 'domain', or a source per domain (data.sources.NAME=FILE).",
                )
            seen.add(row.domain or domain)
            if row.domain in (None, domain):
                yield row.text

    found = _collect(wanted(read_records(path)), domain, spec, _LOCAL_LICENCE)
    if domain not in seen:
        raise unknown(f"domain in {path.name}", domain, seen)
    return found


def _folder(folder: Path, spec: str, domain: str, *, alone: bool) -> DomainTexts:
    """``DOMAIN.jsonl``, ``DOMAIN.parquet`` or ``DOMAIN/`` with text files; for one domain any text files."""
    for suffix in RECORD_SUFFIXES:
        path = folder / f"{domain}{suffix}"
        if path.exists():
            return _collect((row.text for row in read_records(path)), domain, spec, _LOCAL_LICENCE)
    below = folder / domain
    if below.is_dir():
        return _collect(read_text_files(below), domain, spec, _LOCAL_LICENCE)
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    records = [entry.stem for entry in entries if entry.suffix in RECORD_SUFFIXES]
    folders = [entry.name for entry in entries if entry.is_dir()]
    # A misspelt domain must not be read as "all the text below here".
    misspelt = len(folders) == len(entries) and did_you_mean(domain, folders) is not None
    if not alone or records or misspelt:
        error = unknown(f"domain in {folder}", domain, records + folders)
        raise ConfigError(error.message, f"{error.hint} A domain is NAME.jsonl, NAME.parquet or a folder NAME.")
    if not text_files(folder):
        raise MoectlError(f"folder {folder} is empty", "Put text files into it, or NAME.jsonl for each domain.")
    return _collect(read_text_files(folder), domain, spec, _LOCAL_LICENCE)


def _collect(texts: Iterable[Text], domain: str, spec: str, licence: str) -> DomainTexts:
    kept: list[Text] = []
    empty = 0
    for text in texts:
        if text.text.strip():
            kept.append(text)
        else:
            empty += 1
    return DomainTexts(domain, kept, spec, texts_hash(kept)[:12], licence, empty)

"""The manifest of a prepared dataset: what is in the folder, and how to tell that it still is.

A dataset folder is immutable. Its manifest lists every other file with size and SHA-256, and
carries a hash of itself, so that any later edit is found and the file named.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moectl.disk import hash_file
from moectl.errors import CheckError, MoectlError, NotFoundError

FORMAT = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
DOCUMENTS_FILE = "documents.jsonl"
SPLITS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
ARRAYS = ("tokens", "doc_ids", "byte_counts", "domains")
_CHUNK_BYTES = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


class TokenizerEntry(_Record):
    """What was asked for (``bpe:8192`` or a path) and the SHA-256 of ``tokenizer.json``."""

    spec: str
    sha256: str


class SplitEntry(_Record):
    """One domain in one split. Texts and groups count what was packed; tokens (end-of-text
    tokens included) and UTF-8 bytes count what is in the blocks that were kept."""

    texts: int
    groups: int
    tokens: int
    blocks: int
    bytes: int


class DomainEntry(_Record):
    """One domain: where it came from and what it became.

    ``truncated_tokens`` are training tokens given up to balance the domains;
    ``duplicates_moved`` are held-out texts that also stood in training text, and moved there.
    """

    name: str
    source: str
    revision: str
    licence: str
    train: SplitEntry
    eval: SplitEntry
    duplicates_moved: int = 0
    truncated_tokens: int = 0


class Manifest(_Record):
    """The whole manifest; see the fields' names. ``files`` maps a relative path to its entry."""

    format: int = FORMAT
    id: str
    created: str
    moectl_version: str
    config: dict[str, Any]
    vocab_size: int
    eos_id: int
    block_size: int
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    domains: tuple[DomainEntry, ...]
    files: dict[str, FileEntry]
    warnings: tuple[str, ...] = Field(default=())

    @property
    def content_sha256(self) -> str:
        """SHA-256 (hex) over the id and all file hashes: equal exactly when the data are.

        Independent of when and where the set was prepared.
        """
        lines = [self.id, *(f"{path} {entry.sha256}" for path, entry in sorted(self.files.items()))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names in the order of the ids in ``domains.npy``."""
        return tuple(domain.name for domain in self.domains)

    def check_tokenizer(self, sha256: str, what: str, hint: str) -> None:
        """Raise CheckError unless ``sha256`` is the dataset's tokenizer; ``what`` names whose the other is."""
        if sha256 != self.tokenizer.sha256:
            raise CheckError(
                f"the tokenizer of {what} is not the one that dataset {self.id} was prepared with "
                f"({sha256[:12]} against {self.tokenizer.sha256[:12]})",
                hint,
            )

    def save(self, folder: Path) -> None:
        """Write ``manifest.json``, with the hash of the rest in ``sha256``."""
        payload = self.model_dump(mode="json")
        payload["sha256"] = _self_hash(payload)
        text = json.dumps(payload, indent=1, ensure_ascii=False) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check ``folder/manifest.json``.

        Raises:
            NotFoundError: there is none.
            CheckError: it was edited, cut, or has another format.
        """
        path = folder / MANIFEST_FILE
        try:
            payload = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            if (folder / DOCUMENTS_FILE).is_file():
                raise _edited(folder, MANIFEST_FILE, "the file is missing") from error
            raise NotFoundError(
                f"{folder} is not a prepared dataset: it has no {MANIFEST_FILE}",
                "Make one with 'moectl prepare'.",
            ) from error
        except OSError as error:
            raise MoectlError(f"cannot read {path}: {error.strerror or error}", "Check its permissions.") from error
        except ValueError as error:
            raise _edited(folder, MANIFEST_FILE, "it is not valid JSON") from error
        if not isinstance(payload, dict) or payload.pop("sha256", None) != _self_hash(payload):
            raise _edited(folder, MANIFEST_FILE, "its own hash does not match")
        if payload.get("format") != FORMAT:
            raise CheckError(
                f"dataset {folder} has format {payload.get('format')}, this moectl reads format {FORMAT}",
                "Prepare it again with 'moectl prepare'.",
            )
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            raise _edited(folder, MANIFEST_FILE, str(error).splitlines()[0]) from error


def verify(folder: Path) -> None:
    """Hash every file of a dataset folder against its manifest.

    Raises:
        NotFoundError: no dataset there.
        CheckError: a file is missing, cut or edited (named).
    """
    manifest = Manifest.load(folder)
    expected = {TOKENIZER_FILE, DOCUMENTS_FILE} | {f"{split}/{name}.npy" for split in SPLITS for name in ARRAYS}
    if set(manifest.files) != expected:
        raise _edited(folder, MANIFEST_FILE, "it does not list the files of a dataset")
    for relative, entry in manifest.files.items():
        try:
            size = (folder / relative).stat().st_size
            if size != entry.size:
                raise _edited(folder, relative, f"{size} bytes, {entry.size} recorded")
            if hash_file(folder / relative) != entry.sha256:
                raise _edited(folder, relative, "its SHA-256 differs from the recorded one")
        except FileNotFoundError as error:
            raise _edited(folder, relative, "the file is missing") from error
        except OSError as error:
            raise MoectlError(
                f"cannot read {folder / relative}: {error.strerror or error}", "Check its permissions."
            ) from error


def file_entry(path: Path) -> FileEntry:
    return FileEntry(size=path.stat().st_size, sha256=hash_file(path))


def _self_hash(payload: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _edited(folder: Path, relative: str, why: str) -> CheckError:
    return CheckError(
        f"dataset {folder.name} was changed after it was prepared: {relative} ({why})",
        f"Restore the file, or remove {folder} and run 'moectl prepare' again.",
    )

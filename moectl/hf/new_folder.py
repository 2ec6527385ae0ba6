"""A folder that is written whole or not at all, and never over another."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from moectl.disk import fsync
from moectl.errors import ConfigError, MoectlError


def refuse_existing(folder: Path) -> None:
    """Raises ConfigError unless nothing is there yet: nothing is ever overwritten."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already", "Nothing is overwritten: name another folder (--out).")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well, and is gone otherwise.

    Raises:
        ConfigError: ``folder`` exists, before or after.
        MoectlError: it cannot be written.
    """
    refuse_existing(folder)
    temporary = folder.with_name(f".tmp-{folder.name}-{secrets.token_hex(4)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        refuse_existing(folder)
        temporary.rename(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise MoectlError(f"cannot write {folder}: {error}", "Check the disk, or name another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

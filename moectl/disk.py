"""Files as the disk has them: flushed, and known by their hash."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk; a file system that cannot flush folders is left alone."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": hash_file(path)}

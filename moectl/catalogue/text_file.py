"""A text file that several may add to: locked, and replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from moectl.errors import ConfigError, MoectlError

MAX_BYTES = 64 * 2**20
_PATIENCE_S = 20.0


class Draft:
    """What the file holds, and what is to come after it."""

    def __init__(self, data: bytes, file: Path) -> None:
        self.data = data
        self.text = _decoded(data, file)
        self.added = ""

    def append(self, text: str) -> None:
        """Add ``text``, in the file's own kind of line ends."""
        first = self.text.find("\n")
        crlf = first > 0 and self.text[first - 1] == "\r"
        self.added += text.replace("\n", "\r\n") if crlf else text

    def encoded(self) -> bytes:
        return self.data + self.added.encode("utf-8")


def text_of(file: Path) -> str:
    """The whole text of a file.

    Raises:
        MoectlError: it is a folder, too large, unreadable or not UTF-8.
    """
    with _explained(file, "read"):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not keep us waiting
        try:
            return _decoded(_read(descriptor, file), file)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Draft]:
    """Hand out what ``file`` holds (nothing, where there is none), then put the draft in its place.

    The lock is on the file itself, so that none is left lying about. Whoever waited for it may hold one
    that has been replaced in the meantime, and then takes the new one. A link keeps pointing where it did,
    permissions stay; an exception leaves the file as it was.

    Raises:
        MoectlError: no permission, a folder, no such folder, too large, not UTF-8, or locked for long.
    """
    with _explained(file, "write"):
        target = Path(os.path.realpath(file))
        existed = target.exists()
        descriptor = _locked(target)
    try:
        with _explained(file, "read"):
            draft = Draft(_read(descriptor, file), file)
        yield draft
        with _explained(file, "write"):
            _put(target, draft.encoded(), os.fstat(descriptor))
    except BaseException:
        if not existed and os.fstat(descriptor).st_size == 0:
            target.unlink(missing_ok=True)  # the empty file that was made to be locked
        raise
    finally:
        os.close(descriptor)


def _locked(target: Path) -> int:
    """A descriptor of the file that is at ``target`` now, with its lock held."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if target.exists() and os.path.samestat(os.stat(target), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                hint = "Wait until it has ended, and run again."
                raise MoectlError(f"{target} is being written by another process", hint) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.01)


def _put(target: Path, data: bytes, like: os.stat_result) -> None:
    """Replace ``target`` by ``data``: whole, on the disk, with the old one's permissions."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(descriptor, like.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, like.st_uid, like.st_gid)
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(descriptor: int, file: Path) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise ConfigError(f"{file} is {what}", "Name a file: --file OUR_GOTCHAS.md")
    size = status.st_size
    if size > MAX_BYTES:
        raise MoectlError(
            f"{file} is {size / 2**20:,.0f} MiB: too large for a file of notes",
            "Give another file: --file OUR_GOTCHAS.md",
        )
    return os.pread(descriptor, size, 0)


def _decoded(data: bytes, file: Path) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MoectlError(
            f"{file} is not UTF-8 text (byte {error.start:,})",
            "Convert it (iconv -f LATIN1 -t UTF-8), or give another file: --file OUR_GOTCHAS.md",
        ) from error
    if "\0" in text:
        raise MoectlError(f"{file} is not a text file", "Give another file: --file OUR_GOTCHAS.md")
    return text


@contextlib.contextmanager
def _explained(file: Path, verb: str) -> Iterator[None]:
    """Errors of the file system as sentences."""
    try:
        yield
    except IsADirectoryError as error:
        raise ConfigError(f"{file} is a folder", "Name a file: --file OUR_GOTCHAS.md") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"there is no folder {file.parent}", "Make it first, or name another --file.") from error
    except PermissionError as error:
        raise MoectlError(
            f"no permission to {verb} {file}", "Mend the permissions of it or of its folder, or give another --file."
        ) from error
    except OSError as error:
        raise MoectlError(f"cannot {verb} {file}: {error.strerror or error}", "Check the path and the disk.") from error

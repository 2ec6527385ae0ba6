"""The shelf of prepared datasets under the home folder: finding one, and putting one there whole."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moectl import paths
from moectl.corpus.manifest import MANIFEST_FILE, verify
from moectl.disk import fsync
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError, unknown


def find_dataset(name_or_path: str | Path | None = None) -> Path:
    """The folder of a dataset: by id, unique prefix of an id, or path.

    None is the one that was prepared last, be it that ``prepare`` made it or found it; damaged ones
    are passed over.

    Raises:
        NotFoundError: there is none (exit 4).
        ConfigError: the prefix fits several (exit 2).
        CheckError: None was asked for, and every dataset is damaged (exit 3).
    """
    if name_or_path is None:
        return _newest()
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        return folder.resolve()
    if folder.name == MANIFEST_FILE and folder.is_file():
        return folder.parent.resolve()
    if folder.is_dir():
        raise NotFoundError(f"{folder} is not a prepared dataset", "Make one with 'moectl prepare'.")
    known = dataset_ids()
    matches = [name] if name in known else [dataset for dataset in known if name and dataset.startswith(name)]
    if len(matches) > 1:
        raise ConfigError(f"'{name}' fits several datasets", f"Give more characters of one of: {', '.join(matches)}.")
    if not matches:
        error = unknown("dataset", name, known, NotFoundError)
        raise error if known else NotFoundError(error.message, "There is none yet: run 'moectl prepare'.")
    return paths.data_dir() / matches[0]


def dataset_ids() -> list[str]:
    """Ids of all datasets under the home folder, sorted."""
    shelf = paths.data_dir()
    try:
        return sorted(entry.name for entry in shelf.iterdir() if (entry / MANIFEST_FILE).is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MoectlError(
            f"cannot read {shelf}: {error.strerror or error}", "Set MOECTL_HOME to a folder that you can read."
        ) from error


def touch(folder: Path) -> None:
    """Mark a dataset as the one prepared last: the time of its folder, which no hash covers."""
    now = time.time_ns()
    with suppress(OSError):  # a shelf that can only be read keeps its order
        os.utime(folder, ns=(now, now))


def datasets_by_age() -> list[Path]:
    """The folders of all datasets under the home folder, the one that was prepared last first."""
    folders = [paths.data_dir() / dataset for dataset in dataset_ids()]
    return sorted(folders, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), reverse=True)


def _newest() -> Path:
    folders = datasets_by_age()
    if not folders:
        raise NotFoundError(f"there is no prepared dataset in {paths.data_dir()}", "Make one with 'moectl prepare'.")
    damaged: list[MoectlError] = []
    for folder in folders:
        try:
            verify(folder)
        except MoectlError as error:
            damaged.append(error)
        else:
            return folder
    raise CheckError(damaged[0].message, damaged[0].hint)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``; on success it becomes ``folder``, whole or not at all.

    Every file is fsynced before the rename and the parent after it. If another process made
    ``folder`` meanwhile, that one stays: content-addressed folders of one name hold the same.
    On failure the temporary folder is removed and ``folder`` does not appear.

    Raises:
        MoectlError: the place cannot be written to, or the disk is full (exit 1).
    """
    shelf = paths.ensure(folder.parent)
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{folder.name}-", dir=shelf))
        temporary.chmod(0o755)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / MANIFEST_FILE).is_file():
                raise
        fsync(shelf)
    except OSError as error:
        raise MoectlError(
            f"cannot write the dataset under {shelf}: {error.strerror or error}",
            "Free some space, or set MOECTL_HOME to a folder that you can write to.",
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)

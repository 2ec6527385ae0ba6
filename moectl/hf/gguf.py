"""A GGUF file into a folder that transformers loads: dequantised once, written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moectl import paths
from moectl.disk import fsync, hash_file
from moectl.errors import CheckError, ConfigError, MissingDependencyError, MoectlError, NotFoundError
from moectl.hf.dense import MODEL_TYPES
from moectl.hf.refusals import quiet_transformers, unreadable

SUFFIX, SOURCE = ".gguf", "source.json"
_MAGIC = b"GGUF"
_NEEDS = ("gguf", "accelerate")
Say = Callable[[str], None]

#: How a byte-level vocabulary was cut before its merges were learned, by ``tokenizer.ggml.pre``: the rule that
#: llama.cpp has under that name, which transformers leaves out.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CUTS: Mapping[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}


def is_gguf(file: Path) -> bool:
    """Whether ``file`` begins as a GGUF file does, or is named like one."""
    if file.suffix == SUFFIX:
        return True
    try:
        with file.open("rb") as opened:
            return opened.read(4) == _MAGIC
    except OSError:
        return False


def converted(file: Path, say: Say = lambda text: None) -> Path:
    """The folder in moectl's cache that holds ``file`` as safetensors; made now where it is not there.

    Raises:
        NotFoundError: there is no such file.
        MissingDependencyError: the extra ``gguf`` is not installed (exit 5).
        ConfigError: a model of a family that is not supported.
        MoectlError: a damaged file, or a place that cannot be written.
    """
    if not file.is_file():
        raise NotFoundError(f"there is no file {file}", "Name a .gguf file.")
    digest = hash_file(file)
    folder = bases_dir() / f"gguf-{digest[:16]}"
    if not is_converted(folder):
        require()
        convert(file, folder, source={"file": file.name, "sha256": digest}, say=say)
    return folder


def bases_dir() -> Path:
    """Where converted bases are kept."""
    return paths.cache_dir() / "bases"


def is_converted(folder: Path) -> bool:
    """Whether a conversion is there; it is renamed into its place when whole."""
    return (folder / SOURCE).is_file()


def read_source(folder: Path) -> dict[str, Any]:
    """Where a converted folder comes from, and the SHA-256 of its files.

    Raises:
        CheckError: it is damaged.
    """
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        assert isinstance(source["files"], dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckError(f"{folder / SOURCE} is damaged", f"Remove {folder}: it is then made again.") from error
    return dict(source)


def require() -> None:
    """Raises MissingDependencyError (exit 5) where the packages that read GGUF are not installed."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"reading GGUF files needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}",
            "pip install 'moectl[gguf]'",
        )


def convert(
    file: Path, folder: Path, *, source: Mapping[str, Any], beside: Mapping[str, bytes] | None = None, say: Say
) -> None:
    """Write the model and tokenizer in ``file`` as the new folder ``folder``, in float32.

    The model that transformers makes of a GGUF file counts as quantised and cannot be saved: its weights are put
    into one built from the same config without that mark.

    Args:
        source: what is kept in ``source.json``, beside the SHA-256 of the files.
        beside: further files, such as a licence, by name.
    """
    facts = _facts(file)
    family = str(facts.get("general.architecture"))
    if family not in MODEL_TYPES:
        raise ConfigError(
            f"{file.name} holds a model of the family '{family}', which is not supported",
            f"Bases that can be upcycled have the model_type {', '.join(sorted(MODEL_TYPES))}.",
        )
    say(f"converting {file.name} to safetensors, once")
    paths.ensure(folder.parent)
    with _new_folder(folder) as temporary:
        _write_model(file, temporary)
        if "tokenizer.ggml.model" in facts:
            _write_tokenizer(file, temporary, str(facts.get("tokenizer.ggml.pre", "")))
        else:
            say(f"warning: {file.name} brings no tokenizer")
        for name, data in (beside or {}).items():
            (temporary / name).write_bytes(data)
        files = {entry.name: hash_file(entry) for entry in sorted(temporary.iterdir())}
        (temporary / SOURCE).write_text(json.dumps({**source, "files": files}, indent=1) + "\n", encoding="utf-8")


def _facts(file: Path) -> dict[str, Any]:
    """The file's short metadata: texts and numbers."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(file)).fields
        return {
            name: field.contents() for name, field in fields.items() if name.startswith(("general.", "tokenizer."))
            and not name.endswith(("tokens", "merges", "token_type", "scores"))
        }  # fmt: skip
    except Exception as error:  # the reader raises what numpy and struct raise: the file is the user's
        raise MoectlError(
            f"{file} is no GGUF file that can be read: {str(error)[:200] or type(error).__name__}",
            "Fetch the file again.",
        ) from error


def _write_model(file: Path, to: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        # tqdm, which transformers calls here by itself, writes its bars to stderr.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
            plain = loaded.config.to_dict()
            for key in ("quantization_config", "_name_or_path"):
                plain.pop(key, None)
            with torch.device("meta"):
                clean: Any = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(plain))
            clean.load_state_dict(loaded.state_dict(), strict=True, assign=True)
            clean.tie_weights()
            clean.save_pretrained(to)
        mode = (to / "config.json").stat().st_mode
        for weights in to.glob("*.safetensors"):
            weights.chmod(mode)  # safetensors makes files that only their owner can read
    except OSError as error:
        if error.errno is not None:
            raise
        raise unreadable(str(file), error) from error
    except Exception as error:  # transformers and gguf raise what they like: the file is the user's
        raise unreadable(str(file), error) from error


def _write_tokenizer(file: Path, to: Path, cut: str) -> None:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            tokenizer.save_pretrained(to)
    except Exception as error:  # as above
        raise unreadable(f"the tokenizer in {file}", error) from error
    if cut in _CUTS:
        written = to / "tokenizer.json"
        plain = json.loads(written.read_text(encoding="utf-8"))
        plain["pre_tokenizer"] = _CUTS[cut]
        written.write_text(json.dumps(plain, indent=2, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that becomes it, whole or not at all; what killed processes left goes."""
    sweep(folder.parent)
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for path in (*sorted(temporary.iterdir()), temporary):
            fsync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_converted(folder):  # else another process was quicker: it made the same
                raise
        fsync(folder.parent)
    except OSError as error:
        raise MoectlError(
            f"cannot write {folder}: {error.strerror or error}",
            "Free some space, or set MOECTL_HOME to a folder that you can write to.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(shelf: Path) -> None:
    """Remove the temporary folders of processes that are gone (where /proc tells)."""
    for left in shelf.glob(".tmp-*"):
        found = re.search(r"-(\d+)-[^-]+$", left.name)
        if found is not None and Path("/proc/self").exists() and not Path(f"/proc/{found[1]}").exists():
            shutil.rmtree(left, ignore_errors=True)

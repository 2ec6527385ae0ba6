"""A dense base of transformers from a local folder or the hub: config, safetensors, and nothing that runs code."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl import paths
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf.dense import family_of
from moectl.hf.refusals import quiet_transformers, unreadable

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")  # that older releases saved, and made anew
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_base(base: str, *, weights: bool = True) -> Path:
    """The folder of a base: a local one, or what the hub has under that id, in the project's own cache.

    Args:
        weights: False: of the hub's files config and tokenizer only.

    Raises:
        NotFoundError: neither a folder nor a possible id.
        MoectlError: the hub cannot be reached, or has no such model.
    """
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        _refuse_file(folder)
    if not _HUB_ID.fullmatch(base):
        raise NotFoundError(
            f"there is no folder {base}", "Give a folder with config.json and safetensors files, a run, or a hub id."
        )
    paths.use_project_cache()
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, *TOKENIZER_FILES, *(("*.safetensors", INDEX) if weights else ())]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except Exception as error:  # the hub's own, and its HTTP client's, which one depends on its version
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MoectlError(
            f"'{base}' is neither a folder nor a run, and the Hugging Face hub does not give it: {reason[:200]}",
            "Check the name, the network and HF_HUB_OFFLINE; without a network, give a local folder.",
        ) from error


def load_dense(base: str | Path) -> Any:
    """The dense causal language model of a folder or hub id, in eval mode, in its own dtype.

    Raises:
        NotFoundError, MoectlError: see :func:`find_base`; no config, no weights, or weights that do not load.
        ConfigError: a model that cannot be upcycled, pickled weights only.
        CheckError: weights that are missing, of the wrong shape, or more than the config describes.
    """
    from transformers import AutoModelForCausalLM

    folder = find_base(str(base))
    config = read_config(folder)
    family_of(config)
    _refuse_pickles(folder)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, transformers and torch raise what they like: the files are the user's
        raise unreadable(str(folder), error) from error
    model, info = loaded
    wrong = [name if isinstance(name, str) else str(name[0]) for key in ("missing_keys", "mismatched_keys")
             for name in info.get(key) or ()]  # fmt: skip
    if wrong:
        raise CheckError(
            f"the weights in {folder} lack {', '.join(sorted(wrong)[:5])}{' and more' if len(wrong) > 5 else ''}, or"
            " have them in another shape",
            "The folder does not hold the whole model: fetch it again.",
        )
    beyond = sorted(name for name in info.get("unexpected_keys") or () if not _BUFFERS.search(name))
    if beyond:
        raise CheckError(
            f"the weights in {folder} hold more than its {CONFIG} describes: {', '.join(beyond[:5])}"
            + (f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""),
            f"Loaded without these it would be another model: put the {CONFIG} of these weights beside them.",
        )
    return model.eval()


def read_config(folder: Path) -> Any:
    """transformers' config of a folder.

    Raises:
        NotFoundError: there is none. MoectlError: it is not JSON, or transformers does not know it.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise NotFoundError(f"{folder} has no {CONFIG}", "Give a folder that transformers' save_pretrained wrote.")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        kind = plain["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MoectlError(f"{file} is no config of a model: {error}", "Fetch the file again.") from error
    from transformers import CONFIG_MAPPING

    if not isinstance(kind, str) or kind not in list(CONFIG_MAPPING.keys()):
        raise ConfigError(
            f"the family '{kind}' is not one that transformers knows", "A newer transformers may know it."
        )
    if isinstance(plain.get("quantization_config"), dict):  # before transformers looks for its quantiser
        config = CONFIG_MAPPING[kind]()
        config.quantization_config = plain["quantization_config"]
        return config
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as error:  # strict dataclasses raise what they like: the config is the user's
        raise unreadable(str(file), error) from error


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    pickled = [name for name in pickled if name != "training_args.bin"]
    if pickled:
        raise _pickled(folder / pickled[0])
    raise NotFoundError(f"{folder} has a {CONFIG} but no weights", "Put the model's safetensors files beside it.")


def _refuse_file(file: Path) -> None:
    if any(file.match(pattern) for pattern in _PICKLES):
        raise _pickled(file)
    raise NotFoundError(f"{file} is a file", "Give the folder that holds config.json and the safetensors files.")


def _pickled(file: Path) -> MoectlError:
    return ConfigError(
        f"{file} is pickled, and reading a pickle runs what is in it",
        "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes"
        " safetensors.",
    )


def text_ids(folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """Token ids ``[P]`` of texts, by the tokenizer in a base's folder.

    Raises:
        NotFoundError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes where files are missing
        raise NotFoundError(
            f"{folder} has no tokenizer that loads", "Put the base's tokenizer.json into it."
        ) from error
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64) for text in texts]

"""An upcycled model on disk: one folder, written whole or not at all, and verified when it is read.

``config.json`` (what :meth:`LanguageModel.describe` says), ``model.safetensors``, ``receipt.json``, tokenizer
files, and ``manifest.json`` with the size and SHA-256 of each. Its ``model_type`` is moectl's own, so that
transformers refuses the folder instead of loading it without its experts.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moectl.config.schema import MoEConfig
from moectl.disk import describe
from moectl.errors import CheckError, MoectlError, NotFoundError
from moectl.hf.dense import family_of
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.new_folder import new_folder
from moectl.hf.refusals import quiet_transformers
from moectl.hf.upcycle import install, new_layer
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder
from moectl.models.language_model import LanguageModel

CONFIG, WEIGHTS, RECEIPT, MANIFEST = "config.json", "model.safetensors", "receipt.json", "manifest.json"
ROUTER = "router.py"
MODEL_TYPE = "moectl_upcycled"
FORMAT = 1


def save_folder(
    model: LanguageModel,
    folder: Path,
    *,
    receipt: Mapping[str, Any],
    beside: Iterable[Path] = (),
    router: Path | None = None,
) -> None:
    """Write a model as a new folder; on any failure nothing of it stays.

    Args:
        receipt: as JSON.
        beside: files to be copied in, such as those of the tokenizer.
        router: the file that its router comes from, if any; the folder then brings it.

    Raises:
        ConfigError: the folder exists.
        MoectlError: it cannot be written.
    """
    with new_folder(folder) as temporary:
        tensors, aliases = _unique(_inner(model).state_dict())
        _write_json(temporary / CONFIG, {"model_type": MODEL_TYPE, **model.describe(), "aliases": aliases})
        mode = (temporary / CONFIG).stat().st_mode
        _write_json(temporary / RECEIPT, receipt)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(mode)  # safetensors makes files that only their owner can read
        for file in beside:
            shutil.copyfile(file, temporary / file.name)
        if router is not None:
            shutil.copyfile(router, temporary / ROUTER)
        files = {file.name: describe(file) for file in sorted(temporary.iterdir())}
        _write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})


def is_folder(folder: Path) -> bool:
    """Whether :func:`load_folder` is meant for it."""
    try:
        plain = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(plain, dict) and plain.get("model_type") == MODEL_TYPE


def read_description(folder: Path) -> dict[str, Any]:
    """What :meth:`LanguageModel.describe` said of a folder's model, its router from the folder's own copy.

    Raises:
        CheckError: the folder's config.json is damaged.
    """
    try:
        plain = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return with_kept_router(plain, folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckError(f"{folder / CONFIG} is damaged: {error!r}", "Make the folder again.") from error


def with_kept_router(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What :meth:`LanguageModel.describe` said, with a router that came from a file read from the copy in ``folder``,
    whatever that file says today."""
    described = copy.deepcopy(dict(description))
    moe = _architecture(described)["moe"]
    kept = folder / ROUTER
    if moe is not None and ".py:" in moe["router"]["name"] and kept.is_file():
        moe["router"]["name"] = f"{kept.resolve()}:{moe['router']['name'].rpartition(':')[2]}"
    return described


def with_moe(description: Mapping[str, Any], moe: MoEConfig) -> dict[str, Any]:
    """The description of the same model with other settings of its experts; its weights stay what they are."""
    described = copy.deepcopy(dict(description))
    _architecture(described)["moe"] = moe.model_dump(mode="json")
    return described


def _architecture(described: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = described["decoder"] if described["kind"] == "decoder" else described
    return found


def load_folder(folder: Path, *, moe: MoEConfig | None = None) -> LanguageModel:
    """The model of a folder that :func:`save_folder` wrote, in eval mode, in its own dtype, on the CPU.

    Args:
        moe: other settings of its experts than those that it was made with, for as many and as large ones.

    Raises:
        NotFoundError: there is no such folder.
        CheckError: a file is missing, damaged, or lacks tensors.
        MoectlError: a format of a later release.
    """
    _verify(folder)
    plain = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    tensors |= {name: tensors[first] for name, first in plain["aliases"].items()}
    described = read_description(folder)
    model = build_described(described if moe is None else with_moe(described, moe))
    inner = _inner(model)
    wanted = inner.state_dict()
    wrong = sorted(
        [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
        + [f"{name} is not known" for name in tensors.keys() - wanted.keys()]
        + [f"{name} has another shape" for name in wanted.keys() & tensors.keys()
           if wanted[name].shape != tensors[name].shape]
    )  # fmt: skip
    if wrong:
        raise CheckError(f"{folder / WEIGHTS} does not fit {CONFIG}: {'; '.join(wrong[:5])}", "Make the folder again.")
    for name, parameter in inner.named_parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(tensors[name].dtype)
    inner.load_state_dict(tensors, strict=True)
    loaded: LanguageModel = model.eval()
    return loaded


def build_described(description: Mapping[str, Any]) -> LanguageModel:
    """A model of the architecture that :meth:`LanguageModel.describe` returned; its weights mean nothing yet."""
    if description["kind"] == "decoder":
        return Decoder(DecoderConfig.from_dict(description["decoder"]))
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = dict(description["config"])
    with quiet_transformers():
        config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        model = AutoModelForCausalLM.from_config(config)
    if description["moe"] is not None:
        family, moe = family_of(model), MoEConfig.model_validate(description["moe"])
        made = {number: new_layer(moe, family, config, number) for number in description["moe_layers"]}
        dtype = next(model.parameters()).dtype
        install(model, family, moe, {number: layer.to(dtype) for number, layer in made.items()})
    return HFLanguageModel(model)


def _inner(model: LanguageModel) -> nn.Module:
    """Whose tensors are saved: transformers' own model, so that names are its own."""
    inner = model.model if isinstance(model, HFLanguageModel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _unique(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors, each once, and ``{other name: name}`` of tied ones."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in places:
            aliases[name] = places[place]
            continue
        places[place] = name
        unique[name] = tensor.detach().cpu().contiguous()
    return unique, aliases


def _verify(folder: Path) -> None:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}")
    try:
        manifest = json.loads(file.read_bytes())
        files, found = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckError(f"{file} is missing or damaged: {error}", "Make the folder again.") from error
    if found != FORMAT:
        raise MoectlError(
            f"{folder} has format {found}, this release reads {FORMAT}", "Use the moectl release that wrote it."
        )
    for name in (CONFIG, WEIGHTS):
        if name not in files:
            raise CheckError(f"{file} lists no {name}", "Make the folder again.")
    for name, listed in files.items():
        if not (folder / name).is_file() or describe(folder / name) != listed:
            raise CheckError(f"{folder / name} is missing or damaged: its SHA-256 differs", "Make the folder again.")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

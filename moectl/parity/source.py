"""Where config and weights come from: a tiny model, the published shape, a config.json, a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moectl.errors import ConfigError, NotFoundError, did_you_mean
from moectl.hf.checkpoint import Tensors, read_folder
from moectl.hf.checkpoint_files import CONFIG, INDEX, PICKLES, read_config
from moectl.parity.case import Level, Weights
from moectl.parity.families import config_of, formula_of, weight_shapes

SIZES = ("tiny", "published")
#: Both sides hold weights and gradients, in float64: four to five times this must fit a small machine.
LARGEST_BYTES = 1 << 30


@dataclass(frozen=True)
class Source:
    """A config, and the weights that come with it.

    Attributes:
        family: moectl's name of it.
        config: in the form of config.json.
        text: what it is, for people.
        tensors: of a checkpoint, by canonical name, read when asked for; None: random weights.
    """

    family: str
    config: dict[str, Any]
    text: str
    tensors: Tensors | None = None

    def weights(self, level: Level, dtype: torch.dtype, layer: int) -> Weights | None:
        """The checkpoint's weights of a component, None for random ones.

        Args:
            layer: whose, of a lone component.
        """
        if self.tensors is None:
            return None
        at = f"model.layers.{layer}."
        prefixes = {"model": "", "layer": at, "moe": f"{at}mlp.", "attention": f"{at}self_attn."}
        if level == "router":
            formula = formula_of(self.family, self.config)
            prefixes["router"] = f"{at}mlp.{formula.router_name}."
        return dict(self.tensors.part(prefixes[level]).to(dtype))


def open_source(family: str, text: str) -> Source:
    """What ``--config`` names: ``tiny``, ``published``, a config.json, or a folder with weights.

    Raises:
        NotFoundError: no such file or folder.
        ConfigError: not a config of this family.
        CheckpointError: weights that do not fit their config, all of them listed.
    """
    if text in SIZES:
        return Source(family, config_of(family, "tiny" if text == "tiny" else "published"), f"{text}, random weights")
    path = Path(text)
    if path.is_dir():
        if (path / CONFIG).is_file() and not any(map(_is_weights, path.iterdir())):
            return open_source(family, str(path / CONFIG))
        found = read_folder(path, family=family)
        return Source(family, found.config, f"{path}, {found.layout} experts", found.tensors)
    if not path.is_file():
        near = did_you_mean(text, SIZES)
        raise NotFoundError(
            f"no config '{text}': neither a size nor a file nor a folder",
            f"{near} " * bool(near) + "Give tiny, published, a config.json, or a folder with config and weights.",
        )
    return Source(family, read_config(path, family)[1], f"{path}, random weights")


def check_size(source: Source, level: Level) -> None:
    """Refuse what would not fit a small machine.

    Raises:
        ConfigError: the component is too large to be compared whole.
    """
    count = parameter_count(source, level)
    if count * torch.float64.itemsize > LARGEST_BYTES:
        raise ConfigError(
            f"the {level} of this config has {count / 1e9:.2f} billion parameters: too large to be compared whole",
            "Compare one layer of it with --layer-only, or the tiny config.",
        )


def parameter_count(source: Source, level: Level) -> int:
    """Of a component; of a lone layer, the first with experts."""
    formula = formula_of(source.family, source.config)
    layer = formula.moe_layers[0] if formula.moe_layers else 0
    return sum(math.prod(shape) for shape in weight_shapes(formula, level, layer).values())


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", *PICKLES) or file.name == INDEX

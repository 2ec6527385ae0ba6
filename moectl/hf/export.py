"""Export of a model with experts: which target says it exactly, and the checkpoint folder in that target's form."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moectl.errors import CheckError, ConfigError
from moectl.hf import modeling_experts
from moectl.hf.checkpoint_layouts import to_per_expert
from moectl.hf.export_config import MODELING, OWN, own_class, own_config, plain_config
from moectl.hf.export_facts import Facts, facts_of
from moectl.hf.export_weights import export_tensors
from moectl.hf.export_write import SHARD_BYTES, write_json, write_weights
from moectl.hf.refusals import quiet_transformers
from moectl.hf.targets import TARGETS, Target, extra_parameters, reasons, target
from moectl.models.language_model import LanguageModel

Layout = Literal["fused", "per-expert"]


@dataclass(frozen=True)
class Plan:
    """What a model is exported as.

    Attributes:
        facts: what the checkpoint has to say.
        target: the plain family; None for the folder with its own code.
        refused: every plain family that cannot say it, and why.
        others: plain families that could too, and the parameters that each would add.
        extra: parameters beyond the model's own.
        replicate_dense: dense layers become equal experts.
    """

    facts: Facts
    target: Target | None
    refused: Mapping[str, tuple[str, ...]]
    others: Mapping[str, int]
    extra: int
    replicate_dense: bool

    @property
    def family(self) -> str:
        return OWN if self.target is None else self.target.name

    @property
    def architecture(self) -> str:
        return own_class(self.facts.base) if self.target is None else self.target.architecture

    def sentence(self) -> str:
        """Why this target."""
        if self.target is None:
            return (
                "no plain family of transformers can say this model exactly, so the folder brings its own modelling"
                " file (trust_remote_code=True)"
            )
        others = ", ".join(f"{name} would add {count:,}" for name, count in sorted(self.others.items()))
        added = f"adding {self.extra:,} parameters of zeros or copies" if self.extra else "adding no parameter"
        return f"{self.target.name} says this model exactly, {added}" + (f" ({others})" if others else "")


def plan_export(
    model: LanguageModel, *, family: str = "auto", replicate_dense: bool = False, positions: int | None = None
) -> Plan:
    """Choose what ``model`` is exported as.

    Args:
        family: ``auto``: the plain family that says it exactly with the fewest parameters, or else the folder with
            its own code; ``own``: that folder; or a plain family's name.
        replicate_dense: a family all of whose layers have experts may write dense ones as equal experts.
        positions: that our own decoder was trained on.

    Raises:
        ConfigError: an unknown family, one that cannot say this model (all reasons are given), a dense model, or a
            router that no checkpoint of transformers can say.
    """
    chosen = None if family in ("auto", OWN) else target(family)
    facts = facts_of(model, positions=positions)
    found = {name: tuple(reasons(each, facts, replicate_dense=replicate_dense)) for name, each in TARGETS.items()}
    refused = {name: why for name, why in found.items() if why}
    extras = {
        name: extra_parameters(TARGETS[name], facts, replicate_dense=replicate_dense)
        for name, why in found.items()
        if not why
    }
    if chosen is not None and chosen.name in refused:
        raise ConfigError(
            f"{chosen.name} cannot say this model: {'; '.join(refused[chosen.name])}", _instead(extras, chosen.name)
        )
    if family == "auto" and extras:
        chosen = TARGETS[min(extras, key=lambda name: extras[name])]  # the table's order where two are equal
    others = {name: extra for name, extra in extras.items() if chosen is None or name != chosen.name}
    replicated = replicate_dense and chosen is not None and chosen.dense == "none" and not facts.all_moe
    return Plan(facts, chosen, refused, others, extras[chosen.name] if chosen else 0, replicated)


def write_model(
    plan: Plan, model: LanguageModel, folder: Path, *, dtype: torch.dtype | None, layout: Layout = "fused",
    shard_bytes: int = SHARD_BYTES,
) -> int:  # fmt: skip
    """Config, weights and, where it needs one, the modelling file, into an existing folder; returns the weights' bytes.

    Raises:
        ConfigError: a layout that the folder with its own code has not.
    """
    if layout == "per-expert" and plan.target is None:
        raise ConfigError(
            "the folder with its own modelling file stacks its experts: it has no per-expert layout",
            "Leave --layout away, or choose a plain family (--family).",
        )
    tensors: dict[str, Tensor] = export_tensors(model, plan.facts, plan.target, replicate_dense=plan.replicate_dense)
    if layout == "per-expert" and plan.target is not None:
        tensors = to_per_expert(tensors, plan.target.layout)
    stored = dtype or next(model.parameters()).dtype
    if plan.target is None:
        config = own_config(plan.facts, stored)
        shutil.copyfile(modeling_experts.__file__, folder / f"{MODELING}.py")
    else:
        config = plain_config(plan.target, plan.facts, stored)
    write_json(folder / "config.json", config)
    return write_weights(folder, tensors, dtype=dtype, shard_bytes=shard_bytes)


def reload(plan: Plan, folder: Path, dtype: torch.dtype) -> Any:
    """The exported model as transformers itself loads it, in eval mode.

    Of a folder with its own code, the class is taken from moectl's copy of the same file: no code of a folder runs.

    Raises:
        CheckError: tensors that are missing, unknown or of another shape, or another class than was meant.
    """
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM if plan.target else getattr(modeling_experts, plan.architecture)
    with quiet_transformers():
        model, info = made.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    wrong = [
        f"{name if isinstance(name, str) else name[0]} ({key.removesuffix('_keys')})"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(info.get(key) or (), key=str)
    ]
    if wrong or type(model).__name__ != plan.architecture:
        raise CheckError(
            f"transformers does not load what was written as {plan.architecture}: {'; '.join(wrong[:5])}",
            "This is a fault of moectl or of this release of transformers: please report it.",
        )
    return model.eval()


def _instead(extras: Mapping[str, int], refused: str) -> str:
    can = [name for name in extras if name != refused]
    if can:
        return f"--family {can[0]} can, exactly; --family auto chooses by itself."
    return (
        "No plain family can. --family own writes a folder with its own modelling file, --format moectl the one that"
        " moectl loads."
    )

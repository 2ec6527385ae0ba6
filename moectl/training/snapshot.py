"""What a checkpoint of a training run holds, and back: everything that the next step depends on, by name.

::

    model       parameters and buffers: weights, balancing biases, thresholds, the step of the router's noise
    optimizer   moments and step counts, by parameter name
    rng         Python, NumPy, torch, every CUDA device
    routing     counts since the last check, by domain and expert; what is known of pairs of experts
    state.json  step, tokens, the data cursor (the order of an epoch is a function of seed and epoch), collapse
                counters, the window of the spike rule, capacity factors, the gradient scaler, how micro-batches are
                cut, the best held-out loss, the newest metrics, how far the record goes, how the run ended

The learning rate and every schedule are functions of the step. A part or key that is missing, one too many,
and a value of another shape are errors; the trainer may be half restored then, and the next checkpoint that fits
replaces all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moectl.errors import CheckError, ConfigError
from moectl.training import diagnose, optim_state, rng, state
from moectl.training.memory import is_out_of_memory
from moectl.training.protocol import Best, Ending

if TYPE_CHECKING:
    from moectl.training.trainer import Trainer

PARTS = ("model", "optimizer", "rng", "routing")
KEYS = (
    "step", "tokens", "sampler", "monitor", "capacity", "spikes", "scaler", "pieces", "best", "last", "record",
    "ending", "optimizer", "model", "config_hash", "data_id", "world_size",
)  # fmt: skip


def pack(trainer: Trainer) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by part, and the JSON state.

    Raises:
        MoectlError: weights are not finite.
    """
    diagnose.refuse_not_finite(trainer.model, trainer.step)
    optimizer_tensors, optimizer_state = optim_state.pack_optimizer(trainer.optimizer, trainer.model.named_parameters())
    parts: dict[str, dict[str, Tensor]] = {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer_tensors,
        "rng": rng.rng_state(),
        "routing": trainer.monitor.tensors(),
    }
    saved = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "sampler": trainer.sampler.state_dict(),
        "monitor": trainer.monitor.state_dict(),
        "capacity": trainer.capacity.state_dict(),
        "spikes": trainer.spikes.state_dict(),
        "scaler": None if trainer.precision.scaler is None else trainer.precision.scaler.state_dict(),
        "pieces": trainer.halving.pieces,
        "best": None if trainer.best is None else trainer.best._asdict(),
        "last": trainer.last,
        "record": dict(trainer.logger.position()),
        "ending": None if trainer.ending is None else list(trainer.ending),
        "optimizer": optimizer_state,
        "model": trainer.model.describe(),
        "config_hash": trainer.config.content_hash(),
        "data_id": trainer.data.manifest.id,
        "world_size": world_size(),
    }
    return parts, saved


def unpack(trainer: Trainer, checkpoint: state.Checkpoint) -> None:
    """Put the trainer where ``checkpoint`` was written.

    Raises:
        ConfigError: the checkpoint belongs to another configuration or dataset.
        CheckError: it is not what this run would have written: a part, key or value is missing, unexpected or of
            another shape, or it is of a run on another number of processes.
    """
    saved, tensors, name = checkpoint.state, checkpoint.tensors, checkpoint.folder.name
    _same_names(f"the checkpoint {name}: part", PARTS, tensors)
    _same_names(f"the checkpoint {name}: key of state.json", KEYS, saved)
    for key, ours in (
        ("config_hash", trainer.config.content_hash()),
        ("data_id", trainer.data.manifest.id),
    ):
        if saved[key] != ours:
            raise ConfigError(
                f"the checkpoint {name} was made with another {key.split('_')[0]}",
                "Resume with the run's own config and data, or start a new run.",
            )
    if saved["world_size"] != world_size():
        raise CheckError(
            f"the checkpoint {name} is of a run of {saved['world_size']} processes, this one has {world_size()}"
        )
    if saved["step"] != checkpoint.step:
        raise CheckError(f"the checkpoint {name} says in state.json that it is of step {saved['step']}")
    try:
        _restore(trainer, saved, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):  # says nothing of the checkpoint
            raise
        raise CheckError(f"the checkpoint {name} does not hold what it should: {error!r}") from error


def unsaved_buffers(model: Any) -> dict[str, Tensor]:
    """Copies of the buffers that no checkpoint holds (``persistent=False``), by name."""
    saved = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}


def world_size() -> int:
    """Processes of this run."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def _restore(trainer: Trainer, saved: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    state.load_model_strict(trainer.model, tensors["model"])
    # What a step that is rolled back has left in them is of no use to the run that is resumed, which has new ones.
    buffers: dict[str, Tensor] = dict(trainer.model.named_buffers())
    for name, tensor in trainer.unsaved.items():
        buffers[name].copy_(tensor)
    optim_state.unpack_optimizer(
        trainer.optimizer, trainer.model.named_parameters(), tensors["optimizer"], saved["optimizer"]
    )
    _refuse_impossible(trainer, saved)
    trainer.sampler.load_state_dict(saved["sampler"])
    _same_names("the checkpoint: routing counts", trainer.monitor.tensors(), tensors["routing"])
    trainer.monitor.load(saved["monitor"], tensors["routing"])
    trainer.capacity.load_state_dict(saved["capacity"])
    trainer.spikes.load_state_dict(saved["spikes"])
    if (saved["scaler"] is None) != (trainer.precision.scaler is None):
        raise CheckError("the checkpoint and this run disagree about a gradient scaler")
    if trainer.precision.scaler is not None:
        trainer.precision.scaler.load_state_dict(saved["scaler"])
    trainer.step, trainer.tokens, trainer.halving.pieces = (int(saved[key]) for key in ("step", "tokens", "pieces"))
    trainer.best = None if saved["best"] is None else Best(**saved["best"])
    trainer.last = dict(saved["last"])
    trainer.ending = None if saved["ending"] is None else Ending(*saved["ending"])
    rng.restore_rng(tensors["rng"])


def _refuse_impossible(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Raise CheckError for what no run of this config comes to, though each value is of its type."""
    step, tokens, position, record = saved["step"], saved["tokens"], saved["sampler"]["position"], saved["record"]
    best, moments = saved["best"], [entry["state"] for entry in saved["optimizer"]["params"].values()]
    wrong = [
        said
        for holds, said in (
            (tokens == step * trainer.step_tokens, f"{tokens} tokens at step {step}"),
            (_count(position) and position * trainer.data.manifest.block_size >= tokens, f"the data cursor {position}"),
            # Where a float16 gradient overflows, steps pass without the weights being moved.
            (step == 0 or trainer.precision.scaler is not None or any(moments), "an optimizer without any state"),
            (
                record.keys() == trainer.logger.position().keys() and all(map(_count, record.values())),
                f"record {record}",
            ),
            (best is None or (_count(best["step"]) and _number(best["value"])), f"the best evaluation {best}"),
            (_count(saved["pieces"]) and saved["pieces"] > 0, f"micro-batches in {saved['pieces']} pieces"),
        )
        if not holds
    ]
    if wrong:
        raise CheckError(f"the checkpoint cannot be one of this run: it has {', '.join(wrong)}")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _same_names(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise CheckError naming what is missing and what is too many."""
    expected, found = set(expected), set(found)
    wrong = [f"{name} is missing" for name in sorted(expected - found)]
    wrong += [f"{name} is unexpected" for name in sorted(found - expected)]
    if wrong:
        raise CheckError(f"{what} {', '.join(wrong)}", "It was written by another release, or by another tool.")

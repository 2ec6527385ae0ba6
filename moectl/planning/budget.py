"""Tokens, time and money of a run: what it reads, how often it reads it, and what that takes on a device."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.config.schema import ExperimentConfig
from moectl.errors import ConfigError
from moectl.planning.anatomy import Anatomy
from moectl.planning.devices import Device
from moectl.planning.memory import Memory

#: Compute-optimal training of dense models (Hoffmann et al. 2022, arXiv:2203.15556).
TOKENS_PER_PARAMETER = 20
#: Passes over the same text that cost next to nothing (Muennighoff et al. 2023, arXiv:2305.16264).
HARMLESS_EPOCHS = 4


@dataclass(frozen=True)
class Tokens:
    """What a run reads.

    Attributes:
        per_step: whole blocks, as training counts them.
        routed: positions of a step that pass the model: the last of each block is only a target.
        micro_batch: positions of one forward pass.
        total: of the whole run.
        available: training tokens of the dataset; None where none is prepared.
        optimal: compute-optimal for the active parameters.
    """

    per_step: int
    routed: int
    micro_batch: int
    steps: int
    total: int
    available: int | None
    optimal: int

    @property
    def epochs(self) -> float | None:
        """Passes over the training tokens."""
        return None if not self.available else self.total / self.available


@dataclass(frozen=True)
class Cost:
    """A run on one device.

    Attributes:
        memory: at the run's fullest moment there.
        tokens_per_second: how fast; ``source`` says whence: ``measured`` or ``assumed``.
        run: whose rate was measured.
        utilisation: of the device's peak, by model FLOPs.
        usd_per_hour: None where no price is known.
        peak: FLOP/s of the device at this precision.
        computed_as: what it computes in instead of this precision, and why; None for that itself.
    """

    device: Device
    memory: Memory
    tokens_per_second: float
    source: str
    run: str | None
    utilisation: float
    seconds: float
    usd_per_hour: float | None
    peak: float
    computed_as: str | None = None

    @property
    def usd(self) -> float | None:
        return None if self.usd_per_hour is None else self.usd_per_hour * self.seconds / 3600

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.device.memory


def plan_tokens(model: Anatomy, config: ExperimentConfig, block_size: int, available: int | None) -> Tokens:
    """What the run of ``config`` reads from blocks of ``block_size``."""
    train = config.train
    blocks = train.batch_size * train.grad_accum
    return Tokens(
        per_step=blocks * block_size,
        routed=blocks * (block_size - 1),
        micro_batch=train.batch_size * (block_size - 1),
        steps=train.steps,
        total=train.steps * blocks * block_size,
        available=available,
        optimal=TOKENS_PER_PARAMETER * model.parameters.active,
    )


def cost_on(
    device: Device,
    model: Anatomy,
    tokens: Tokens,
    memory: Memory,
    *,
    precision: str,
    measured: tuple[str, float] | None = None,
    price: float | None = None,
) -> Cost:
    """Time and money of the run on ``device``, training alone: without evaluations and checkpoints.

    Args:
        measured: a run of the same shape on such a device, and its tokens per second.
        price: dollars per hour, in place of the device's own.
    """
    flops_per_token = model.training_flops * tokens.routed / tokens.per_step
    peak = device.rate(precision)
    rate = peak * device.utilisation / flops_per_token if measured is None else measured[1]
    return Cost(
        device=device,
        memory=memory,
        tokens_per_second=rate,
        source="assumed" if measured is None else "measured",
        run=None if measured is None else measured[0],
        utilisation=rate * flops_per_token / peak,
        seconds=tokens.total / rate,
        usd_per_hour=device.usd_per_hour if price is None else abs(price),  # -0 is 0
        peak=peak,
        computed_as=device.computed_as(precision),
    )


def check_price(price: float | None) -> None:
    """Raise ConfigError (exit 2) for a price that is none."""
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"a price of {price:g} dollars per hour cannot be", "Give 0 or more.")

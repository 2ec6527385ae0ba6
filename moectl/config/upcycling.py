"""How experts come out of a dense model: the keys of the ``moe`` section that say so.

Every key here changes something, or is refused: what an ``init`` does not use must not be set.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moectl.config.settings import Fraction, NonNegative, PositiveInt, Settings
from moectl.errors import ConfigError

Init = Literal["auto", "copy", "split", "drop", "random", "experts-from"]
INITS: tuple[Init, ...] = ("auto", "copy", "split", "drop", "random", "experts-from")
_USED_BY: dict[str, tuple[Init, ...]] = {
    "init_noise": ("auto", "copy", "split"),
    "allow_shrinking": ("auto", "copy", "drop", "experts-from"),
    "granularity": ("split",),
    "drop_ratio": ("drop",),
    "experts_from": ("experts-from",),
    "router_prompts": ("experts-from",),
    "expert_intermediate_size": ("auto", "copy", "drop", "random", "experts-from"),
}


class UpcyclingSettings(Settings):
    """Where experts start from."""

    num_experts: PositiveInt = 8
    init: Init = Field(
        "auto",
        description="copy, split, drop, random or experts-from; auto: copy from a trained base, random from scratch",
    )
    init_noise: NonNegative = Field(
        1e-3, description="noise of copied or split experts, in standard deviations of each matrix"
    )
    allow_shrinking: bool = Field(
        False, description="experts of the dense MLP's size under weights that do not sum to one: the layer shrinks"
    )
    granularity: PositiveInt | None = Field(
        None, description="init split: each expert is one of so many parts of the dense MLP"
    )
    drop_ratio: Fraction = Field(0.5, description="init drop: share of each expert's neurons that are drawn anew")
    experts_from: tuple[str, ...] = Field(
        (), description="init experts-from: one fine-tune of the base per expert, in order"
    )
    router_prompts: tuple[str, ...] = Field(
        (), description="init experts-from: a text per expert (@FILE: one per line) that its gate row starts from"
    )
    expert_intermediate_size: PositiveInt | None = Field(None, description="default: the dense MLP's")

    def expert_size(self, dense_size: int) -> int:
        """``F`` of one expert out of a dense MLP of ``dense_size`` neurons.

        Raises:
            ConfigError: the granularity does not divide it.
        """
        if self.init != "split":
            return self.expert_intermediate_size or dense_size
        assert self.granularity is not None
        if dense_size % self.granularity:
            raise ConfigError(
                f"moe.granularity {self.granularity} does not divide the dense MLP's {dense_size} neurons",
                f"Choose a divisor of {dense_size}, for example {_nearest_divisor(dense_size, self.granularity)}.",
            )
        return dense_size // self.granularity

    @model_validator(mode="after")
    def _init_uses_its_keys(self) -> UpcyclingSettings:
        for key, inits in _USED_BY.items():
            value = getattr(self, key)
            idle = value == type(self).model_fields[key].default or (key == "init_noise" and value == 0.0)
            if self.init not in inits and not idle:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                raise ValueError(
                    f"moe.{key} = {shown} has no effect: moe.init is {self.init}, not {' or '.join(inits)}"
                )
        if self.init == "split":
            self._check_split()
        if self.init == "experts-from":
            self._check_experts_from()
        return self

    def _check_split(self) -> None:
        if self.granularity is None:
            raise ValueError("moe.init split needs moe.granularity, the number of parts of the dense MLP (4, say)")
        shared = int(getattr(self, "n_shared_experts", 0))
        routed = self.granularity - shared
        if routed < 1:
            raise ValueError(
                f"moe.granularity {self.granularity} leaves no part to route: moe.n_shared_experts is {shared}"
            )
        if self.num_experts % routed:
            less = f" less the {shared} shared" if shared else ""
            raise ValueError(
                f"moe.num_experts {self.num_experts} is no multiple of {routed}, which is moe.granularity{less}: each"
                f" group of experts is one whole dense MLP{', with the shared ones' * (shared > 0)}"
            )

    def _check_experts_from(self) -> None:
        if len(self.experts_from) != self.num_experts:
            raise ValueError(
                f"moe.experts_from names {len(self.experts_from)} models for moe.num_experts {self.num_experts}:"
                " one per expert"
            )
        if self.router_prompts and len(self.router_prompts) != self.num_experts:
            raise ValueError(
                f"moe.router_prompts has {len(self.router_prompts)} texts for {self.num_experts} experts: give one each"
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((each for each in range(1, number + 1) if number % each == 0), key=lambda each: abs(each - wanted))

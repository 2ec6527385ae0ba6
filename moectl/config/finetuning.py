"""What a run trains when it does not train everything: frozen parts, some of the experts, low-rank adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moectl.config.settings import Fraction, Positive, PositiveInt, Settings
from moectl.errors import did_you_mean

Part = Literal["router", "experts", "dense"]
PARTS: tuple[Part, ...] = ("router", "experts", "dense")
Target = Literal["attention", "mlp", "experts"]
TARGETS: tuple[Target, ...] = ("attention", "mlp", "experts")
Expert = Annotated[int, Field(ge=0)]


class LoraConfig(Settings):
    """Low-rank adapters on frozen weights: ``W + alpha/rank · B·A`` (arXiv 2106.09685). Short form: the rank alone."""

    rank: PositiveInt = 8
    alpha: Positive | None = Field(None, description="the adapters are scaled by alpha/rank; default: 2 · rank")
    dropout: Fraction = Field(0.0, description="of what enters the adapters of attention and mlp; experts have none")
    targets: tuple[Target, ...] = Field(
        ("attention", "experts"), description="attention, experts (routed), mlp (of dense layers, and shared experts)"
    )
    train_router: bool = Field(False, description="the routers train too, in full; else they are frozen")

    @field_validator("targets", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        return _names(value, TARGETS)

    @model_validator(mode="after")
    def _possible(self) -> LoraConfig:
        if not self.targets:
            raise ValueError(f"finetune.lora.targets is empty: name some of {', '.join(TARGETS)}")
        if self.dropout >= 1.0:
            raise ValueError("finetune.lora.dropout is below 1: at 1 no adapter sees anything")
        if self.dropout > 0.0 and self.targets == ("experts",):
            raise ValueError("finetune.lora.dropout has no effect: adapters of experts have none")
        return self

    @property
    def scale(self) -> float:
        """What ``B·A`` is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank


class FinetuneConfig(Settings):
    """What stays as it is; by default nothing does."""

    freeze: tuple[Part, ...] = Field(
        (), description="router, experts (routed and shared), dense (all the rest); several allowed"
    )
    train_experts: tuple[Expert, ...] | dict[Expert, tuple[Expert, ...]] | None = Field(
        None, description="of all experts only these move, in every MoE layer: 0,3; or by layer: {10: [0], 11: [2, 5]}"
    )
    lora: LoraConfig | None = Field(None, description="train low-rank adapters, and nothing else; or the rank alone")

    @field_validator("freeze", mode="before")
    @classmethod
    def _freeze(cls, value: Any) -> Any:
        return _names(value, PARTS)

    @field_validator("lora", mode="before")
    @classmethod
    def _lora(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("give the rank, for example 8, or null for no adapters")
        return {"rank": value} if isinstance(value, (int, float, str)) else value

    @field_validator("train_experts", mode="before")
    @classmethod
    def _train_experts(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {_number(layer, "layer"): _experts(experts) for layer, experts in sorted(value.items(), key=str)}
        return None if value is None else _experts(value)

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if self.train_experts is not None and not self.train_experts:
            raise ValueError("finetune.train_experts names no expert: to train none of them, freeze experts")
        if self.train_experts is not None and "experts" in self.freeze:
            raise ValueError(
                "finetune.freeze holds experts, but finetune.train_experts names some: drop one of the two"
            )
        if self.lora is not None:
            for key, given in (("freeze", self.freeze), ("train_experts", self.train_experts)):
                if given:
                    raise ValueError(
                        f"finetune.{key} does not go with finetune.lora, which freezes all weights but its own:"
                        " choose with finetune.lora.targets and finetune.lora.train_router"
                    )
        return self

    @property
    def active(self) -> bool:
        """Whether anything is frozen."""
        return bool(self.freeze) or self.train_experts is not None or self.lora is not None

    @property
    def freezes_router(self) -> bool:
        """Whether routers stay as they are."""
        return "router" in self.freeze or (self.lora is not None and not self.lora.train_router)

    @property
    def touches_experts(self) -> bool:
        """Whether some router or expert is not trained as a whole: then no layer can start one anew."""
        return self.lora is not None or self.train_experts is not None or bool({"router", "experts"} & {*self.freeze})

    def check(self, *, has_experts: bool, revives: bool, scheduled: Collection[str] = ()) -> None:
        """Raise ValueError where a key has nothing to act on, or another one acts against it.

        Args:
            has_experts: whether the model has MoE layers. revives: whether dead experts start anew.
            scheduled: keys of moe.schedule that are set.
        """
        expert_parts = [part for part in self.freeze if part != "dense"]
        if not has_experts and expert_parts:
            raise ValueError(f"finetune.freeze = {expert_parts[0]} has no effect: the model is dense (moe: null)")
        if not has_experts and self.train_experts is not None:
            raise ValueError("finetune.train_experts has no effect: the model is dense (moe: null)")
        if not has_experts and self.lora is not None and self.lora.train_router:
            raise ValueError("finetune.lora.train_router has no effect: the model is dense (moe: null)")
        if not has_experts and self.freeze == ("dense",):
            raise ValueError("finetune.freeze = dense leaves nothing to train: the model is dense (moe: null)")
        if set(self.freeze) == set(PARTS):
            raise ValueError("finetune.freeze leaves nothing to train: take one of its parts away")
        for key in ("top_k", "noise_std"):
            if key in scheduled and self.freezes_router:
                raise ValueError(
                    f"moe.schedule.{key} has no effect: finetune freezes the routers, which route as in eval"
                )
        if revives and self.touches_experts:
            raise ValueError(
                "moe.revive_dead gives a dead expert new weights and a new gate row, which finetune keeps as they are:"
                " drop one of the two"
            )

    def trained_experts(self, layer: int, num_experts: int) -> tuple[int, ...]:
        """The experts of one layer whose rows move."""
        if self.lora is not None or "experts" in self.freeze:
            return ()
        if self.train_experts is None:
            return tuple(range(num_experts))
        return self.train_experts.get(layer, ()) if isinstance(self.train_experts, dict) else self.train_experts


def _names(value: Any, known: tuple[str, ...]) -> Any:
    """Names out of ``known``, from a list or ``a,b``: each once, in one order, so that one meaning has one hash."""
    names = [] if value is None else value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"give names out of {', '.join(known)}")
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or ""
            raise ValueError(f"{name!r} is none of: {', '.join(known)}. {hint}".rstrip())
    return tuple(name for name in known if name in names)


def _experts(value: Any) -> tuple[int, ...]:
    """Expert numbers from ``0,3``, ``[0, 3]`` or a single one: ascending, each once."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    return tuple(
        sorted({_number(part, "expert") for part in parts if not (isinstance(part, str) and not part.strip())})
    )


def _number(value: Any, what: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal():
        raise ValueError(f"{value!r} is no {what}'s number: they count from 0, for example 0,3")
    return int(text)

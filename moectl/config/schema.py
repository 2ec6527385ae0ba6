"""The experiment, as data: strict, frozen, hashable pydantic models shared by every command.

An unknown key is an error, never ignored. Nothing here imports torch: router options are checked
by the router's own ``Config`` where the command meets the router.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moectl.config.distillation import DistillConfig as DistillConfig
from moectl.config.finetuning import FinetuneConfig as FinetuneConfig
from moectl.config.guards import CollapseConfig as CollapseConfig
from moectl.config.schedule import ScheduleConfig
from moectl.config.settings import Beta as Beta
from moectl.config.settings import Fraction as Fraction
from moectl.config.settings import NonNegative as NonNegative
from moectl.config.settings import Positive as Positive
from moectl.config.settings import PositiveInt as PositiveInt
from moectl.config.settings import Seed as Seed
from moectl.config.settings import Settings as Settings
from moectl.config.training import OptimConfig as OptimConfig
from moectl.config.training import TrainConfig as TrainConfig
from moectl.config.upcycling import UpcyclingSettings
from moectl.errors import did_you_mean
from moectl.paths import check_name

BalanceLoss = Literal["switch", "cv2", "entropy"]
BALANCE_LOSS_NAMES: tuple[BalanceLoss, ...] = ("switch", "cv2", "entropy")
_LAYERS = re.compile(r"all|last:[1-9]\d*|every:[1-9]\d*|\d+(,\d+)*")


class DataConfig(Settings):
    """What ``prepare`` makes."""

    domains: tuple[str, ...] = ("code", "math", "prose")
    source: str = Field("sample", description="sample, hub, a folder, or a .jsonl/.parquet file with a 'domain' field")
    sources: dict[str, str] = Field(default_factory=dict, description="a source per domain, over 'source'")
    tokenizer: str = Field(
        "bpe:8192", description="bpe:SIZE trains one on the training split; else a tokenizer folder or file"
    )
    block_size: Annotated[int, Field(ge=8, le=131072)] = 512
    balance_tokens: bool = True
    seed: Seed = 0

    @field_validator("domains")
    @classmethod
    def _domains(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        if not domains:
            raise ValueError("at least one domain is needed")
        if len(set(domains)) != len(domains):
            raise ValueError("a domain is named twice")
        return tuple(check_name(domain) for domain in domains)


class ModelConfig(Settings):
    """The base: one of our decoder's sizes (from scratch), or a trained model to start from.

    The optional fields override the size's own; they are refused for a trained model.
    """

    base: str = Field(
        "tiny",
        description="tiny, mini, small, base (from scratch); or whose weights to start from: a run, a Hugging Face"
        " folder, a folder of moectl upcycle, a .gguf file, a hub id, smollm2",
    )
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rope_theta: Positive | None = None
    tie_word_embeddings: bool | None = None


class CapacityConfig(Settings):
    """How many tokens an expert takes in training: ``ceil(k·T/E · factor)``. Short form: the factor alone."""

    factor: Positive = 1.25
    overflow: Literal["drop", "next-best"] = Field(
        "drop", description="past an expert's room: the residual path only, or the token's next expert with room"
    )
    fill: Literal["position", "probability"] = Field(
        "position", description="who comes first: earlier tokens, or the more probable (non-causal)"
    )
    in_eval: bool = Field(False, description="apply it in evaluation too, which is dropless otherwise")
    dynamic: bool = Field(
        False, description="at every check, per layer: the factor grows above a load CV of 0.5, shrinks under 0.1"
    )
    min_factor: Positive = Field(1.1, description="lower bound of a dynamic factor")
    max_factor: Positive = Field(3.0, description="upper bound of a dynamic factor")

    @model_validator(mode="after")
    def _bounds(self) -> CapacityConfig:
        if not self.dynamic:
            _refuse_without_effect(self, ("min_factor", "max_factor"), "the factor is not dynamic (dynamic: true)")
        elif not self.min_factor <= self.factor <= self.max_factor:
            raise ValueError(
                f"a dynamic factor starts between min_factor ({self.min_factor:g}) and max_factor"
                f" ({self.max_factor:g}), not at {self.factor:g}"
            )
        return self


class MoEConfig(UpcyclingSettings):
    """Experts, router and losses."""

    router: dict[str, Any] = Field(
        default_factory=lambda: {"name": "top1"}, description="name and the router's own options"
    )
    layers: str = Field("last:4", description="all | last:N | every:N | a list such as 2,3")
    n_shared_experts: Annotated[int, Field(ge=0)] = 0
    backend: str = Field("grouped", description="loop | grouped | full")
    lb_coef: NonNegative | None = Field(
        None, description="of the balance loss 'switch'; default: 0.01, or 0 for routers that balance without a loss"
    )
    z_coef: NonNegative = 0.001
    balance_loss: tuple[BalanceLoss, ...] = Field(("switch",), description="switch, cv2, entropy (several), or none")
    cv2_coef: NonNegative = Field(0.01, description="of the balance loss 'cv2'")
    entropy_coef: NonNegative = Field(0.01, description="of the balance loss 'entropy'")
    balance_scope: Literal["global", "micro", "sequence"] = "global"
    balance_exact: bool = Field(
        False, description="two passes, counts first: the same loss however the batch is cut (global scope)"
    )
    capacity: CapacityConfig | None = Field(None, description="default: dropless")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="what changes over training")
    revive_dead: bool = Field(
        False, description="at every check, an expert without tokens starts anew from the layer's busiest"
    )
    revive_noise: NonNegative = Field(
        0.01, description="noise of a revived expert, in standard deviations of each matrix"
    )

    @field_validator("router", mode="before")
    @classmethod
    def _router(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and not isinstance(value.get("name"), str):
            raise ValueError("the router needs a 'name', for example {name: top1}")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            value = ",".join(str(item) for item in value)
        text = str(value).replace(" ", "")
        if not _LAYERS.fullmatch(text):
            raise ValueError(f"layers {value!r} is none of: all, last:4, every:2, 2,3")
        return text

    @field_validator("balance_loss", mode="before")
    @classmethod
    def _balance_loss(cls, value: Any) -> Any:
        names = re.split(r"[+,]", value) if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"give names out of {', '.join(BALANCE_LOSS_NAMES)}, or none")
        names = [name.strip() for name in names]
        if names == ["none"]:
            return ()
        for name in names:
            if name not in BALANCE_LOSS_NAMES:
                hint = did_you_mean(name, BALANCE_LOSS_NAMES) or "'none' stands alone." * (name == "none")
                raise ValueError(f"{name!r} is none of: {', '.join(BALANCE_LOSS_NAMES)}. {hint}".rstrip())
        if len(set(names)) != len(names):
            raise ValueError("a balance loss is named twice")
        return tuple(name for name in BALANCE_LOSS_NAMES if name in names)  # one order: one config, one hash

    @field_validator("capacity", mode="before")
    @classmethod
    def _capacity(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("give the capacity factor, for example 1.25, or null for dropless")
        return {"factor": value} if isinstance(value, (int, float, str)) else value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> MoEConfig:
        for name in BALANCE_LOSS_NAMES:
            if name not in self.balance_loss:
                key = "lb_coef" if name == "switch" else f"{name}_coef"
                without = f"'{name}' is not in moe.balance_loss ({'+'.join(self.balance_loss) or 'none'})"
                _refuse_without_effect(self, (key,), without, section="moe.", none=(None, 0.0))
        if self.balance_exact and self.balance_scope != "global":
            raise ValueError(f"moe.balance_exact needs moe.balance_scope global, not {self.balance_scope}")
        if self.balance_exact and not self.balance_loss:
            raise ValueError("moe.balance_exact has no effect: moe.balance_loss is none")
        if not self.revive_dead:
            _refuse_without_effect(self, ("revive_noise",), "moe.revive_dead is false", section="moe.")
        self._check_schedules()
        return self

    def _check_schedules(self) -> None:
        """Each schedule moves something, ends at the key's own value, and has no rival."""
        top_k, factor, coefficient = self.schedule.top_k, self.schedule.capacity_factor, self.schedule.lb_coef
        if top_k is not None and max(top_k.values) > self.num_experts:
            raise ValueError(f"moe.schedule.top_k asks for {max(top_k.values):g} of {self.num_experts} experts")
        if factor is not None:
            if self.capacity is None:
                raise ValueError("moe.schedule.capacity_factor has no effect: moe.capacity is null (dropless)")
            if self.capacity.dynamic:
                raise ValueError("moe.schedule.capacity_factor and moe.capacity.dynamic both move the factor: drop one")
            _refuse_other_end("capacity_factor", factor.final, "moe.capacity.factor", self.capacity.factor)
        if coefficient is not None:
            if "switch" not in self.balance_loss:
                raise ValueError("moe.schedule.lb_coef has no effect: 'switch' is not in moe.balance_loss")
            if self.lb_coef is not None:
                _refuse_other_end("lb_coef", coefficient.final, "moe.lb_coef", self.lb_coef)

    def with_lb_coef(self, default: float | None) -> MoEConfig:
        """This config with ``lb_coef`` a number: as given, else its schedule's end, else the router's
        ``default``, else 0.01; 0 where ``switch`` is not among the balance losses.
        """
        if self.lb_coef is not None:
            return self
        value = 0.01 if default is None else default
        if "switch" not in self.balance_loss:
            value = 0.0
        elif self.schedule.lb_coef is not None:
            value = self.schedule.lb_coef.final
        return self.model_copy(update={"lb_coef": value})

    @property
    def router_name(self) -> str:
        return str(self.router["name"])

    @property
    def router_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.router.items() if key != "name"}


def _refuse_without_effect(
    config: Settings, keys: tuple[str, ...], without: str, *, section: str = "", none: tuple[Any, ...] = ()
) -> None:
    """A key that is set to something and changes nothing is an error: nobody is to believe in it."""
    for key in keys:
        value = getattr(config, key)
        if value != type(config).model_fields[key].default and value not in none:
            raise ValueError(f"{section}{key} = {value:g} has no effect: {without}")


def _refuse_other_end(key: str, end: float, own: str, value: float) -> None:
    if end != value:
        raise ValueError(f"moe.schedule.{key} ends at {end:g}, but {own} is {value:g}: let them agree")


class EvalConfig(Settings):
    """Held-out evaluation; ``max_blocks`` bounds the periodic one during training, never the final one."""

    batch_size: PositiveInt = 16
    max_blocks: PositiveInt | None = Field(None, description="blocks per periodic evaluation; default: all")


class ExperimentConfig(Settings):
    """One run, complete: what ``moectl train`` does is a function of this and the prepared data."""

    name: str | None = Field(None, description="the run's name; default: preset or router and a hash")
    preset: Literal["dense", "moe", "no-lb", "top2"] | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig | None = MoEConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="what stays as it is; default: nothing")
    distill: DistillConfig | None = Field(None, description="a teacher; default: none")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str | None) -> str | None:
        return None if name is None else check_name(name)

    @model_validator(mode="after")
    def _warmup_fits(self) -> ExperimentConfig:
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below train.steps ({self.train.steps}):"
                f" shorten it with optim.warmup_steps={self.train.steps // 10}"
            )
        return self

    @model_validator(mode="after")
    def _finetuning_fits(self) -> ExperimentConfig:
        moe = self.moe
        scheduled = () if moe is None else [key for key, value in moe.schedule if value is not None]
        self.finetune.check(
            has_experts=moe is not None, revives=moe is not None and moe.revive_dead, scheduled=scheduled
        )
        return self

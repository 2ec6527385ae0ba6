"""The experiment, as data: strict, frozen, hashable pydantic models shared by every command.

An unknown key is an error, never ignored. Nothing here imports torch: router options are checked
by the router's own ``Config`` where the command meets the router.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moectl.paths import check_name

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_LAYERS = re.compile(r"all|last:[1-9]\d*|every:[1-9]\d*|\d+(,\d+)*")


class Settings(BaseModel):
    """Base of every section: unknown keys refused, immutable, hashed by content."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def content_hash(self) -> str:
        """SHA-256 over the canonical JSON of all values (hex, 64 characters)."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


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
    """The base: one of our decoder's sizes (from scratch) or a run/checkpoint to start from.

    The optional fields override the size's own; they are refused for a run or checkpoint.
    """

    base: str = Field("tiny", description="tiny, small, ... (from scratch), or a run whose weights to start from")
    num_layers: PositiveInt | None = None
    hidden_size: PositiveInt | None = None
    intermediate_size: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rope_theta: Positive | None = None
    tie_word_embeddings: bool | None = None


class MoEConfig(Settings):
    """Experts, router and losses."""

    router: dict[str, Any] = Field(
        default_factory=lambda: {"name": "top1"}, description="name and the router's own options"
    )
    num_experts: Annotated[int, Field(ge=1)] = 8
    layers: str = Field("last:4", description="all | last:N | every:N | a list such as 2,3")
    init: Literal["auto", "copy", "random"] = Field(
        "auto",
        description="copies of the dense MLP, or drawn afresh; auto: copy from a trained base, random from scratch",
    )
    init_noise: NonNegative = Field(1e-3, description="noise of copied experts, in standard deviations of each matrix")
    expert_intermediate_size: PositiveInt | None = Field(None, description="default: the dense MLP's")
    n_shared_experts: Annotated[int, Field(ge=0)] = 0
    backend: str = Field("grouped", description="loop | grouped | full")
    lb_coef: NonNegative = 0.01
    z_coef: NonNegative = 0.001
    balance_scope: Literal["global", "micro"] = "global"

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

    @property
    def router_name(self) -> str:
        return str(self.router["name"])

    @property
    def router_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.router.items() if key != "name"}


class OptimConfig(Settings):
    """AdamW; weight decay never touches routers, norms and embeddings."""

    lr: Positive = 3e-3
    router_lr: Positive | None = Field(None, description="default: lr")
    expert_lr: Positive | None = Field(None, description="default: lr")
    weight_decay: NonNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    grad_clip: Positive | None = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1


class CollapseConfig(Settings):
    """When a layer counts as collapsed."""

    max_share: Fraction = 0.6
    min_share_of_uniform: Fraction = 0.1
    min_expected_count: Positive = 100.0
    patience: PositiveInt = 3


class TrainConfig(Settings):
    """The loop. A step is one optimizer step over ``batch_size · grad_accum`` blocks."""

    steps: PositiveInt = 600
    batch_size: PositiveInt = Field(16, description="blocks per micro-batch")
    grad_accum: PositiveInt = 1
    seed: Seed = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    threads: PositiveInt | None = Field(None, description="CPU threads; default: torch's own")
    deterministic: bool = False
    log_every: PositiveInt = 10
    eval_every: PositiveInt = 200
    check_every: PositiveInt = Field(50, description="steps between collapse checks")
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    early_stop: bool = Field(False, description="end the run, with exit code 3, when a layer has collapsed")
    collapse: CollapseConfig = CollapseConfig()


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

"""The optimizer and the loop: what is moved by which rule, and how a step is computed and kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moectl.config.guards import CollapseConfig, SpikeConfig
from moectl.config.settings import Beta, Fraction, NonNegative, Positive, PositiveInt, Seed, Settings

Precision = Literal["float32", "bfloat16", "bfloat16-pure", "float16", "float64"]


class OptimConfig(Settings):
    """AdamW, or Muon for matrices beside it; weight decay never touches routers, norms and embeddings."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of attention, MLPs and experts; AdamW for all else"
    )
    lr: Positive = 3e-3
    router_lr: Positive | None = Field(None, description="default: lr")
    expert_lr: Positive | None = Field(None, description="of routed experts; default: lr")
    dense_lr: Positive | None = Field(None, description="of all but routers and routed experts; default: lr")
    weight_decay: NonNegative = 0.1
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    muon_momentum: Beta = Field(0.95, description="of Muon's matrices")
    grad_clip: Positive | None = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> OptimConfig:
        if self.optimizer != "muon" and self.muon_momentum != type(self).model_fields["muon_momentum"].default:
            raise ValueError(f"optim.muon_momentum = {self.muon_momentum:g} has no effect: optim.optimizer is adamw")
        return self


class TrainConfig(Settings):
    """The loop. A step is one optimizer step over ``batch_size · grad_accum`` blocks."""

    steps: PositiveInt = 600
    batch_size: PositiveInt = Field(16, description="blocks per micro-batch")
    grad_accum: PositiveInt = 1
    seed: Seed = 0
    device: str = "auto"
    precision: Precision = Field(
        "float32",
        description="bfloat16 and float16: autocast over float32 weights, float16 with a loss scaler; bfloat16-pure:"
        " weights in bfloat16, their masters in the optimizer. Routers and losses are float32 in all of them",
    )
    compile: bool = Field(False, description="torch.compile of the model's step; one that fails is run eagerly")
    compile_backend: Literal["inductor", "aot_eager"] = Field(
        "inductor", description="aot_eager: the graphs alone, without generated code"
    )
    activation_checkpointing: bool = Field(
        False, description="keep each layer's input alone and compute the rest again in the backward pass"
    )
    prefetch: Annotated[int, Field(ge=0)] = Field(2, description="micro-batches read ahead by a thread; 0: none")
    async_checkpoint: bool = Field(
        False, description="write checkpoints in a thread, from a copy in memory; the last one never"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads; default: torch's own")
    deterministic: bool = False
    log_every: PositiveInt = 10
    eval_every: PositiveInt = 200
    check_every: PositiveInt = Field(50, description="steps between collapse checks")
    checkpoint_every: PositiveInt = 200
    keep_checkpoints: PositiveInt = Field(2, description="the newest so many are kept, and that of step 0")
    keep_best: bool = Field(
        True, description="keep that of the lowest held-out LM loss too; an evaluation that sets it saves one"
    )
    early_stop: bool = Field(False, description="end the run, with exit code 3, when a layer has collapsed")
    collapse: CollapseConfig = CollapseConfig()
    spike: SpikeConfig = Field(SpikeConfig(), description="what a sudden jump of the LM loss is answered with")
    halve_on_oom: bool = Field(
        False,
        description="out of memory: go on with half the micro-batch, twice as many of them (same tokens per step)",
    )
    allow_noncausal: bool = Field(
        False, description="train where later tokens change earlier outputs; every metric then carries a mark"
    )

    @field_validator("spike", mode="before")
    @classmethod
    def _spike(cls, value: Any) -> Any:
        return {"action": value} if isinstance(value, (str, bool)) else value

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> TrainConfig:
        if not self.compile and self.compile_backend != type(self).model_fields["compile_backend"].default:
            raise ValueError(f"train.compile_backend = {self.compile_backend} has no effect: train.compile is false")
        return self

"""What a run watches over: when a layer has collapsed, and what a sudden jump of the loss is answered with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from moectl.config.settings import Fraction, Positive, PositiveInt, Settings


class CollapseConfig(Settings):
    """When a layer counts as collapsed: by dominance, starvation, or a pair of experts that are one."""

    max_share: Fraction = Field(
        0.6,
        description="dominance: one expert takes more than this share of the tokens; where each would in an even load,"
        " more than halfway from that to all of them",
    )
    min_share_of_uniform: Fraction = Field(
        0.1, description="starvation: one expert gets less than this share of an even load"
    )
    min_expected_count: Positive = Field(
        100.0,
        description="assignments that an even load must give each expert before starvation or a pair is called: since"
        " the last check; for a pair in the step before it, and in those before earlier checks while that is too few",
    )
    max_together: Fraction = Field(
        0.9, description="pair: of the tokens that choose either of two experts, more than this share choose both"
    )
    max_cosine: Fraction = Field(
        0.99,
        description="pair: the weights of two experts have come above this cosine, having been twice as far from 1",
    )
    patience: PositiveInt = Field(3, description="checks in a row with one of these that make it a collapse")


class SpikeConfig(Settings):
    """The loss-spike rule: a step's LM loss above mean + std · (standard deviation) of the last ``window`` steps.

    Short form: the action alone.
    """

    action: Literal["off", "report", "skip", "rollback"] = Field(
        "report",
        description="skip: the step moves no weight; rollback: to the newest checkpoint, with the data that comes next",
    )
    std: Positive = Field(6.0, description="standard deviations above the mean that make a spike")
    window: Annotated[int, Field(ge=2)] = Field(
        50, description="steps that mean and deviation are taken over; before so many, nothing is a spike"
    )
    limit: PositiveInt = Field(
        3,
        description="skips or rollbacks after which the next spike fails the run, until a whole window of steps (not"
        " counting those done again) had none",
    )

    @field_validator("action", mode="before")
    @classmethod
    def _action(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> SpikeConfig:
        idle = {"off": ("std", "window", "limit"), "report": ("limit",)}.get(self.action, ())
        for key in idle:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise ValueError(f"train.spike.{key} = {value:g} has no effect: train.spike.action is {self.action}")
        return self

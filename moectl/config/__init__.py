"""What an experiment is, as strict data: schema, presets, loading. No torch here.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moectl.config.loading import load_config as load_config
    from moectl.config.loading import resolved_yaml as resolved_yaml
    from moectl.config.presets import PRESETS as PRESETS
    from moectl.config.schedule import Schedule as Schedule
    from moectl.config.schedule import ScheduleConfig as ScheduleConfig
    from moectl.config.schema import CapacityConfig as CapacityConfig
    from moectl.config.schema import CollapseConfig as CollapseConfig
    from moectl.config.schema import DataConfig as DataConfig
    from moectl.config.schema import EvalConfig as EvalConfig
    from moectl.config.schema import ExperimentConfig as ExperimentConfig
    from moectl.config.schema import ModelConfig as ModelConfig
    from moectl.config.schema import MoEConfig as MoEConfig
    from moectl.config.schema import OptimConfig as OptimConfig
    from moectl.config.schema import TrainConfig as TrainConfig

_HOME = {
    "CapacityConfig": "schema",
    "CollapseConfig": "schema",
    "DataConfig": "schema",
    "EvalConfig": "schema",
    "ExperimentConfig": "schema",
    "MoEConfig": "schema",
    "ModelConfig": "schema",
    "OptimConfig": "schema",
    "PRESETS": "presets",
    "Schedule": "schedule",
    "ScheduleConfig": "schedule",
    "TrainConfig": "schema",
    "load_config": "loading",
    "resolved_yaml": "loading",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"moectl.config.{_HOME[name]}"), name)
    raise AttributeError(f"module 'moectl.config' has no attribute {name!r}")

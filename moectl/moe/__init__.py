"""Pure tensor code: routers decide, dispatch moves, experts compute, losses judge, statistics describe."""

from moectl.moe.experts import Experts, GatedExperts, MLPExperts, register_backend
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router, RouterConfig
from moectl.moe.types import RouterOutput

__all__ = [
    "Experts",
    "GatedExperts",
    "MLPExperts",
    "MoELayer",
    "Router",
    "RouterConfig",
    "RouterOutput",
    "register_backend",
]

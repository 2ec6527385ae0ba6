"""Pure tensor code: routers decide, dispatch moves, experts compute, losses judge, statistics describe."""

from moectl.moe.capacity import Capacity
from moectl.moe.experts import Experts, GatedExperts, MLPExperts, register_backend
from moectl.moe.layer import MoELayer
from moectl.moe.router import Router, RouterConfig
from moectl.moe.token_choice import TokenChoiceOptions, TokenChoiceRouter
from moectl.moe.types import RouterOutput

__all__ = [
    "Capacity",
    "Experts",
    "GatedExperts",
    "MLPExperts",
    "MoELayer",
    "Router",
    "RouterConfig",
    "RouterOutput",
    "TokenChoiceOptions",
    "TokenChoiceRouter",
    "register_backend",
]

"""A plain function as a module: its arguments that are weights become parameters, by their names.

``def moe(x, gate_weight, gate_up_proj, down_proj, top_k)`` is called with the weights as Hugging Face lays them out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moectl.parity.candidate.calls import takes_input
from moectl.parity.candidate.settings import Settings, UnknownSetting
from moectl.parity.candidate.user_code import CandidateError
from moectl.parity.candidate.words import ffn_roles, is_router, plain

_SHAPES = {
    "router": ("num_experts", "hidden_size"),
    "gate_up": ("num_experts", "2F", "hidden_size"),
    "gate": ("num_experts", "moe_intermediate_size", "hidden_size"),
    "up": ("num_experts", "moe_intermediate_size", "hidden_size"),
    "down": ("num_experts", "hidden_size", "moe_intermediate_size"),
}


def as_module_class(function: Callable[..., Any]) -> Callable[..., Any]:
    """What builds a module: ``function`` itself where it does, or a module around it where it computes.

    Raises:
        CandidateError: an argument that is neither input, weight nor setting.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or not takes_input(parameters[0].name):
        return function

    def build(config: Settings) -> nn.Module:
        return FunctionModule(function, parameters, config)

    build.__name__ = function.__name__
    return build


class FunctionModule(nn.Module):
    """Calls ``function(x, *weights, **settings)``."""

    def __init__(self, function: Callable[..., Any], parameters: list[inspect.Parameter], config: Settings) -> None:
        super().__init__()
        self._function, self._settings, self._weights = function, dict[str, Any](), list[str]()
        self._first = parameters[0].name
        shapes: dict[str, tuple[int, ...]] = {each.name: (1, 1, 1) for each in parameters[1:]}
        roles = {name: role for name, (role, _) in ffn_roles({plain(n): s for n, s in shapes.items()}).items()}
        for each in parameters[1:]:
            try:
                self._settings[each.name] = config.lookup(each.name)
                continue
            except UnknownSetting:
                pass
            word = plain(each.name)
            role = "router" if is_router(word) and (word != "gate" or "up" not in roles.values()) else roles.get(word)
            if role in _SHAPES:
                sizes = [2 * config.moe_intermediate_size if s == "2F" else config.lookup(s) for s in _SHAPES[role]]
                self.register_parameter(each.name, nn.Parameter(torch.zeros(sizes)))
                self._weights.append(each.name)
            elif each.default is inspect.Parameter.empty:
                raise CandidateError(
                    f"{function.__name__}: nothing is known to give for '{each.name}'",
                    "Wrap it in an nn.Module whose parameters are its weights.",
                )

    def forward(self, x: torch.Tensor) -> Any:
        given = {name: getattr(self, name) for name in self._weights}
        return self._function(x, **given, **self._settings)

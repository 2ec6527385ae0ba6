"""Always-on experts: one MLP, as wide as all of them together. Shape suffixes: D hidden, F intermediate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moectl.moe.upcycle import Layout


class PlainMLP(nn.Module):
    """``down(gelu(up(x)))`` with biases, tanh-GELU: the shared experts of a GPT-2."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


@torch.no_grad()
def fill_shared(shared: nn.Module, layout: Layout | None) -> None:
    """Give shared experts their first weights.

    Args:
        shared: has ``up_proj`` and ``down_proj``, and ``gate_proj`` if gated.
        layout: what they are; None for fresh ones: as they were drawn, but with a zero ``down_proj``, so that
            they add nothing at first.
    """
    if layout is None:
        for name, parameter in shared.named_parameters():
            if name.startswith("down_proj"):
                nn.init.zeros_(parameter)
        return
    parts = {"down_proj.weight": layout["down_proj"]}
    if "gate_up_proj" in layout:
        parts["gate_proj.weight"], parts["up_proj.weight"] = layout["gate_up_proj"].chunk(2)
    else:
        parts["up_proj.weight"], parts["up_proj.bias"] = layout["up_proj"], layout["up_proj_bias"]
        parts["down_proj.bias"] = layout["down_proj_bias"]
    shared.load_state_dict(parts)

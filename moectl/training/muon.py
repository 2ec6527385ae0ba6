"""Muon for matrices and AdamW for all else, in one optimizer, with float32 masters of low-precision weights.

Muon moves a matrix by its momentum made orthogonal: all directions get the same step length. Jordan et al. 2024
(https://kellerjordan.github.io/posts/muon), with the update scaled to AdamW's size and decoupled weight decay of
Liu et al. 2025 (arXiv:2502.16982), so that one learning rate serves both. Each expert of a stacked parameter is a
matrix of its own; so are gate and up of ``gate_up_proj``, and query, key and value of GPT-2's ``c_attn``.

Shape suffixes: M, N rows and columns of one matrix; leading dimensions are a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of the quintic that lifts small singular values fastest; they end in about 0.7 to 1.2, not at 1."""
STEPS = 5
EPS = 1e-7
RMS = 0.2
"""Root mean square of AdamW's updates, to which Muon's are scaled."""
_TOGETHER = 1 << 26  # elements of which masters and float32 gradients are in the making at a time


def orthogonalised(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``U·S'·Vᵀ`` for each matrix ``U·S·Vᵀ`` of ``[*, M, N]``, S' within about 0.7 to 1.2; zeros stay zeros.

    Args:
        matrices: of any floating-point dtype.
        dtype: to multiply in. Default: bfloat16 on CUDA, as in the reference; else that of the input, at least
            float32.
    """
    if dtype is None:
        low = matrices.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32 if low else matrices.dtype
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(STEPS):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class MuonAdamW(Optimizer):
    """One optimizer step by group: Muon where the group says ``muon``, AdamW elsewhere.

    Where a parameter is bfloat16 or float16, its float32 ``master`` is part of its state: the master is what moves,
    and the parameter is a rounded copy of it.

    Args:
        groups: with ``lr``, ``weight_decay``, and for Muon ``muon: True`` and ``pieces``: for each parameter the
            dimension along which it is several matrices, and their number (``[1, 1]``: one).
        betas, eps: AdamW's.
        momentum: Muon's (Nesterov).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        # `fused`: where the step count lives, as torch's own fused AdamW has it (beside the parameter).
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(groups, {**defaults, "muon": False, "pieces": [], "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            (self._muon if group["muon"] else self._adamw)(group)

    def _adamw(self, group: dict[str, Any]) -> None:
        for parameters in _in_chunks([p for p in group["params"] if p.grad is not None]):
            states = [self._state(parameter) for parameter in parameters]
            moved = [self._exact(parameter) for parameter in parameters]
            for state, exact in zip(states, moved, strict=True):
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=exact.device)
                    state |= {key: torch.zeros_like(exact) for key in ("exp_avg", "exp_avg_sq")}
            adamw(
                moved,
                [p.grad.to(exact.dtype) for p, exact in zip(parameters, moved, strict=True) if p.grad is not None],
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            self._round(parameters)

    def _muon(self, group: dict[str, Any]) -> None:
        for parameter, (dim, count) in zip(group["params"], group["pieces"], strict=True):
            if parameter.grad is None:
                continue
            state, exact = self._state(parameter), self._exact(parameter)
            grad = parameter.grad.to(exact.dtype)
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(exact)
            momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(momentum, group["momentum"])
            exact.mul_(1 - group["lr"] * group["weight_decay"])
            parts = (tensor.chunk(count, dim) for tensor in (exact, update, grad))
            for matrix, direction, given in zip(*parts, strict=True):
                # An expert without a token stays where it is: its old momentum, made orthogonal, would be a whole step.
                moved = given.any(-1, keepdim=True).any(-2, keepdim=True)
                step = RMS * max(matrix.shape[-2:]) ** 0.5 * group["lr"]
                matrix.sub_(orthogonalised(direction) * moved, alpha=step)
            self._round([parameter])

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, with its master where it needs one."""
        state: dict[str, Any] = self.state[parameter]
        if parameter.dtype in (torch.bfloat16, torch.float16) and "master" not in state:
            state["master"] = parameter.detach().float()
        return state

    def _exact(self, parameter: Tensor) -> Tensor:
        """What moves: the master, or the parameter itself."""
        master: Tensor = self.state[parameter].get("master", parameter)
        return master

    def _round(self, parameters: list[Tensor]) -> None:
        masters = [(p, self.state[p]["master"]) for p in parameters if "master" in self.state[p]]
        if masters:
            torch._foreach_copy_(*map(list, zip(*masters, strict=True)))  # type: ignore[arg-type]


def _in_chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of some tens of millions of elements together, in order."""
    chunk: list[Tensor] = []
    for parameter in parameters:
        if chunk and sum(each.numel() for each in chunk) + parameter.numel() > _TOGETHER:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk

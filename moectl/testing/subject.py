"""The router under test: fresh copies of it, tokens for it, and ways to compare what it answers.

Everything is drawn from fixed seeds, so that a check gives the same answer every time.

Shape suffixes: B batch, S sequence, T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from moectl.config.loading import explain_validation
from moectl.moe.router import Router, at_least_float32
from moectl.moe.types import RouterOutput
from moectl.routers import RouterOptionError, build_router
from moectl.testing.results import Failure

BATCH, SEQUENCE = 4, 16
TOKENS = BATCH * SEQUENCE
#: Products over another number of rows round differently: in float64 by about 1e-15 of their size.
FLOAT64_TOLERANCE = 1e-9
#: Float32 sums of up to some hundred probabilities, each rounded by about 1e-7.
PROBABILITY_TOLERANCE = 1e-4
MODES = {"training": True, "eval": False}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generator at a fixed seed inside, and as it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Subject:
    """A router's class with the options to build it with.

    Args:
        spec: a name, ``path.py:Class``, or the class itself.
        hidden_size: ``D``.
        num_experts: ``E``.
        options: the router's own.
    """

    def __init__(
        self, spec: str | type[Router], *, hidden_size: int, num_experts: int, options: Mapping[str, Any]
    ) -> None:
        self.spec = spec
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.options = dict(options)
        self._raw: dict[tuple[bool, torch.dtype], RouterOutput] = {}

    def build(self, seed: int = 0) -> Router:
        """A fresh router with parameters drawn from ``seed``."""
        size = {"hidden_size": self.hidden_size, "num_experts": self.num_experts}
        with seeded(seed):
            if isinstance(self.spec, str):
                return build_router(self.spec, **size, **self.options)
            try:
                config = self.spec.Config.model_validate(self.options)
            except ValidationError as error:
                explained = explain_validation(error, self.spec.Config, noun="option", fallback="See its Config.")
                raise RouterOptionError(f"{self.spec.__name__}: {explained.message}", explained.hint) from error
            try:
                return self.spec(config, **size)
            except (TypeError, ValueError) as error:
                raise RouterOptionError(f"{self.spec.__name__}: {error}", "See its Config.") from error

    def router(self, *, train: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Router:
        """A fresh router in the given mode and dtype; the same one for the same arguments."""
        return self.build(seed).to(dtype).train(train)

    def tokens(self, dtype: torch.dtype = torch.float32, *, seed: int = 1, count: int = TOKENS) -> Tensor:
        """``[count, D]`` tokens from a standard normal."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.hidden_size, dtype=torch.float64, generator=generator).to(dtype)

    def raw(self, *, train: bool, dtype: torch.dtype = torch.float32) -> RouterOutput:
        """What ``route()`` itself returns for :meth:`tokens`, before the base class has looked at it."""
        if (train, dtype) not in self._raw:
            router = self.router(train=train, dtype=dtype)
            with seeded(2):
                self._raw[train, dtype] = router.route(at_least_float32(self.tokens(dtype)), None)
        return self._raw[train, dtype]


def plan(out: RouterOutput) -> Tensor:
    """The combine weights as ``[T, E]`` float64: what the layer's output depends on, whatever the order of slots.

    Of what ``forward()`` returned: there unused slots weigh 0.
    """
    plan_TE = torch.zeros(out.router_logits.shape, dtype=torch.float64)
    return plan_TE.scatter_add(1, out.topk_indices, out.topk_weights.detach().double())


def require_same_plan(got: RouterOutput | Tensor, expected: RouterOutput | Tensor, tolerance: float, what: str) -> None:
    """
    Raises:
        Failure: the combine weights of some token differ by more than ``tolerance``; starts with ``what``.
    """
    got_TE = got if isinstance(got, Tensor) else plan(got)
    expected_TE = expected if isinstance(expected, Tensor) else plan(expected)
    difference_T = (got_TE - expected_TE).abs().nan_to_num(nan=torch.inf).amax(dim=-1)
    wrong = int((difference_T > tolerance).sum())
    if wrong:
        token = int(difference_T.argmax())
        raise Failure(
            f"{what}: {wrong} of {len(difference_T)} tokens are routed otherwise, token {token} to"
            f" {_experts(got_TE[token])} and not to {_experts(expected_TE[token])}"
        )


def _experts(weights_E: Tensor) -> str:
    chosen = weights_E.nonzero().flatten().tolist()
    if not chosen:
        return "no expert"
    shown = ", ".join(f"{expert} ({weights_E[expert]:.4g})" for expert in chosen[:4])
    return f"{'expert' if len(chosen) == 1 else 'experts'} {shown}{', …' if len(chosen) > 4 else ''}"


def first_token(wrong: Tensor) -> int:
    """The first row of ``wrong`` (bool, tokens first) that holds a True."""
    return int(wrong.reshape(wrong.shape[0], -1).any(dim=-1).int().argmax())


def floats(out: RouterOutput) -> dict[str, Tensor]:
    """The floating-point fields of an output, by name."""
    return {name: value for name, value in out._asdict().items() if name not in ("topk_indices", "keep")}

"""Checks of what can be trained: gradients, and the router's own word on it.

Shape suffixes: B batch, S sequence, T tokens, D hidden, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moectl.testing.results import Failure, NotApplicable
from moectl.testing.subject import FLOAT64_TOLERANCE, TOKENS, Subject, floats, seeded


def gradient(subject: Subject) -> str:
    """The language-model loss reaches the gate, through the combine weights."""
    router = subject.router(train=True, dtype=torch.float64)
    with seeded(2):
        out = router(subject.tokens(torch.float64))
    upstream_TK = torch.randn(out.topk_weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    loss = (out.topk_weights * upstream_TK).sum()
    gate = _gradients(router, loss).get("weight") if loss.requires_grad else None
    if gate is not None and not bool(gate.isfinite().all()):
        raise Failure("the gradient of the gate (weight) is not finite")
    norm = 0.0 if gate is None else float(gate.norm())
    reached = norm > FLOAT64_TOLERANCE
    if not router.learns:
        if reached:
            raise Failure("it declares learns = False, but its gate (weight) gets a gradient")
        return "no learned gate, as declared"
    problem = router.training_problem()
    if not reached and problem is None:
        raise Failure(
            "no gradient reaches the gate (weight) through topk_weights, so that the language-model loss cannot teach"
            " it: keep the graph, or say so in training_problem() or with learns = False"
        )
    if not reached:
        raise NotApplicable(f"refused for training: {problem}")
    total = sum((value.sum() for value in floats(out).values() if value.requires_grad), loss)
    idle = [name for name, value in _gradients(router, total).items() if value is None]
    if idle:
        raise Failure(f"nothing it returns depends on its parameter {idle[0]}, which is trained all the same")
    return f"reaches the gate through topk_weights (norm {norm:.3g} over {TOKENS} tokens)"


def training_problem(subject: Subject) -> str:
    """It says when it must not be trained: a zero gate, at the least."""
    router = subject.router(train=True)
    problem = router.training_problem()
    if problem is not None and not (isinstance(problem, str) and problem.strip()):
        raise Failure(f"training_problem() returned {problem!r}, not a reason or None")
    if not router.learns:
        return "no learned gate, as declared" + (f"; refused for training: {problem}" if problem else "")
    with torch.no_grad():
        router.weight.zero_()
    if router.training_problem() is None:
        raise Failure(
            "a gate of zeros, which ties every token, is not refused: end training_problem() with"
            " super().training_problem()"
        )
    return f"refused for training: {problem}" if problem else "fit for training; a gate of zeros is refused"


def gradient_is_finite(subject: Subject, tokens_BSD: Tensor, mask_BS: Tensor | None) -> None:
    """
    Raises:
        Failure: a parameter's gradient is not, through any output that losses are made of.
    """
    router = subject.router(train=True, dtype=tokens_BSD.dtype)
    with seeded(2):
        out = router(tokens_BSD, mask_BS)
    # What losses are made of. Not the entropy: it is for reading, and its own gradient is infinite where p is 0.
    parts = [value for name, value in floats(out).items() if name != "entropy" and value.requires_grad]
    loss = sum((value.sum() for value in parts), torch.zeros(()))
    if loss.requires_grad:
        for name, gradient in _gradients(router, loss).items():
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise Failure(f"the gradient of {name} is not finite")


def _gradients(router: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    named = {name: value for name, value in router.named_parameters() if value.requires_grad}
    return dict(
        zip(named, torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True), strict=True)
    )

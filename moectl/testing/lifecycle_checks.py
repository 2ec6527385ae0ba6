"""Checks of a router's life: options, state, casts, the end of a step, and compilation.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError
from torch import Tensor

from moectl.moe.router import Router, RouterConfig
from moectl.moe.stats import expert_counts
from moectl.testing.results import Failure, NotApplicable
from moectl.testing.subject import FLOAT64_TOLERANCE, MODES, TOKENS, Subject, require_same_plan, seeded

_NO_SUCH = "no_such_option"


def builds(subject: Subject) -> str:
    """It can be built, with a gate of the right shape that is drawn anew each time."""
    router = subject.build()
    gate = getattr(router, "weight", None)
    shape = (subject.num_experts, subject.hidden_size)
    if not isinstance(gate, Tensor) or tuple(gate.shape) != shape:
        got = tuple(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
        raise Failure(f"its gate `weight` must be [E, D] = {list(shape)}, not {got}")
    _require_finite(router, "when built,")
    if router.learns and not gate.requires_grad:
        raise Failure("its gate `weight` requires no gradient: let it, or declare learns = False")
    if router.learns and torch.equal(gate, subject.build(seed=1).weight):
        raise Failure("its gate starts the same under every seed: draw it from torch's generator in reset_parameters()")
    parameters = sum(value.numel() for value in router.parameters())
    return f"{type(router).__name__} with {parameters:,} parameters, K = {router.slots} of E = {router.num_experts}"


def options(subject: Subject) -> str:
    """Options are strict and survive being written to a file."""
    config = subject.build().config
    cls = type(config)
    if not isinstance(config, RouterConfig):
        raise Failure(f"its config is a {cls.__name__}: derive Config from moectl.moe.router.RouterConfig")
    try:
        cls.model_validate({**subject.options, _NO_SUCH: 1})
    except ValidationError:
        pass
    else:
        raise Failure(
            "an unknown option is accepted in silence: derive Config from RouterConfig, and leave extra alone"
        )
    if cls.model_validate(config.model_dump(mode="json")) != config:
        raise Failure("its options do not come back from JSON as they were, so that a run's record would not hold them")
    known = ", ".join(cls.model_fields) or "none"
    return f"options: {known}; an unknown one is refused, and all come back from JSON"


def after_step(subject: Subject) -> str:
    """A few training steps end well: the load is taken, and what it moves stays finite."""
    router = trained(subject)
    _require_finite(router, "after three steps")
    if not torch.equal(router.weight, subject.build().weight):
        raise Failure("after_step() moved the gate, which is the optimizer's to move")
    moved = _moved_state(router, subject.build())
    router.step_tokens = 0
    router.after_step(torch.zeros(subject.num_experts, dtype=torch.int64))
    _require_finite(router, "after a step that loaded no expert")
    router.eval()(subject.tokens())
    return f"takes the load of each step; moves {', '.join(moved) if moved else 'nothing'}"


def _require_finite(router: Router, when: str) -> None:
    for name, value in (*router.named_parameters(), *router.named_buffers()):
        if not bool(value.isfinite().all()):
            raise Failure(f"{when} {name} is not finite")


def trained(subject: Subject, steps: int = 3) -> Router:
    """A router after some training steps as the trainer does them, its parameters left as they were drawn."""
    router = subject.router(train=True)
    router.set_schedule(10)
    for step in range(steps):
        with seeded(step):
            out = router(subject.tokens(seed=20 + step))
        router.step_tokens = TOKENS
        router.after_step(expert_counts(out.topk_indices, subject.num_experts, keep=out.keep))
    return router


def _moved_state(router: Router, fresh: Router) -> list[str]:
    before = fresh.state_dict()
    return [name for name, value in router.state_dict().items() if not torch.equal(value, before[name])]


def state(subject: Subject) -> str:
    """What it has learned is in its state, all of it."""
    router = trained(subject).eval()
    fresh = subject.build(seed=1).eval()
    fresh.load_state_dict({name: value.clone() for name, value in router.state_dict().items()})
    expected, got = router(subject.tokens()), fresh(subject.tokens())
    require_same_plan(got, expected, 0.0, "after state_dict() -> load_state_dict() into a fresh router")
    return f"a fresh router with its state_dict ({', '.join(router.state_dict())}) routes alike"


def buffers(subject: Subject) -> str:
    """Floating-point buffers stay float32 whatever the model is cast to."""
    own = {name: value.dtype for name, value in subject.build().named_buffers() if value.is_floating_point()}
    names = list(own)
    if not names:
        raise NotApplicable("no floating-point buffers")
    for name, dtype in own.items():
        if dtype != torch.float32:
            raise Failure(f"the buffer {name} is registered in {dtype}: register it in float32 (MOE041)")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        before, router = trained(subject), trained(subject).to(dtype)
        for name in names:
            value = router.get_buffer(name)
            if value.dtype != torch.float32 or not torch.equal(value, before.get_buffer(name)):
                raise Failure(f"after .to({dtype}) the buffer {name} is {value.dtype}, not float32 as it was")
    return f"{', '.join(names)}: float32 through .to(bfloat16), .to(float16) and .to(float64)"


def compiled(subject: Subject) -> str:
    """``torch.compile`` takes it in one graph.

    The backend traces and differentiates but generates no code, so that no C++ compiler is needed.
    """
    tokens_TD = subject.tokens()
    mask_T = torch.arange(TOKENS) % 5 != 0
    torch.compiler.reset()  # each router is one more specialisation of the same code, and there is a limit to them
    for mode, train in MODES.items():
        router = subject.router(train=train)
        graph = torch.compile(subject.router(train=train), fullgraph=True, backend="aot_eager")
        for mask in (None, mask_T):
            with seeded(2):
                expected = router(tokens_TD, mask)
            with seeded(2):
                got = graph(tokens_TD, mask)
            if not train:
                require_same_plan(got, expected, FLOAT64_TOLERANCE, f"compiled, in {mode}")
            if got.topk_weights.requires_grad:
                got.topk_weights.sum().backward()
    return "one graph, forward and backward, with and without a mask (fullgraph=True, backend aot_eager)"

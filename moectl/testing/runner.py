"""The checks in their order, run so that nothing a router does can end the run."""

from __future__ import annotations

import inspect
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from moectl.errors import MoectlError
from moectl.moe.router import Router, RouterError
from moectl.plugins import PluginError, is_file, load_router_class
from moectl.routers import RouterOptionError
from moectl.testing import behaviour_checks as behaviour
from moectl.testing import learning_checks as learning
from moectl.testing import lifecycle_checks as lifecycle
from moectl.testing import output_checks as output
from moectl.testing.results import Check, Failure, NotApplicable
from moectl.testing.subject import Subject, seeded

#: Name -> check. A check returns its evidence, or raises Failure or NotApplicable with it.
CHECKS: dict[str, Callable[[Subject], str]] = {
    "builds": lifecycle.builds,
    "options": lifecycle.options,
    "route": output.route,
    "shapes": output.shapes,
    "dtypes": output.dtypes,
    "indices": output.indices,
    "weights": output.weights,
    "probabilities": output.probabilities,
    "entropy": output.clean_entropy,
    "forward": output.forward,
    "gradient": learning.gradient,
    "training-problem": learning.training_problem,
    "determinism": behaviour.determinism,
    "padding": behaviour.padding,
    "empty-batch": behaviour.empty_batch,
    "one-token": behaviour.one_token,
    "decode": behaviour.decode,
    "ties": behaviour.ties,
    "extreme-logits": behaviour.extreme_logits,
    "low-precision": behaviour.low_precision,
    "causality": behaviour.causality,
    "after-step": lifecycle.after_step,
    "state": lifecycle.state,
    "buffers": lifecycle.buffers,
    "compile": lifecycle.compiled,
}
LOADS = "loads"
#: Without these holding, the checks after them could only fail for the same reason again.
GROUND = frozenset({LOADS, "builds", "route", "shapes", "dtypes", "forward"})


def run(
    router: str | type[Router], *, hidden_size: int, num_experts: int, options: Mapping[str, Any]
) -> tuple[Check, ...]:
    """Every check's outcome; after one of the ground fails, the rest is skipped.

    torch's generator, grad mode and the warning filters are left as they were.

    Raises:
        ConfigError: no such router, or options that it does not take.
        NotFoundError: no such file.
    """
    subject = Subject(router, hidden_size=hidden_size, num_experts=num_experts, options=options)
    done: list[Check] = []
    stopped = ""
    with warnings.catch_warnings(), _quiet(), seeded(0), torch.enable_grad():
        warnings.simplefilter("ignore")  # what a router warns of at ±80 is what was asked for
        for name, check in {LOADS: _loads, **CHECKS}.items():
            failed = [check.name for check in done if check.status == "failed"]
            outcome = Check(name, "skipped", stopped) if stopped else _run(name, check, subject, failed)
            done.append(outcome)
            if not stopped and name in GROUND and outcome.status != "ok":
                why = name if outcome.status == "failed" else failed[0]
                stopped = f"not run, because '{why}' failed"
    return tuple(done)


@contextmanager
def _quiet() -> Iterator[None]:
    """No log records below warnings: torch.compile writes thousands, which pytest shows when a test fails."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _run(name: str, check: Callable[[Subject], str], subject: Subject, failed: list[str]) -> Check:
    try:
        return Check(name, "ok", check(subject))
    except Failure as failure:
        return Check(name, "failed", str(failure))
    except NotApplicable as reason:
        return Check(name, "skipped", str(reason))
    except (Exception, SystemExit) as raised:  # a router's own code may raise anything
        error: BaseException = raised
        if name in (LOADS, "builds") and _is_users_doing(error):
            raise
        if name == "forward" and failed and isinstance(error, RouterError):
            return Check(name, "skipped", f"not run, because '{failed[0]}' failed")
        if name == "builds" and isinstance(error, RouterError) and error.__cause__ is not None:
            error = error.__cause__  # what the constructor itself raised
        return Check(name, "failed", f"raised {_explained(error)}{_place(error, subject)}")


def _loads(subject: Subject) -> str:
    """The class can be imported, and is a router."""
    spec = subject.spec
    try:
        cls: Any = load_router_class(spec) if isinstance(spec, str) else spec
    except PluginError as error:
        raise Failure(error.message) from error
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise Failure(f"{cls!r} is not a subclass of moectl.moe.Router")
    if inspect.isabstract(cls):
        raise Failure(f"{cls.__name__} does not implement {', '.join(sorted(cls.__abstractmethods__))}()")
    if isinstance(spec, str) and is_file(spec):
        return f"{cls.__qualname__} of {inspect.getfile(cls)}"
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_users_doing(error: BaseException) -> bool:
    """A misspelt name or option is the caller's to mend; a constructor that cannot be called is the router's."""
    if isinstance(error, RouterOptionError):
        return not isinstance(error.__cause__, TypeError)
    return isinstance(error, MoectlError) and not isinstance(error, RouterError)


def _explained(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _place(error: BaseException, subject: Subject) -> str:
    """Where in the router's own file it was raised, as `` (file.py:31)``, or nothing."""
    try:
        file = inspect.getfile(type(subject.build()))
    except (Exception, SystemExit):  # it cannot even be built: there is no place to name
        return ""
    seen: BaseException | None = error
    lines: list[int | None] = []
    while seen is not None:
        lines += [frame.lineno for frame in traceback.extract_tb(seen.__traceback__) if frame.filename == file]
        seen = seen.__cause__
    return f" ({file.rpartition('/')[2]}:{lines[-1]})" if lines else ""

"""``moectl doctor RUN|MODEL``: every check on one model, with one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moectl.doctor import behaviour_checks as behaviour
from moectl.doctor import routing_checks as routing
from moectl.doctor import training_checks as training
from moectl.doctor import weight_checks as weights
from moectl.doctor.model_subject import open_model
from moectl.doctor.report import Check, Checked, Finding, NotMade, Report, worst
from moectl.doctor.run_subject import open_run
from moectl.doctor.subject import Audited, seeded
from moectl.errors import CheckError, ConfigError, MoectlError, NotFoundError
from moectl.hf.opened import is_model_folder
from moectl.runs.find import find_run

NEWEST = "newest"


class Examination(NamedTuple):
    """One check: its stable name, what it looks for first, and how."""

    name: str
    code: str
    make: Callable[[Audited], Checked]


CHECKS: tuple[Examination, ...] = (
    Examination("loaded-whole", "MOE070", weights.loaded_whole),
    Examination("parameters-finite", "MOE072", weights.parameters_finite),
    Examination("outputs-finite", "MOE072", behaviour.outputs_finite),
    Examination("lm-gradient", "MOE032", training.lm_gradient),
    Examination("straight-through", "MOE032", training.straight_through),
    Examination("balance-gradient", "MOE046", training.balance_gradient),
    Examination("balance-pooled", "MOE038", routing.balance_pooled),
    Examination("router-logits", "MOE057", routing.logits_are_logits),
    Examination("zero-gate", "MOE034", weights.zero_gate),
    Examination("experts-differ", "MOE058", weights.experts_differ),
    Examination("dead-experts", "MOE060", routing.dead_experts),
    Examination("dropped-in-eval", "MOE028", routing.dropped_in_eval),
    Examination("router-dtype", "MOE027", weights.router_dtype),
    Examination("bias-dtype", "MOE041", weights.bias_dtype),
    Examination("router-decay", "MOE047", training.router_decay),
    Examination("trainable", "MOE059", training.trainable),
    Examination("padding-balance", "MOE036", behaviour.padding_balance),
    Examination("padding-outputs", "MOE061", behaviour.padding_outputs),
    Examination("causality", "MOE042", behaviour.causality),
    Examination("eval-deterministic", "MOE063", behaviour.eval_deterministic),
)


def examine(
    name: str,
    *,
    step: int | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, note: None,
) -> Report:
    """Look at one run or model folder.

    Args:
        name: a run's id, name, unique prefix or folder; ``newest``; or a folder with config.json and safetensors.
        step: of a run's checkpoint; None is its newest intact one.
        progress: told before every check.

    Raises:
        NotFoundError: no such run or folder, or a run without weights (exit 4).
        ConfigError: a folder that is neither; an unsupported architecture (exit 2).
        CheckError: no checkpoint of a run is intact; a model that cannot be run (exit 3).
        MoectlError: pickled or damaged weights of a model (exit 1).
    """
    with seeded():  # a model's weights are drawn before they are read
        return _examine(name, step, progress)


def _examine(name: str, step: int | None, progress: Callable[[float, float, str], None]) -> Report:
    subject, damaged = _open(name, step)
    _run_once(subject)
    made: list[tuple[Check, list[Finding]]] = []
    if damaged:
        made.append((Check("checkpoints", worst(damaged), f"{len(damaged)} damaged, passed over"), damaged))
    for number, examination in enumerate(CHECKS):
        progress(number, len(CHECKS), examination.name)
        made.append(make(examination, subject))
    layers = f"{len(subject.layers)} of {subject.layer_total} layers have experts" if subject.layers else "dense"
    return Report.of(subject.title, made, [layers, f"tokens: {subject.tokens.origin}", *subject.notes])


def _run_once(subject: Audited) -> None:
    """Raise CheckError where the model cannot be run at all: no check could say more."""
    try:
        _ = subject.seen
    except MoectlError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckError(
            f"{subject.title} cannot be run: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}",
            "Its config does not fit its code; --debug shows where it was raised.",
        ) from error


def make(examination: Examination, subject: Audited) -> tuple[Check, list[Finding]]:
    """One check's outcome. What keeps it from being made is its detail; a model that raises is a problem."""
    try:
        detail, findings = examination.make(subject)
    except NotMade as reason:
        return Check(examination.name, "not made", str(reason), examination.code), []
    except (MoectlError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        seen = f"the model raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        broken = Finding(None, "problem", None, seen, "It cannot be used so: mend what raised it; --debug says more.")
        return Check(examination.name, "problem", seen, None), [broken]
    code = findings[0].code if findings else examination.code
    return Check(examination.name, worst(findings), detail, code), findings


def _open(name: str, step: int | None) -> tuple[Audited, list[Finding]]:
    if not name.strip():
        raise ConfigError("the name is empty", "Name a run (`moectl runs ls`) or a model's folder.")
    given = Path(name).expanduser()
    try:
        folder = find_run(None) if name == NEWEST and not given.exists() else find_run(name)
    except NotFoundError:
        if not given.exists():
            if "/" in name:
                hint = "Name a run, or a folder that holds one or a model."
                raise NotFoundError(f"there is no folder {given}", hint) from None
            raise
        return _open_model(given, step), []
    return open_run(folder, step)


def _open_model(folder: Path, step: int | None) -> Audited:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file", f"Name its folder: moectl doctor {folder.parent}")
    if not is_model_folder(folder):
        there = sorted(entry.name for entry in folder.iterdir())
        shown = f"it holds {', '.join(there[:4])}{', …' if len(there) > 4 else ''}" if there else "it is empty"
        raise ConfigError(
            f"{folder} is neither a run (run.json) nor a model (config.json and safetensors): {shown}",
            "`moectl runs ls` shows the runs.",
        )
    if step is not None:
        raise ConfigError("--step is for runs: a model folder holds one set of weights", "Leave --step away.")
    return open_model(folder)

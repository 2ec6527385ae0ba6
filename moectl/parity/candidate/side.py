"""Somebody else's code as a side of the comparison.

:func:`load_candidate` imports it, builds it, maps the weights, finds out how it is called, and looks for what is wrong
with it apart from numbers. All guesses are kept to be shown.

Shape suffixes: B batch, S sequence, T = B·S tokens, D hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moectl.errors import unknown
from moectl.parity.adapter import Adapter, bound, load_adapter
from moectl.parity.candidate.built import Built, build, checked, guess_level, made, tiny_config
from moectl.parity.candidate.calls import Plan
from moectl.parity.candidate.expressions import Source
from moectl.parity.candidate.first_look import first_look
from moectl.parity.candidate.function_module import as_module_class
from moectl.parity.candidate.guess import Guess, Mapped
from moectl.parity.candidate.hooks import Learned
from moectl.parity.candidate.loading import load_object
from moectl.parity.candidate.problems import Problem, plain_tensors, unreachable_parts
from moectl.parity.candidate.run import Run
from moectl.parity.candidate.user_code import CandidateError, a_level
from moectl.parity.case import Case, Level, Reroute, Unsupported
from moectl.parity.families import family_name, formula_of, levels_of, random_weights
from moectl.parity.lift import lifted
from moectl.parity.tape import Tape

_KEPT = 3
_TIED = Problem(
    "MOE030",
    "the embedding is tied, or not, against the config",
    "",
    "Tie them if config.tie_word_embeddings, and only then.",
)
_OF_FLOAT64 = re.compile(r" fails on .*(\bDouble\b|float64)")


class Candidate:
    """A :class:`Subject <moectl.parity.case.Subject>`.

    Attributes:
        name: as the user gave it.
        family, level: of the comparison; ``level_guessed`` tells whether it was said.
        shown: facts for people: how it was built and called, what was found by trying, where tensors are read.
        mapping: the lines of the weight mapping, with what was assumed.
        extra_parameters: that no canonical weight belongs to, with the values that they keep.
        missing: canonical weights that nothing takes, with the number of entries.
        unclear: sentences on names that could mean several things.
        problems: what is wrong apart from numbers; grows as cases are run.
        refuses_float64: why it is compared in lower precision only, or None.
    """

    def __init__(self, name: str, cls: Callable[..., Any], adapter: Adapter, *, family: str) -> None:
        self.name, self.cls, self.adapter, self.family = name, cls, adapter, family
        self.level: Level = "model"
        self.level_guessed = False
        self.problems: list[Problem] = []
        self.learned = Learned()
        self.plan: Plan | None = None
        self.guess = Guess(())
        self.shown: dict[str, Any] = {}
        self.refuses_float64: str | None = None
        self._zeroed: frozenset[str] = frozenset()
        self.extra_parameters: dict[str, Tensor] = {}
        self._built: dict[str, Built] = {}
        adapter._guesses = self  # type: ignore[assignment]

    @property
    def mapping(self) -> tuple[Mapped, ...]:
        return self._first.guess.mapped

    @property
    def missing(self) -> dict[str, int]:
        return self._first.guess.missing

    @property
    def unclear(self) -> tuple[str, ...]:
        return self._first.guess.unclear

    def guessed_sources(self, module: nn.Module) -> Mapping[str, Source]:
        """What an adapter's ``super().weights()`` gives."""
        return self.guess.sources

    def run(self, case: Case, reroute: Reroute | None = None) -> Tape:
        """Compute the case.

        Raises:
            Unsupported: another component; inputs that it has no parameter for; routes that cannot be put in.
            CandidateError: it fails, or returns something else than the component does.
            AdapterError: the adapter fails.
        """
        if case.level != self.level:
            raise Unsupported(f"{self.name} is {a_level(self.level)}, not {a_level(case.level)}")
        if case.dtype == torch.float64 and self.refuses_float64 is not None:
            raise Unsupported(self.refuses_float64)
        with precision(case.dtype):
            built = self._for(case.config, case.dtype)
            self._judge_tying(built)
            built.load(case.weights, self._zeroed)
            built.module.train(case.training)
            return Run(self, built, case, reroute).tape()

    @contextmanager
    def zeroed(self, names: Collection[str]) -> Iterator[None]:
        """These of its ``extra_parameters`` at zero, in every run, until the context ends."""
        before, self._zeroed = self._zeroed, frozenset(names)
        try:
            yield
        finally:
            self._zeroed = before

    def _judge_tying(self, built: Built) -> None:
        """A head of its own where the config ties: a mistake if it asks whether to tie, otherwise not supported."""
        head = built.loose_head
        if head is not None and "tie_word_embeddings" not in built.asked:
            raise Unsupported(f"it never asks for tie_word_embeddings, and {head} is a matrix of its own (MOE030)")
        if head is not None:
            self.tell(_TIED._replace(evidence=f"tie_word_embeddings is true, and {head} is a matrix of its own"))
        elif built.guess.tied and self.level == "model" and not built.formula.tie_embeddings:
            names = " and ".join(built.guess.tied[0])
            self.tell(_TIED._replace(evidence=f"tie_word_embeddings is false, and {names} are one tensor"))

    def tell(self, problem: Problem) -> None:
        """Add a problem, once."""
        if all((problem.title, problem.code) != (known.title, known.code) for known in self.problems):
            self.problems.append(problem)

    def prepare(self, config: Mapping[str, Any], level: Level | None) -> None:
        """Build it small, map it, call it, and look for problems; in float32 if it refuses float64."""
        try:
            self._prepare(config, level, torch.float64)
        except CandidateError as error:
            if not _OF_FLOAT64.search(error.message):
                raise
            self.problems.clear()
            self._prepare(config, level, torch.float32)
            self.refuses_float64 = f"it refuses float64: {error.message.rpartition(' tokens: ')[2]}"

    def _prepare(self, config: Mapping[str, Any], level: Level | None, dtype: torch.dtype) -> None:
        with precision(dtype):
            self._refuse_hidden(config, dtype)
            self.level, self.level_guessed = self._level(config, level, dtype), level is None
            self._first = checked(self._for(config, dtype), self.level, own=_overrides(self.adapter, "weights"))
            module, formula = self._first.module, self._first.formula
            for problem in plain_tensors(module):
                self.tell(problem)
            self._first.load(random_weights(formula, self.level, seed=0, dtype=dtype, layer=_sparse(formula)))
            module.eval()
            first_look(self, self._first, dtype)
        self.extra_parameters = dict(self._first.initial)
        assert self.plan is not None
        self.shown = {
            "class": self.name,
            "level": self.level,
            "level_guessed": self.level_guessed,
            "built": self._first.shown,
            "called": f"forward({self.plan.shown})",
            "found_by_trying": list(self.plan.remarks),
            "routers": {path or type(module).__name__: str(read) for path, read in self.learned.readings.items()},
            "tensors": self._first.wiring.shown,
        }

    def _refuse_hidden(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Build it once to see whether all its weights can be reached."""
        formula = formula_of(self.family, config)
        bound(self.adapter, family=self.family, level="model", config=config, formula=formula, dtype=dtype)
        for problem in unreachable_parts(made(self.adapter, self.cls)):
            raise CandidateError(f"{self.name}: {problem.title}: {problem.evidence}", problem.hint)

    def _level(self, config: Mapping[str, Any], level: Level | None, dtype: torch.dtype) -> Level:
        levels = levels_of(self.family)
        if level is not None:
            if level not in levels:
                raise unknown(f"level of {self.family}", level, levels)
            return level
        if len(levels) == 1:
            return levels[0]
        return guess_level(made(self.adapter, self.cls), self.family, config, levels)

    def _for(self, config: Mapping[str, Any], dtype: torch.dtype) -> Built:
        key = json.dumps([config, str(dtype)], sort_keys=True, default=str)
        if key not in self._built:
            made = build(self.cls, self.adapter, family=self.family, level=self.level, config=config, dtype=dtype)
            while len(self._built) >= _KEPT:
                self._built.pop(next(iter(self._built)))
            self._built[key] = made
        built = self._built[key]
        self.guess = built.guess
        # One adapter serves them all, and was told last of whatever was built last.
        bound(self.adapter, family=self.family, level=self.level, config=config, formula=built.formula, dtype=dtype)
        return built


def load_candidate(
    spec: str,
    *,
    adapter: Path | None = None,
    family: str,
    level: Level | None = None,
    config: Mapping[str, Any] | None = None,
) -> Candidate:
    """Somebody's class, ready to be compared.

    Args:
        spec: ``package.module:Class`` or ``path/file.py:Class``.
        adapter: a file with a class ``Adapter``; None: everything is guessed.
        family: moectl's or transformers' name.
        level: what the class is; None: guessed from its parameters.
        config: for the first look, in the form of config.json; None: the family's tiny one.

    Raises:
        ConfigError: a wrong ``spec``, family or level.
        NotFoundError: no such module, file or class.
        CandidateError: it cannot be imported, built, mapped or called; the message says which, and where.
        AdapterError: the adapter fails.
    """
    name = family_name(family)
    found, _ = load_object(spec)
    candidate = Candidate(spec, _buildable(found, spec), load_adapter(adapter), family=name)
    candidate.prepare(tiny_config(name, config), level)
    return candidate


def precision(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Lifted in float64, as it is otherwise."""
    return lifted() if dtype == torch.float64 else nullcontext()


def _buildable(found: Any, spec: str) -> Callable[..., Any]:
    if isinstance(found, type) and issubclass(found, nn.Module):
        return found
    if inspect.isfunction(found):
        return as_module_class(found)
    if isinstance(found, nn.Module):
        raise CandidateError(
            f"{spec} is a module that is built already: a {type(found).__name__}",
            "Name its class; moectl builds it at the sizes of the comparison.",
        )
    what = (
        f"the class {found.__name__} is not a subclass of nn.Module"
        if isinstance(found, type)
        else f"it is of type {type(found).__name__}"
    )
    raise CandidateError(
        f"{spec} cannot be compared: {what}", "Name a subclass of torch.nn.Module, or a function of a tensor."
    )


def _overrides(adapter: Adapter, method: str) -> bool:
    return getattr(type(adapter), method) is not getattr(Adapter, method)


def _sparse(formula: Any) -> int:
    return formula.moe_layers[0] if formula.moe_layers else 0

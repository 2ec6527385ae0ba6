"""A whole comparison: which probes, at which level, in which dtype, of which candidate; and what came of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moectl.errors import ConfigError, MoectlError, unknown
from moectl.parity.candidate.problems import Problem
from moectl.parity.case import Level, Subject, Unsupported
from moectl.parity.contest import Contest, contest
from moectl.parity.diagnosis.diagnose import Diagnosis, diagnose
from moectl.parity.diagnosis.low_precision import missing_casts
from moectl.parity.families import family_name, formula_of, levels_of
from moectl.parity.layer_only import LayerOnly, layer_only
from moectl.parity.own import Own
from moectl.parity.probes import Bench, Probe, probes_named
from moectl.parity.reference import FormulaSubject
from moectl.parity.results import ProbeResult, Report, Skipped
from moectl.parity.source import Source, check_size, open_source, parameter_count
from moectl.parity.standard import Standards
from moectl.parity.tolerance import dtypes_named

#: ``progress(done, total, note)``.
Progress = Callable[[float, float, str], object]
CAST_HINT = "Compute it in float32: x.float() first, and back to x.dtype at its end."
#: A diagnosis computes every hypothesis on each case.
DIAGNOSED_CASES = 3
#: Parameters up to which products are too small to be shared between threads.
ONE_THREAD = 4_000_000


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        family: name or model type.
        config: ``tiny``, ``published``, a config.json, or a folder with config and weights.
        dtypes: names, or ``all``.
        probes: names; none for all.
        level: one component; None for all that the family has, or the candidate's own.
        seed: of weights and inputs.
        candidate: ``package.module:Class`` or ``path.py:Class``; None for moectl's own code.
        adapter: how to build and read the candidate, where that cannot be guessed.
    """

    family: str
    config: str = "tiny"
    dtypes: tuple[str, ...] = ("all",)
    probes: tuple[str, ...] = ()
    level: Level | None = None
    seed: int = 0
    candidate: str | None = None
    adapter: Path | None = None


class _Task(NamedTuple):
    """One probe to run."""

    probe: Probe
    dtype: torch.dtype
    level: Level
    subject: Subject


def compare_hf(
    request: Request, *, subjects: Sequence[Subject] | None = None, progress: Progress | None = None
) -> Report:
    """Compare, probe by probe.

    Args:
        request: what.
        subjects: whom, in place of the request's candidate.
        progress: told after every probe.

    Raises:
        ConfigError: an unknown family, level, probe or dtype; nothing to compare.
        MoectlError: the candidate cannot be loaded, or fails whatever it is given.
    """
    started = time.perf_counter()
    family, levels = family_name(request.family), levels_asked(request)
    wanted, dtypes = probes_named(request.probes), dtypes_named(request.dtypes)
    source = open_source(family, request.config)
    sides = list(subjects) if subjects is not None else _subjects(request, source)
    own_levels: set[str] = {side.level for side in sides if hasattr(side, "level")}
    levels = tuple(level for level in levels if not own_levels or level in own_levels)
    if not levels:
        raise ConfigError(
            f"the candidate is a {min(own_levels)}, and --level asks for a {request.level}",
            "Leave --level out, or name the class that is of that level.",
        )
    check_size(source, levels[0])
    tasks = list(_tasks(wanted, dtypes, levels, sides, FormulaSubject(family, replace_casts, name=ANCHOR)))
    if not tasks:
        raise ConfigError(
            "no probe is left to run", "Widen --probe, --dtype or --level: `moectl compare-hf --list-probes`."
        )
    with _few_threads(source, levels[0]):
        session = _Session(source, request.seed)
        results, skipped = session.run(tasks, progress or (lambda done, total, note: None))
        _raise_if_hopeless(results)
        report = Report(family, _header(request, source, sides, levels), tuple(results), tuple(skipped))
        diagnosis = _diagnosis(report, family, sides)
        casts = list(_missing_casts(report, family, sides))
    problems = [*(problem for side in sides for problem in getattr(side, "problems", ())), *casts]
    return replace(
        report,
        diagnosis=diagnosis,
        problems=tuple(problem._asdict() for problem in problems),
        guessed=next((_guessed(side) for side in sides if hasattr(side, "mapping")), None),
        seconds=time.perf_counter() - started,
    )


ANCHOR = "our formula with Hugging Face's casts"


def replace_casts(formula: Any) -> Any:
    """The formula that rounds where Hugging Face does."""
    return replace(formula, casts="reference")


@contextmanager
def _few_threads(source: Source, level: Level) -> Iterator[None]:
    """One thread for a small model: on a busy machine, waiting for the second takes ten times as long as the work."""
    before = torch.get_num_threads()
    if parameter_count(source, level) < ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def levels_asked(request: Request) -> tuple[Level, ...]:
    """The components to compare, the largest first.

    Raises:
        ConfigError: unknown family, or a level that it has not.
    """
    levels = levels_of(request.family)
    if request.level is None:
        return levels
    if request.level not in levels:
        raise unknown("level", request.level, levels)
    return (request.level,)


class _Session:
    """Benches and standards are shared by all probes."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self.standards = Standards(source.family)
        self.benches: dict[tuple[Level, torch.dtype], Bench] = {}

    def run(self, tasks: Sequence[_Task], progress: Progress) -> tuple[list[ProbeResult], list[Skipped]]:
        results: list[ProbeResult] = []
        skipped: list[Skipped] = []
        enough: set[tuple[str, torch.dtype, str]] = set()
        for number, task in enumerate(tasks):
            asked = (task.probe.name, task.dtype, task.subject.name)
            if asked in enough:
                continue
            progress(number, len(tasks), f"{task.probe.name}, {task.level}")
            for outcome in self._run(task):
                if isinstance(outcome, Skipped):
                    skipped.append(outcome)
                    continue
                results.append(outcome)
                if task.probe.largest_only:
                    enough.add(asked)
        progress(len(tasks), len(tasks), "")
        return results, skipped

    def _run(self, task: _Task) -> Iterator[ProbeResult | Skipped]:
        where = (task.probe.name, task.dtype, task.level, task.subject.name)
        contests: list[Contest] = []
        if task.probe.of_code and isinstance(task.subject, FormulaSubject):
            yield Skipped(*where, "it asks about code, and this is a formula")
            return
        try:
            for case in task.probe.build(self._bench(task.level, task.dtype)):
                standard = self.standards.standard(case, lifted=task.probe.sides == "candidate")
                contests.append(contest(case, task.subject, standard))
        except Unsupported as reason:
            yield Skipped(*where, str(reason))
            return
        for each in contests:
            if each.unsupported:
                yield Skipped(*where, each.unsupported)
                break
        answered = tuple(each for each in contests if not each.unsupported)
        if answered:
            yield ProbeResult(*where, answered)

    def _bench(self, level: Level, dtype: torch.dtype) -> Bench:
        if (level, dtype) not in self.benches:
            bench = Bench(self.source.family, level, self.source.config, self.seed, dtype)
            bench.given = self.source.weights(level, dtype, bench.layer)
            self.benches[level, dtype] = bench
        return self.benches[level, dtype]


def _tasks(
    wanted: Sequence[Probe],
    dtypes: Sequence[torch.dtype],
    levels: Sequence[Level],
    sides: Sequence[Subject],
    anchor: Subject,
) -> Iterator[_Task]:
    for probe in wanted:
        asked = [level for level in levels if level in probe.levels]
        for dtype in dtypes:
            for level in asked:
                if dtype in probe.dtypes:
                    for side in sides if probe.sides == "candidate" else (anchor,):
                        yield _Task(probe, dtype, level, side)


def _subjects(request: Request, source: Source) -> list[Subject]:
    if request.candidate is not None:
        from moectl.parity.candidate.side import load_candidate

        family = source.family
        given: dict[str, Any] = {
            "adapter": request.adapter,
            "family": family,
            "level": request.level,
            "config": source.config,
        }
        return [load_candidate(request.candidate, **given)]
    if source.family == "qwen3":
        return [Own("qwen3")]
    return [Own(source.family), FormulaSubject(source.family, name="moectl's formula")]


def _guessed(candidate: Any) -> dict[str, Any]:
    """How a candidate was understood."""
    return {
        **candidate.shown,
        "weights": [{"name": line.name, "from": str(line.source), "remark": line.remark} for line in candidate.mapping],
        "extra_parameters": list(candidate.extra_parameters),
        "missing": dict(candidate.missing),
        "unclear": list(candidate.unclear),
    }


def compare_layer(family: str, config: str, seed: int = 0) -> tuple[Source, LayerOnly]:
    """One layer of true size, see :mod:`moectl.parity.layer_only`; a checkpoint's first with experts.

    Raises:
        ConfigError: a family whose decoder layer moectl has not, or a config that does not fit.
    """
    source = open_source(family_name(family), config)
    formula = formula_of(source.family, source.config)
    layer = formula.moe_layers[0] if formula.moe_layers else 0
    weights = None if source.tensors is None else source.tensors.part(f"model.layers.{layer}.")
    try:
        return source, layer_only(source.family, config=source.config, seed=seed, weights=weights)
    except Unsupported as reason:
        raise ConfigError(str(reason), "moectl compare-hf --list shows what can be compared.") from None


def _raise_if_hopeless(results: Sequence[ProbeResult]) -> None:
    """A candidate that fails at everything has one fault, and it is told once."""
    contests = [each for result in results for each in result.contests]
    failures = [each.failure for each in contests if each.failure is not None]
    if contests and len(failures) == len(contests) and len({failure.message for failure in failures}) == 1:
        raise failures[0]


def _missing_casts(report: Report, family: str, sides: Sequence[Subject]) -> Iterator[Problem]:
    """What is within every bound in bfloat16, and yet less exact than the reference: told by its bits, once each."""
    told = set()
    by_name = {side.name: side for side in sides}
    for result in report.results:
        side = by_name.get(result.candidate)
        if side is None or result.dtype != torch.bfloat16:
            continue
        for each in result.contests:
            found = () if each.tape is None else missing_casts(side, family, each.case, each.tape)
            for finding in found:
                if (side.name, finding.codes) not in told:
                    told.add((side.name, finding.codes))
                    yield Problem(finding.codes[0], finding.title, finding.evidence, CAST_HINT)


def _diagnosis(report: Report, family: str, sides: Sequence[Subject]) -> Diagnosis | None:
    """Of the first candidate that differs, on the cases of the component and dtype in which it first does."""
    broken = [result for result in report.broken if result.first is not None and result.dtype != torch.bfloat16]
    side = next((side for result in broken for side in sides if side.name == result.candidate), None)
    if side is None:
        return None
    mine = [result for result in broken if result.candidate == side.name]
    exact = [result for result in mine if result.dtype == torch.float64] or mine
    chosen = [
        each
        for result in exact
        if result.level == exact[0].level
        for each in result.contests
        if not each.ok and each.tape is not None
    ][:DIAGNOSED_CASES]
    tapes = [each.tape for each in chosen if each.tape is not None]
    try:
        return diagnose(side, family, [each.case for each in chosen], tapes)
    except (MoectlError, Unsupported) as error:
        return Diagnosis((), f"the diagnosis itself failed: {error}", 0, ())


def _header(request: Request, source: Source, sides: Sequence[Subject], levels: Sequence[Level]) -> dict[str, Any]:
    from moectl.runs.provenance import collect

    provenance = collect()
    versions = provenance.versions
    keys = ("moectl", "python", "torch", "transformers")
    formula, threads = formula_of(source.family, source.config), torch.get_num_threads()
    shape = {
        "layers": formula.num_layers,
        "hidden": formula.experts.hidden_size,
        "experts": formula.router.num_experts,
        "chosen": formula.router.top_k,
        "expert size": formula.experts.intermediate_size,
    }
    return {
        "reference": "Hugging Face transformers, eager attention and experts",
        "candidates": [side.name for side in sides],
        "versions": {name: versions[name] for name in keys if name in versions},
        "commit": provenance.source_commit,
        "dirty": provenance.source_dirty,
        "device": f"cpu ({platform.machine()}), {threads} thread{'s' * (threads != 1)}",
        "seed": request.seed,
        "config": source.text,
        "shape": shape,
        "levels": list(levels),
    }

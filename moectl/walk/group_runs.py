"""The runs of a group, each in a process of its own, so many at a time: one that dies takes no other with it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moectl.runs.groups import Group, Member
from moectl.runs.lock import FileLock
from moectl.training.interrupt import StopRequest
from moectl.walk.budget import dollars, spent_before, used_up
from moectl.walk.children import Child, wait

ENDED = ("finished", "collapsed")
_TICK_S = 0.25
_OTHERS_S = 60.0  # patience with a run that another process is writing, as one whose group was killed just now


@dataclass(frozen=True)
class Job:
    """A member that is to run: its config's file, and its number of steps."""

    member: Member
    config: Path
    steps: int


@dataclass(frozen=True)
class GroupTerms:
    """What the group's runs may cost, in US dollars: an hour, all of them together, and each."""

    price_per_hour: float | None = None
    max_cost: float | None = None
    max_cost_per_run: float | None = None


@dataclass(frozen=True)
class Slot:
    """A place to run in: what its processes' environment has over ours, and the share of a device that it is."""

    environment: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0
    threads: int | None = None


@dataclass
class Running:
    """A job that has its process."""

    job: Job
    child: Child
    slot: Slot
    spent: float
    step: int = 0
    note: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Where the group is, for a progress bar: optimizer steps, and the runs that go on just now."""

    steps: int
    of_steps: int
    ended: int
    runs: int
    cost: float | None
    running: Sequence[tuple[str, int, int, Mapping[str, float]]]


class GroupRuns:
    """Runs jobs until none is left, or until there is a reason to stop.

    Args:
        group: its lock held.
        members: all of the group, whose cost counts, too.
        slots: one for each run at a time.
        spec: what every process is told, beside its config: data, command, commit.
        say: takes a sentence for the user.
        progress: told where the group is, several times a second.

    Attributes:
        stopped: why the group ended before its time; None if it did not.
        troubles: by run, what went wrong with its process in this sitting.
    """

    def __init__(
        self,
        group: Group,
        members: Sequence[Member],
        *,
        slots: Sequence[Slot],
        terms: GroupTerms,
        spec: Mapping[str, Any],
        say: Callable[[str], None],
        progress: Callable[[Report], None],
    ) -> None:
        self.group, self.terms, self.spec = group, terms, spec
        self.say, self.progress = say, progress
        self.stopped: str | None = None
        self.troubles: dict[str, str] = {}
        self._free = list(reversed(slots))
        self._running: list[Running] = []
        self._spent = {member.run: self._spent_on(member) for member in members}
        self._steps: dict[str, int] = {}
        self._said: set[str] = set()
        self._since = time.monotonic()  # something last happened

    def run(self, jobs: Sequence[Job], *, done_before: Sequence[Job] = ()) -> None:
        """Run ``jobs`` in order; the steps of those done before count as progress only."""
        queue = deque(jobs)
        everything = [*done_before, *jobs]
        self._steps = {job.member.run: job.steps for job in done_before}
        stop = StopRequest()
        try:
            with stop:
                while queue or self._running:
                    self._stop_if(stop.reason)
                    if self.stopped is not None:
                        queue.clear()
                    self._start_some(queue)
                    wait([running.child for running in self._running], _TICK_S)
                    self._listen()
                    self.progress(self._report(everything))
        except KeyboardInterrupt:
            for running in self._running:
                running.child.stop("stopped by SIGINT")
            raise
        finally:
            for running in self._running:
                running.child.close()
        if self.stopped is None:
            self._stop_if(stop.reason)

    @property
    def cost(self) -> float | None:
        """US dollars of all runs of the group up to now; None without a price."""
        if self.terms.price_per_hour is None:
            return None
        live = {running.job.member.run: self._live_cost(running) for running in self._running}
        return sum({**self._spent, **live}.values())

    def _live_cost(self, running: Running) -> float:
        price = self.terms.price_per_hour or 0.0
        return running.spent + dollars(time.monotonic() - running.child.began, price, running.slot.share)

    def _spent_on(self, member: Member) -> float:
        run = member.opened()
        return 0.0 if run is None else spent_before(run, self.terms.price_per_hour).cost or 0.0

    def _stop_if(self, reason: str | None) -> None:
        cost, limit = self.cost, self.terms.max_cost
        if reason is None and limit is not None and cost is not None and cost >= limit:
            reason = used_up(limit, cost, self.terms.price_per_hour, "the group's")
        if reason is None or self.stopped is not None:
            return
        self.stopped = reason
        if self._running:
            self.say(f"{reason}: waiting for {len(self._running)} to write a checkpoint")
        for running in self._running:
            running.child.stop(reason)

    def _start_some(self, queue: deque[Job]) -> None:
        """Fill the free slots with jobs that no other process is at."""
        busy: list[Job] = []
        while queue and self._free:
            job = queue.popleft()
            run = job.member.opened()
            if run is not None and run.live:
                busy.append(job)
                self._once(f"{job.member.run} is being written by {FileLock(run.path / '.lock').holder()}: waiting")
            else:
                self._start(job, self._free.pop())
        if busy and not self._running and time.monotonic() - self._since > _OTHERS_S:
            for job in busy:
                holder = FileLock(job.member.folder / ".lock").holder()
                self.troubles[job.member.run] = f"it is being written by {holder}"
            busy = []
        queue.extendleft(reversed(busy))

    def _start(self, job: Job, slot: Slot) -> None:
        member = job.member
        run = member.opened()
        environment = dict(slot.environment)
        # One that goes on keeps its number of threads: sums round otherwise with another.
        threads = slot.threads if run is None else run.record.get("threads") or slot.threads
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        spec = {
            **self.spec,
            "config": str(job.config),
            "group": {"name": self.group.name, "variant": member.variant},
            "terms": {
                "price_per_hour": self.terms.price_per_hour,
                "max_cost": self.terms.max_cost_per_run,
                "share": slot.share,
            },
        }
        logs = self.group.folder / "logs"
        logs.mkdir(exist_ok=True)
        child = Child(spec, environment=environment, log=logs / f"{member.run}.log")
        self._running.append(Running(job, child, slot, self._spent_on(member)))
        self._since = time.monotonic()

    def _listen(self) -> None:
        for running in list(self._running):
            over = running.child.over  # before the last messages are read
            for message in running.child.messages():
                self._hear(running, message)
            if over:
                self._running.remove(running)
                self._ended(running)

    def _hear(self, running: Running, message: Mapping[str, Any]) -> None:
        kind, run = message["kind"], running.job.member.run
        if kind == "say":
            self._once(message["text"], run)
        elif kind == "begun":
            self.say(f"{run}: {message['steps']:,} steps")
        elif kind == "step":
            running.step, running.note = int(message["step"]), message["values"]

    def _ended(self, running: Running) -> None:
        member, ending = running.job.member, running.child.ending
        running.child.close()
        self._free.append(running.slot)
        self._spent[member.run] = self._spent_on(member)
        self._steps[member.run] = running.step
        self._since = time.monotonic()
        if ending is None:
            self.troubles[member.run] = running.child.death
            self.say(f"{member.run}: {running.child.death}; see {running.child.log}")
        elif ending["kind"] == "error":
            if self.stopped is None:
                self.troubles[member.run] = ending["message"]
            self.say(f"{member.run}: {ending['message']}" + (f" ({ending['hint']})" if ending["hint"] else ""))
        else:
            cost = self.cost
            spent = "" if cost is None else f" · the group: {cost:.2f} dollars"
            self.say(f"{member.run}: {ending['status']} at step {ending['step']:,} ({ending['reason']}){spent}")

    def _once(self, text: str, run: str = "") -> None:
        """Say a sentence, but not again for every run."""
        if text not in self._said:
            self._said.add(text)
            self.say(f"{run}: {text}" if run else text)

    def _report(self, jobs: Sequence[Job]) -> Report:
        steps = {**self._steps, **{running.job.member.run: running.step for running in self._running}}
        return Report(
            steps=sum(steps.values()),
            of_steps=sum(job.steps for job in jobs),
            ended=len(self._steps),
            runs=len(jobs),
            cost=self.cost,
            running=[(r.job.member.run, r.step, r.job.steps, r.note) for r in self._running],
        )

"""Experts side by side on the cores of a CPU, each core multiplying by itself.

A product of tens of rows is too small to be shared by all cores: they wait for each other more than
they compute. Given an expert each, they do not wait, and the weights stream in from memory at the
speed of all cores together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier, Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Multiplications per item, on average, below which threads wait for the interpreter more than they compute.
WORTHWHILE = 1.0e8
#: How much more than its share the busiest core may have; beyond that all cores work on one product at a time.
UNEVEN = 1.25


def shares(items: Sequence[Item], costs: Sequence[float]) -> list[list[Item]]:
    """The items dealt to as many groups as torch has threads, as evenly as the dearest-first rule makes it.

    One group when they cannot be dealt evenly or are not worth it. The same items, costs and thread
    count give the same groups, in the same order: sums over groups round alike in every run.
    """
    threads, total = torch.get_num_threads(), sum(costs)
    if threads == 1 or len(items) < threads or total < WORTHWHILE * len(items):
        return [list(items)]
    groups: list[list[int]] = [[] for _ in range(threads)]
    loads = [0.0] * threads
    for index in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        groups[least].append(index)
        loads[least] += costs[index]
    if max(loads) > UNEVEN * total / threads:
        return [list(items)]
    return [[items[index] for index in sorted(group)] for group in groups]


def side_by_side(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all tasks, in their order; several run at once, without gradients, one thread each.

    Where torch has one thread (inside a task, too) they run one after the other. What a task raises
    reaches the caller once no task runs any more. A Python thread whose first use of torch falls into a
    call takes over one thread as its own setting: torch has no setting for the calling thread alone.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def elsewhere(task: Callable[[], Result]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to a thread
            return task()

    with torch.no_grad():
        if len(tasks) == 1 or threads == 1:
            return [task() for task in tasks]
        others = _start([partial(elsewhere, task) for task in tasks[1:]])
        torch.set_num_threads(1)
        try:
            return [tasks[0](), *(other.result() for other in others)]
        finally:
            wait(others)
            torch.set_num_threads(threads)


_pool: tuple[int, ThreadPoolExecutor] | None = None
_lock = Lock()


def _start(tasks: Sequence[Callable[[], Result]]) -> list[Future[Result]]:
    """Hand the tasks to a pool of at least as many threads, shared by all callers."""
    global _pool
    with _lock:  # until all are handed over: another caller may replace the pool
        if _pool is None or _pool[0] < len(tasks):
            grown = _started_pool(len(tasks))
            if _pool is not None:
                _pool[1].shutdown(wait=False)  # what it was given, it finishes
            _pool = len(tasks), grown
        return [_pool[1].submit(task) for task in tasks]


def _started_pool(number: int) -> ThreadPoolExecutor:
    """A pool of this many threads, all started, so that what they do to torch's settings at their start is over."""
    threads = torch.get_num_threads()
    barrier = Barrier(number + 1)
    pool = ThreadPoolExecutor(number, "moectl-experts", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for _ in range(number):
            pool.submit(barrier.wait)
        barrier.wait()
    except BaseException:  # no more threads to be had: those that wait must not wait for ever
        barrier.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(threads)  # a worker's own setting is also the default of threads to come
    return pool


def _forget() -> None:
    """Threads do not survive a fork."""
    global _pool, _lock
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

"""Experts side by side on the cores of a CPU, each core multiplying by itself.

A product of tens of rows is too small to be shared by all cores: they wait for each other more than
they compute. Given an expert each, they do not wait, and the weights stream in from memory at the
speed of all cores together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Multiplications below which handing work to other threads costs more than it saves.
WORTHWHILE = 2.0e7
#: How much more than its share the busiest core may have; beyond that all cores work on one product at a time.
UNEVEN = 1.25


def shares(items: Sequence[Item], costs: Sequence[float]) -> list[list[Item]]:
    """The items dealt to as many groups as torch has threads, as evenly as the dearest-first rule makes it.

    One group when they cannot be dealt evenly or are not worth it. The same items, costs and thread
    count give the same groups, in the same order: sums over groups round alike in every run.
    """
    threads, total = torch.get_num_threads(), sum(costs)
    if threads == 1 or total < WORTHWHILE or len(items) < threads:
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
    """The results of all tasks, in their order; more than one run at once, without gradients, one thread each."""
    if len(tasks) == 1:
        return [tasks[0]()]
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(task: Callable[[], Result]) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to a thread
            return task()

    pool = _workers(len(tasks) - 1)
    torch.set_num_threads(1)
    try:
        others = [pool.submit(alone, task) for task in tasks[1:]]
        return [alone(tasks[0]), *(other.result() for other in others)]
    finally:
        torch.set_num_threads(threads)


_pool: tuple[int, ThreadPoolExecutor] | None = None
_lock = Lock()


def _workers(number: int) -> ThreadPoolExecutor:
    """A pool of this many threads, all started: what they do to torch's settings at their start is over."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] < number:
            if _pool is not None:
                _pool[1].shutdown(wait=True)
            barrier = Barrier(number + 1)
            pool = ThreadPoolExecutor(number, "moectl-experts", initializer=torch.set_num_threads, initargs=(1,))
            for _ in range(number):
                pool.submit(barrier.wait)
            barrier.wait()
            _pool = number, pool
        return _pool[1]


def _forget() -> None:
    """Threads do not survive a fork."""
    global _pool, _lock
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

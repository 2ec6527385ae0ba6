"""Dealing work to threads, running it there, and the experts' numbers with two threads."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moectl.moe import Experts, expert_ops, parallel
from moectl.moe.dispatch import Dispatch, dispatch
from moectl.moe.parallel import UNEVEN, WORTHWHILE, shares, side_by_side
from tests.moe.reference import EXPERTS, by_hand


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_threads(number: int, call: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


# --- shares -------------------------------------------------------------------------------------------

costs_of_items = st.lists(st.floats(0.0, 10 * WORTHWHILE), max_size=24)
thread_counts = st.integers(1, 5)


@given(costs=costs_of_items, threads=thread_counts)
def test_shares_are_a_partition_in_order_and_even_or_one_group(costs: list[float], threads: int) -> None:
    items = list(range(len(costs)))
    groups = with_threads(threads, lambda: shares(items, costs))
    assert isinstance(groups, list)
    assert sorted(item for group in groups for item in group) == items
    assert all(group == sorted(group) for group in groups)
    assert groups == with_threads(threads, lambda: shares(items, costs))
    assert len(groups) in (1, threads)
    if len(groups) > 1:
        assert all(groups)
        assert sum(costs) >= WORTHWHILE * len(costs)
        assert max(sum(costs[item] for item in group) for group in groups) <= UNEVEN * sum(costs) / threads * (
            1 + 1e-12
        )


@given(costs=st.lists(st.floats(WORTHWHILE, 1.01 * WORTHWHILE), min_size=1, max_size=6), threads=st.integers(2, 4))
def test_work_that_can_be_dealt_evenly_is(costs: list[float], threads: int) -> None:
    """As many items of one cost as make whole rounds: each thread gets the same number of them."""
    costs = [cost for cost in costs for _ in range(threads)]
    groups = with_threads(threads, lambda: shares(costs, costs))
    assert isinstance(groups, list)
    assert [len(group) for group in groups] == [len(costs) // threads] * threads


@pytest.mark.parametrize(
    ("costs", "threads"),
    [
        ([WORTHWHILE] * 4, 1),  # one thread
        ([WORTHWHILE * 0.99] * 4, 2),  # not worth it
        ([WORTHWHILE], 2),  # fewer items than threads
        ([WORTHWHILE] * 2, 3),
        ([9 * WORTHWHILE, WORTHWHILE], 2),  # one item has nearly everything
        ([], 2),
    ],
)
def test_one_group_where_sharing_does_not_pay(costs: list[float], threads: int) -> None:
    items = list(range(len(costs)))
    assert with_threads(threads, lambda: shares(items, costs)) == [items]


def test_the_limits_themselves() -> None:
    """Just worth it, and just even enough: the busier of two has 1.25 halves, and then a little more."""
    torch.set_num_threads(2)
    assert shares("ab", [WORTHWHILE] * 2) == [["a"], ["b"]]
    assert shares("ab", [1.25 * WORTHWHILE, 0.75 * WORTHWHILE]) == [["a"], ["b"]]
    assert shares("ab", [1.26 * WORTHWHILE, 0.74 * WORTHWHILE]) == [["a", "b"]]
    assert shares("abc", [WORTHWHILE, 3 * WORTHWHILE, 2 * WORTHWHILE]) == [["b"], ["a", "c"]]


def two_threads_here() -> None:
    """In a new thread: when first asked, torch takes the count that any thread set last, whoever that was."""
    torch.get_num_threads()
    torch.set_num_threads(2)


def count_of_a_new_thread() -> int:
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found[0]


# --- side_by_side -------------------------------------------------------------------------------------


def settings() -> tuple[int, bool, bool, bool]:
    """What a task finds: thread count, gradients, inference mode, and whether it is the calling thread."""
    main = threading.current_thread() is threading.main_thread()
    return torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), main


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_results_come_in_order_from_different_threads(tasks: int) -> None:
    torch.set_num_threads(2)
    barrier = threading.Barrier(tasks)  # passes only if all of them run at once

    def task(number: int) -> tuple[int, int]:
        barrier.wait(timeout=30)
        time.sleep(0.01 * (tasks - number))
        return number, threading.get_ident()

    found = side_by_side([lambda number=number: task(number) for number in range(tasks)])
    assert [number for number, _ in found] == list(range(tasks))
    assert len({ident for _, ident in found}) == tasks
    assert found[0][1] == threading.get_ident()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_task_has_no_gradients_the_callers_inference_mode_and_one_thread(tasks: int, inference: bool) -> None:
    torch.set_num_threads(2)
    with torch.inference_mode(inference), torch.enable_grad():
        found = side_by_side([settings] * tasks)
        threads = 2 if tasks == 1 else 1
        assert found == [(threads, False, inference, True)] + [(threads, False, inference, False)] * (tasks - 1)
        assert settings() == (2, True, inference, True)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_of_any_task_reaches_the_caller_when_no_task_runs_any_more(failing: int) -> None:
    torch.set_num_threads(2)
    running: list[int] = []
    all_run = threading.Barrier(3)

    def task(number: int) -> None:
        running.append(number)
        all_run.wait(timeout=30)
        if number != failing:
            time.sleep(0.05)
        running.remove(number)
        if number == failing:
            raise KeyError(number)

    with pytest.raises(KeyError, match=str(failing)):
        side_by_side([lambda number=number: task(number) for number in range(3)])
    assert running == []
    assert torch.get_num_threads() == 2
    assert [result[0] for result in side_by_side([settings] * 3)] == [1, 1, 1]


def test_a_task_may_run_tasks_itself() -> None:
    torch.set_num_threads(2)
    nested = side_by_side([lambda: side_by_side([threading.get_ident] * 3)] * 3)
    assert [len(set(idents)) for idents in nested] == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_threads_that_start_later_find_torchs_own_thread_count() -> None:
    """A worker's setting is also what torch gives to threads that it has not seen yet."""
    torch.set_num_threads(2)
    parallel._forget()
    side_by_side([settings] * 2)
    assert count_of_a_new_thread() == 2


def test_many_callers_at_once_while_the_pool_grows() -> None:
    """A caller that finds the pool too small replaces it while others have just got hold of it."""
    torch.set_num_threads(2)
    parallel._forget()
    wrong: list[object] = []

    def caller(first: int) -> None:
        two_threads_here()
        for round_ in range(30):
            tasks = 2 + (first + round_) % 7
            try:
                found = side_by_side([lambda n=n: (first, n) for n in range(tasks)])
                if found != [(first, n) for n in range(tasks)] or torch.get_num_threads() != 2:
                    wrong.append(found)
            except BaseException as error:
                wrong.append(error)

    callers = [threading.Thread(target=caller, args=(n,), daemon=True) for n in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in callers)
    assert wrong == []


def test_a_replaced_pool_finishes_what_it_was_given_and_its_threads_end() -> None:
    """One caller's task runs on the only worker and another's is in the queue when a third asks for more workers."""
    torch.set_num_threads(2)
    parallel._forget()
    release = threading.Event()
    found: list[list[str]] = []

    def waiting() -> None:
        two_threads_here()
        handed_over = threading.Event()
        started.append(handed_over)
        tasks = [lambda: str(handed_over.set()), lambda: "done" if release.wait(30) else "timed out"]
        found.append(side_by_side(tasks))

    started: list[threading.Event] = []
    callers = [threading.Thread(target=waiting, daemon=True) for _ in range(2)]
    for number, caller in enumerate(callers, 1):
        caller.start()
        while len(started) < number:
            time.sleep(0.001)
        assert started[-1].wait(30)
    assert parallel._pool is not None
    old = parallel._pool[1]
    assert len(side_by_side([settings] * 4)) == 4
    assert parallel._pool[1] is not old
    release.set()
    for caller in callers:
        caller.join(timeout=30)
    assert found == [["None", "done"]] * 2
    for thread in old._threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_a_machine_out_of_threads_fails_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    parallel._forget()
    start, started = threading.Thread.start, []

    def second_fails(self: threading.Thread) -> None:
        if len(started) == 1:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        side_by_side([settings] * 3)
    monkeypatch.undo()
    started[0].join(timeout=30)
    assert not started[0].is_alive()
    assert torch.get_num_threads() == count_of_a_new_thread() == 2
    assert len(side_by_side([settings] * 3)) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork() -> None:
    """The child has none of the parent's threads; a lock that another of them held is not its problem."""
    torch.set_num_threads(2)
    side_by_side([settings] * 2)
    with parallel._lock:
        child = os.fork()
        if child == 0:  # no assertion may raise in here: the child must not go on as a second pytest
            found = []
            try:
                found = side_by_side([settings] * 2)
            finally:
                os._exit(0 if found == [(1, False, False, True), (1, False, False, False)] else 1)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(ended[1]) == 0


# --- the experts with two threads ---------------------------------------------------------------------

D, F, E, T, K = 48, 32, 6, 256, 2


def problem(kind: str, dtype: torch.dtype, in_place: bool = False) -> tuple[Experts, Tensor, Dispatch, Tensor]:
    """Work for two threads, and an expert without a token."""
    torch.manual_seed(0)
    experts = EXPERTS[kind](E, D, F)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    experts = experts.to(dtype)
    experts.accumulate_gradients_in_place(in_place)
    indices = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    weights = torch.rand(T, K).requires_grad_()
    x = torch.randn(T, D).to(dtype).requires_grad_()
    return experts, x, dispatch(by_hand(indices, weights, E)), weights


def results(
    kind: str,
    dtype: torch.dtype,
    in_place: bool,
    wrap: Callable[[Experts], Callable[..., Tensor]] = lambda experts: experts,
) -> list[Tensor]:
    """Output and all gradients, after two backward passes (the second adds)."""
    experts, x, plan, weights = problem(kind, dtype, in_place)
    call, grad = wrap(experts), torch.randn(T, D).to(dtype)
    for _ in range(2):
        out = call(x, plan)
        out.backward(grad, retain_graph=True)
    leaves = (x, weights, *experts.parameters())
    assert all(leaf.grad is not None for leaf in leaves)
    return [out.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what ``expert_ops`` hands to :func:`side_by_side`: small experts are worth it here, each for itself."""
    monkeypatch.setattr(parallel, "WORTHWHILE", 1.0)
    monkeypatch.setattr(expert_ops, "CACHED", 1)
    sizes: list[int] = []
    monkeypatch.setattr(expert_ops, "side_by_side", lambda tasks: sizes.append(len(tasks)) or side_by_side(tasks))
    return sizes


WRAPS: dict[str, Callable[[Experts], Callable[..., Tensor]]] = {
    "eager": lambda experts: experts,
    "compiled": lambda experts: torch.compile(experts, fullgraph=True, backend="aot_eager"),
    "checkpointed": lambda experts: lambda x, plan: checkpoint(experts, x, plan, use_reentrant=False),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_two_threads_compute_what_one_does(
    kind: str, dtype: torch.dtype, in_place: bool, wrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's two experts are added in another order: 2⁻²⁴ (one rounding to bfloat16: 2⁻⁸) of the largest value.

    A product of another thread count may also sum its terms in another order: some units more.
    """
    torch._dynamo.reset()
    sizes = counted(monkeypatch)
    torch.set_num_threads(1)
    alone = results(kind, dtype, in_place)
    assert set(sizes) == {1}
    sizes.clear()
    torch.set_num_threads(2)
    together = results(kind, dtype, in_place, WRAPS[wrap])
    assert set(sizes) == {2}
    again = results(kind, dtype, in_place, WRAPS[wrap])
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20
    for one, two, repeated in zip(alone, together, again, strict=True):
        assert torch.equal(two, repeated)
        torch.testing.assert_close(two, one, rtol=0, atol=2 * unit * one.abs().max().item())
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", EXPERTS)
def test_two_threads_without_gradients(
    kind: str, mode: Callable[[], torch.no_grad], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(monkeypatch)
    torch.set_num_threads(2)
    experts, x, plan, _ = problem(kind, torch.float32)
    exact = copy.deepcopy(experts).double()(x.double(), plan)
    sizes.clear()
    with mode():
        out, again = experts(x, plan), experts(x, plan)
    assert sizes == [2, 2]
    assert not out.requires_grad and torch.equal(out, again)
    torch.testing.assert_close(out.double(), exact.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_two_python_threads_train_at_once(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its own experts; both use the same workers, forward and backward."""
    sizes = counted(monkeypatch)
    torch.set_num_threads(2)
    expected = results("gated", torch.float32, in_place)
    problems = [problem("gated", torch.float32, in_place) for _ in range(2)]
    grad = torch.randn(T, D)  # drawn after the same seed as in results
    wrong: list[str] = []

    def train(experts: Experts, x: Tensor, plan: Dispatch, weights: Tensor) -> None:
        two_threads_here()
        for _ in range(5):
            experts.zero_grad(set_to_none=True)
            x.grad = weights.grad = None
            for _ in range(2):
                out = experts(x, plan)
                out.backward(grad, retain_graph=True)
            found = [out, x.grad, weights.grad, *[parameter.grad for parameter in experts.parameters()]]
            wrong.extend(
                f"{place}" for place, pair in enumerate(zip(found, expected, strict=True)) if not torch.equal(*pair)
            )

    threads = [threading.Thread(target=train, args=one, daemon=True) for one in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert set(sizes) == {2}

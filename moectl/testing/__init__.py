"""The contract test of a router, for a plug-in's own tests and for ``moectl routers check``.

>>> from moectl.testing import check_router
>>> check_router("topk", top_k=2).ok
True

In a plug-in's test that one line is enough: it raises an AssertionError that lists every check that
failed, each with its evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moectl.testing.results import Check, Report, RouterCheckError

if TYPE_CHECKING:
    from moectl.moe.router import Router

__all__ = ["Check", "Report", "RouterCheckError", "check_router", "run_checks"]


def check_router(router: str | type[Router], *, hidden_size: int = 64, num_experts: int = 8, **options: Any) -> Report:
    """Check that a router keeps the contract.

    Args:
        router: its class, its name, or ``path.py:Class``.
        hidden_size: ``D`` of the router that is built.
        num_experts: ``E``.
        options: the router's own options, as for :func:`moectl.routers.build_router`.

    Returns:
        the report; every check in it is ok, or skipped with the reason.

    Raises:
        RouterCheckError: a check failed (also an AssertionError); the message lists each with its evidence.
        ConfigError: no such router, or options that it does not take.
    """
    report = run_checks(router, hidden_size=hidden_size, num_experts=num_experts, **options)
    report.raise_if_failed()
    return report


def run_checks(router: str | type[Router], *, hidden_size: int = 64, num_experts: int = 8, **options: Any) -> Report:
    """Run every check and report, whatever the router does; arguments and errors as for :func:`check_router`."""
    from moectl.testing.runner import run

    checks = run(router, hidden_size=hidden_size, num_experts=num_experts, options=options)
    label = router if isinstance(router, str) else router.__name__
    return Report(label, hidden_size, num_experts, options, checks)

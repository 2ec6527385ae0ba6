"""Runs: their folders (the truth), provenance, and the registry that indexes them. No torch."""

from __future__ import annotations

from moectl.runs.find import find_run
from moectl.runs.rundir import MetricRow, RunDir

__all__ = ["MetricRow", "RunDir", "find_run"]

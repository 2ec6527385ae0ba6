"""``train.compile`` on real runs: eager numbers, no graph after the second step, exact resume, fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.training.state import newest_checkpoint
from tests.training.test_trainer import _interrupt_at, assert_equal, make_trainer, weights

Make = Callable[..., ExperimentConfig]
AOT = {"compile": True, "compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("router", [None, "top1", "topk"])
def test_one_graph_and_the_numbers_of_an_eager_run(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str | None
) -> None:
    """Twelve steps with evaluations and checks between them. AOT Autograd may sum in another order: 1e-5 per step."""
    moe = None if router is None else {"router": {"name": router, "noise_std": 0.2}}
    runs = []
    for train in ({}, AOT):
        trainer = make_trainer(
            experiment(moe=moe, train={**train, "grad_accum": 2}), dataset, tmp_path / str(len(runs))
        )
        result = trainer.train()
        assert result.status == "finished"
        runs.append(trainer)
    assert result.speed is not None and (result.speed.graphs, result.speed.late_graphs) == (1, 0)
    eager, compiled = (run.logger.rows for run in runs)  # type: ignore[attr-defined]
    for (_, ours), (_, theirs) in zip(eager, compiled, strict=True):
        assert theirs["train/lm_loss"] == pytest.approx(ours["train/lm_loss"], rel=1e-4)
    assert not [kind for kind, _ in runs[1].logger.events if "compile" in kind]  # type: ignore[attr-defined]


def test_resume_is_exact(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    config = experiment(moe={"router": {"name": "topk", "top_k": 2, "noise_std": 0.3}}, train=AOT)
    whole = make_trainer(config, dataset, tmp_path / "whole")
    whole.train()
    make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(5)).train()
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    torch.manual_seed(999)
    resumed.restore(newest_checkpoint(tmp_path / "cut")[0])
    resumed.train()
    assert_equal(weights(whole), weights(resumed))


def test_what_is_compiled_late_is_told(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """A schedule takes the router from two experts per token to one: another graph, and the record says when."""
    router = {"name": "topk", "top_k": 1, "norm_topk_prob": False, "noise_std": 0.0}
    schedule = {"top_k": {"points": [[0.0, 2], [0.5, 1]], "interpolate": "constant"}}
    trainer = make_trainer(experiment(moe={"router": router, "schedule": schedule}, train=AOT), dataset, tmp_path)
    result = trainer.train()
    assert result.speed is not None and result.speed.late_graphs == 1 and result.speed.graphs == 2
    assert [kind for kind, _ in trainer.logger.events if kind == "recompiled"] == ["recompiled"]  # type: ignore[attr-defined]


def test_a_compiler_that_fails_is_told_and_the_run_is_an_eager_one(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Inductor with a C++ compiler that is not there: from the first step on as if nothing had been asked."""
    from torch._inductor import config as inductor

    eager = make_trainer(experiment(), dataset, tmp_path / "eager")
    eager.train()
    with inductor.patch({"cpp.cxx": ("/nonexistent/c++",), "fx_graph_cache": False}):
        trainer = make_trainer(experiment(train={"compile": True}), dataset, tmp_path / "failed")
        assert trainer.train().status == "finished"
    events = dict(trainer.logger.events)  # type: ignore[attr-defined]
    assert "goes on without it" in events["compile_failed"]
    assert_equal(weights(eager), weights(trainer))
    assert eager.logger.rows == trainer.logger.rows  # type: ignore[attr-defined]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inductor(experiment: Make, dataset: PackedDataset, tmp_path: Path, precision: str) -> None:
    train = {"precision": precision, "grad_accum": 2}
    moe = {"router": {"name": "top1", "noise_std": 0.2}, "balance_exact": True}
    eager = make_trainer(experiment(moe=moe, train=train), dataset, tmp_path / "eager")
    eager.train()
    trainer = make_trainer(experiment(moe=moe, train={**train, "compile": True}), dataset, tmp_path / "compiled")
    result = trainer.train()
    assert result.speed is not None and (result.speed.graphs, result.speed.late_graphs) == (1, 0)
    rows = zip(eager.logger.rows, trainer.logger.rows, strict=True)  # type: ignore[attr-defined]
    for (_, ours), (_, theirs) in rows:
        assert theirs["train/lm_loss"] == pytest.approx(
            ours["train/lm_loss"], rel=1e-4 if precision == "float32" else 2e-2
        )

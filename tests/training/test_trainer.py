"""The loop: what it reports, what it stops for, and that a resumed run is the same run."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import BlockSampler, PackedDataset, targets
from moectl.corpus.manifest import Manifest
from moectl.errors import ConfigError, MoectlError
from moectl.moe.router import RouterError
from moectl.plugins import router_entries
from moectl.training.optim import parameter_groups
from moectl.training.state import checkpoint_steps, newest_checkpoint
from moectl.training.trainer import Trainer
from moectl.walk.models import build_model
from tests.support import of_the_clock

Make = Callable[..., ExperimentConfig]


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.events: list[tuple[str, str]] = []
        self.counts: list[tuple[int, Mapping[str, Any]]] = []

    def log(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, {k: v for k, v in values.items() if not of_the_clock(k)}))

    def event(self, kind: str, message: str, **details: Any) -> None:
        self.events.append((kind, message))

    def routing(self, step: int, payload: Mapping[str, Any]) -> None:
        self.counts.append((step, payload))

    def position(self) -> dict[str, int]:
        return {"rows": len(self.rows), "events": len(self.events), "counts": len(self.counts)}

    def rewind(self, step: int, position: Mapping[str, int]) -> None:
        for name, kept in position.items():
            del getattr(self, name)[kept:]


def make_trainer(config: ExperimentConfig, data: PackedDataset, folder: Path, **options: Any) -> Trainer:
    model, _ = build_model(config, Manifest.load(data.folder))
    logger = options.pop("logger", None) or Recorder()
    return Trainer(model, data, config, logger=logger, checkpoints=folder, **options)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def test_training_learns_and_reports_lm_loss_apart(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(train={"steps": 40}), dataset, tmp_path)
    result = trainer.train()
    rows = trainer.logger.rows  # type: ignore[attr-defined]
    train = [values for _, values in rows if "train/loss" in values]
    assert result.status == "finished" and result.step == len(train) == 40
    assert train[-1]["train/lm_loss"] < 0.8 * train[0]["train/lm_loss"]
    for values in train:
        total = values["train/lm_loss"] + 0.01 * values["train/lb_loss"] + 0.001 * values["train/z_loss"]
        assert values["train/loss"] == pytest.approx(total, rel=1e-6)
        assert {"balance/layer.0", "balance/layer.1", "max_share/layer.1", "balance/worst"} <= values.keys()
    assert result.tokens == 40 * 4 * 16


def test_dense_run_has_no_routing_numbers(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    trainer = make_trainer(experiment(moe=None), dataset, tmp_path)
    trainer.train()
    names = {name for _, values in trainer.logger.rows for name in values}  # type: ignore[attr-defined]
    assert not {name for name in names if "balance" in name or "lb_" in name or "z_" in name}


def test_dense_and_moe_of_one_seed_share_all_common_weights_and_data_order(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    dense = make_trainer(experiment(moe=None), dataset, tmp_path / "dense")
    sparse = make_trainer(experiment(), dataset, tmp_path / "moe")
    ours, theirs = weights(dense), weights(sparse)
    common = ours.keys() & theirs.keys()
    assert {"embed_tokens.weight", "layers.1.self_attn.q_proj.weight", "norm.weight"} <= common
    assert all(torch.equal(ours[name], theirs[name]) for name in common)
    assert all((dense.sampler.next() == sparse.sampler.next()).all() for _ in range(30))


BUILT_IN = sorted(name for name, entry in router_entries().items() if entry.target.startswith("moectl."))
NOISY = {"top1": {"noise_std": 0.5}, "switch": {"noise_std": 0.5}, "top2": {"noise_std": 0.5}, "topk": {"top_k": 2}}


@pytest.mark.parametrize("router", [None, *BUILT_IN])
@pytest.mark.parametrize("stop", [4, 8])
def test_resume_is_bit_exact(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, router: str | None, stop: int
) -> None:
    moe = None if router is None else {"router": {"name": router, **NOISY.get(router, {})}}
    train = {"grad_accum": 2, "keep_checkpoints": 5, "allow_noncausal": router == "expert-choice"}
    config = experiment(moe=moe, train=train)
    whole = make_trainer(config, dataset, tmp_path / "whole")
    whole.train()

    interrupted = make_trainer(config, dataset, tmp_path / "cut", progress=_interrupt_at(stop))
    assert interrupted.train().status == "interrupted"
    resumed = make_trainer(config, dataset, tmp_path / "cut")
    checkpoint, messages = newest_checkpoint(tmp_path / "cut")
    assert (checkpoint.step, messages) == (stop, [])
    torch.manual_seed(999)  # a resumed process starts anywhere
    resumed.restore(checkpoint)
    assert resumed.train().status == "finished"

    assert_equal(weights(whole), weights(resumed))
    after = [row for row in whole.logger.rows if row[0] > stop]  # type: ignore[attr-defined]
    assert after == resumed.logger.rows  # type: ignore[attr-defined]
    counts = [row for row in whole.logger.counts if row[0] > stop]  # type: ignore[attr-defined]
    assert counts == resumed.logger.counts  # type: ignore[attr-defined]


def _interrupt_at(step: int) -> Callable[[int, Mapping[str, float]], None]:
    def progress(now: int, values: Mapping[str, float]) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def test_restore_refuses_another_config(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    make_trainer(experiment(train={"steps": 4}), dataset, tmp_path).train()
    checkpoint, _ = newest_checkpoint(tmp_path)
    other = make_trainer(experiment(train={"steps": 4, "seed": 1}), dataset, tmp_path / "other")
    with pytest.raises(ConfigError, match="another config"):
        other.restore(checkpoint)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Same blocks, cut 1 x 8 and 4 x 2: the dense losses and steps agree to rounding (float64: 1e-12)."""
    one = experiment(moe=None, train={"precision": "float64", "batch_size": 8, "steps": 4})
    four = experiment(moe=None, train={"precision": "float64", "batch_size": 2, "grad_accum": 4, "steps": 4})
    ours, theirs = make_trainer(one, dataset, tmp_path / "1"), make_trainer(four, dataset, tmp_path / "4")
    for _ in range(3):
        first, _ = ours.optimizer_step()
        second, _ = theirs.optimizer_step()
        assert first["train/lm_loss"] == pytest.approx(second["train/lm_loss"], rel=1e-12)
        assert first["train/grad_norm"] == pytest.approx(second["train/grad_norm"], rel=1e-10)


def test_lm_loss_of_a_step_is_the_mean_over_its_scored_tokens(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(moe={"router": {"name": "top1", "noise_std": 0.0}}, train={"grad_accum": 3})
    trainer = make_trainer(config, dataset, tmp_path)
    sampler = BlockSampler(dataset.train.num_blocks, batch_size=4, seed=0)
    total, scored = 0.0, 0
    with torch.no_grad():
        for _ in range(3):
            batch = dataset.train.batch(sampler.next())
            logits = trainer.model(batch.input_ids[:, :-1], doc_ids=batch.doc_ids[:, :-1])
            labels = targets(batch)
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            scored += int((labels >= 0).sum())
    metrics, problem = trainer.optimizer_step()
    assert problem is None
    assert metrics["train/lm_loss"] == pytest.approx(total / scored, rel=1e-5)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_exact_balance_makes_the_whole_step_independent_of_the_cut(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, precision: str
) -> None:
    """Eight blocks as 1 x 8, 2 x 4 and 4 x 2, all balance losses on: every number and every gradient.

    Without noise: another cut draws other noise. Sums in another order: 1e-12, and 1e-6 in float32.
    """
    tolerance = 1e-12 if precision == "float64" else 1e-6
    moe = {
        "router": {"name": "top2", "noise_std": 0.0},
        "balance_loss": "switch+cv2+entropy",
        "balance_exact": True,
        "lb_coef": 1.0,
        "cv2_coef": 1.0,
        "entropy_coef": 1.0,
    }
    seen: dict[int, tuple[dict[str, float], dict[str, torch.Tensor]]] = {}
    for cut in (1, 2, 4):
        train = {"precision": precision, "batch_size": 8 // cut, "grad_accum": cut}
        trainer = make_trainer(
            experiment(moe=moe, train=train, optim={"grad_clip": None}), dataset, tmp_path / str(cut)
        )
        metrics, problem = trainer.optimizer_step()
        assert problem is None and metrics["balance/running_deviation"] < 1e-7
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        seen[cut] = metrics, grads
    for cut in (2, 4):
        assert seen[cut][0] == pytest.approx(seen[1][0], abs=max(tolerance, 1e-9), rel=tolerance)
        for name, grad in seen[cut][1].items():
            torch.testing.assert_close(grad, seen[1][1][name], rtol=0, atol=tolerance, msg=name)


def test_running_counts_deviate_from_the_whole_step_only_with_accumulation(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    whole, _ = make_trainer(experiment(), dataset, tmp_path / "1").optimizer_step()
    cut, _ = make_trainer(experiment(train={"grad_accum": 4}), dataset, tmp_path / "4").optimizer_step()
    assert whole["balance/running_deviation"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < cut["balance/running_deviation"] < 0.5
    exact = experiment(train={"grad_accum": 4}, moe={"balance_exact": True})
    twice, _ = make_trainer(exact, dataset, tmp_path / "exact").optimizer_step()
    assert twice["balance/running_deviation"] == pytest.approx(0.0, abs=1e-6)
    assert twice["train/lb_loss"] != cut["train/lb_loss"]


def test_not_finite_stops_before_the_weights_move_and_names_the_layer(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(train={"steps": 8}), dataset, tmp_path, progress=None)
    trainer.settings = trainer.settings.model_copy(update={"steps": 4})
    trainer.train()
    with torch.no_grad():
        trainer.model.layers[1].mlp.experts.down_proj[2, 0, 0] = math.inf
    trainer.settings = trainer.settings.model_copy(update={"steps": 8})
    before = weights(trainer)
    result = trainer.train()
    assert result.status == "failed" and result.step == 4
    assert "layers.1.mlp" in result.reason
    assert_equal(before, weights(trainer))
    assert checkpoint_steps(tmp_path)[-1] == 4
    good, messages = newest_checkpoint(tmp_path)
    assert not messages and torch.isfinite(good.tensors["model"]["layers.1.mlp.experts.down_proj"]).all()


def test_a_gradient_that_is_not_finite_is_traced_to_where_it_began(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(), dataset, tmp_path)
    before = weights(trainer)
    norm = trainer.model.layers[1].post_attention_layernorm.weight
    norm.register_hook(lambda grad: torch.full_like(grad, math.nan))
    metrics, problem = trainer.optimizer_step()
    assert math.isnan(metrics["train/grad_norm"]) and problem is not None
    assert "it began at layers.1.post_attention_layernorm.weight" in problem
    assert_equal(before, weights(trainer))


def test_what_a_router_brings_is_the_router_s_own(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """A layer inside a router takes the router's learning rate and no weight decay."""
    trainer = make_trainer(experiment(optim={"router_lr": 0.5}), dataset, tmp_path)
    inner = torch.nn.Linear(16, 16)
    trainer.layers[0].router.add_module("inner", inner)
    groups = parameter_groups(trainer.model, trainer.config.optim)
    (group,) = [g for g in groups if any(p is inner.weight for p in g["params"])]  # type: ignore[attr-defined]
    assert (group["name"], group["weight_decay"], group["lr"]) == ("router", 0.0, 0.5)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(), dataset, tmp_path)
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    with pytest.raises(MoectlError, match=r"norm\.weight is not finite"):
        trainer.save()
    assert checkpoint_steps(tmp_path) == []


def test_collapse_stops_the_run_where_early_stop_is_set(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """A gate that sends everything to expert 0: three bad checks in a row, one every 4 steps."""
    changes: dict[str, Any] = {"moe": {"lb_coef": 0.0, "router": {"name": "top1", "noise_std": 0.0}}}
    for early_stop, steps in ((True, 12), (False, 16)):
        config = experiment(**changes, train={"steps": 16, "early_stop": early_stop})
        trainer = make_trainer(config, dataset, tmp_path / str(early_stop))
        with torch.no_grad():
            trainer.layers[0].router.weight.zero_()  # every logit ties: the lowest index takes all
        trainer.layers[0].router.weight.requires_grad_(False)
        result = trainer.train()
        events = trainer.logger.events  # type: ignore[attr-defined]
        assert [kind for kind, text in events if "layer 0" in text][:3] == ["imbalance", "imbalance", "collapse"]
        assert (result.status, result.step) == ("collapsed" if early_stop else "finished", steps)


def test_zero_gate_and_constant_weights_are_refused(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    config = experiment()
    model, _ = build_model(config, dataset.manifest)
    with torch.no_grad():
        model.moe_layers()[1].router.weight.zero_()
    with pytest.raises(ConfigError, match="layer 1 cannot be trained.*zeros"):
        Trainer(model, dataset, config, logger=Recorder(), checkpoints=tmp_path)
    constant = experiment(moe={"router": {"name": "topk", "top_k": 1}})
    with pytest.raises(ConfigError, match="no language-model gradient"):
        make_trainer(constant, dataset, tmp_path)


def test_noise_steps_once_per_optimizer_step_and_ends_on_schedule(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    trainer = make_trainer(experiment(train={"grad_accum": 3}), dataset, tmp_path)
    noise = trainer.layers[0].router.noise
    scales = []
    for step in range(5):
        assert int(noise.step) == step
        scales.append(float(noise.scale()))
        trainer.optimizer_step()
    assert scales == pytest.approx([0.1, 0.1 * 2 / 3, 0.1 / 3, 0.0, 0.0])  # a quarter of 12 steps


# --- gradients in place


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_gradient_buffers_change_nothing_but_where_gradients_lie(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, backend: str
) -> None:
    """Six steps of three micro-batches with clipping and a check: the same weights, to the last bit."""
    config = experiment(moe={"router": {"name": "top2"}, "backend": backend}, train={"steps": 6, "grad_accum": 3})
    kept, fresh = (make_trainer(config, dataset, tmp_path / name) for name in ("kept", "fresh"))
    for layer in fresh.layers.values():
        layer.experts.accumulate_gradients_in_place(False)
    places: set[int] = set()
    for _ in range(6):
        torch.manual_seed(1)
        ours, _ = kept.optimizer_step()
        torch.manual_seed(1)
        theirs, _ = fresh.optimizer_step()
        assert ours == theirs
        grad = kept.layers[0].experts.gate_up_proj.grad
        assert isinstance(grad, torch.Tensor)
        places.add(grad.data_ptr())
        del grad  # a gradient that someone holds is not overwritten: the next step would take another buffer
    assert_equal(weights(kept), weights(fresh))
    assert backend == "loop" or len(places) == 1, "one buffer for all steps"


def test_a_bad_gradient_in_a_buffer_is_found_like_any_other(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """One weight so large that the product's gradient overflows: no weight moves, the expert is named."""
    trainer = make_trainer(experiment(moe={"router": {"name": "top2"}}), dataset, tmp_path)
    with torch.no_grad():
        trainer.layers[1].experts.down_proj[1].mul_(1e30)
        trainer.layers[1].experts.gate_up_proj[1, 24:].mul_(1e-25)  # what comes forward stays finite
    before = weights(trainer)
    metrics, problem = trainer.optimizer_step()
    assert problem is not None and not math.isfinite(metrics["train/grad_norm"])
    assert_equal(before, weights(trainer))


# --- what is done at checks


def test_a_check_warns_revives_and_moves_capacity_and_the_last_one_only_looks(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """A zero gate ties every token to experts 0 and 1: 2 and 3 are dead at each check, every 4 of 12 steps."""
    config = experiment(
        moe={
            "router": {"name": "topk", "top_k": 2, "noise_std": 0.0},
            "capacity": {"factor": 1.5, "dynamic": True},
            "revive_dead": True,
        },
        train={"collapse": {"min_expected_count": 10}},
    )
    trainer = make_trainer(config, dataset, tmp_path)
    with torch.no_grad():
        trainer.layers[0].router.weight.zero_()
    trainer.layers[0].router.weight.requires_grad_(False)
    assert trainer.train().status == "finished"
    recorder = trainer.logger
    assert isinstance(recorder, Recorder)
    revived = [text for kind, text in recorder.events if kind == "revived" and "layer 0" in text]
    assert len(revived) == 4, "two experts, at the two checks that training goes on after"
    assert [text for kind, text in recorder.events if kind == "capacity" and "layer 0" in text]
    layer = trainer.layers[0]
    assert layer.capacity is not None and layer.capacity.factor == pytest.approx(1.5 * 1.1 * 1.1)
    assert len(recorder.counts) == 3, "three checks, the last of which changes nothing"
    last = recorder.counts[-1][1]["layers"]["0"]
    assert last["dropped"] > 0
    dropped = [values["dropped/layer.0"] for _, values in recorder.rows if "dropped/layer.0" in values]
    assert len(dropped) == 12 and all(0 < value < 1 for value in dropped)


def test_large_router_logits_are_an_event_once_per_layer(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    config = experiment(train={"steps": 12, "check_every": 2}, optim={"router_lr": 1e-12})
    trainer = make_trainer(config, dataset, tmp_path)
    with torch.no_grad():
        trainer.layers[1].router.weight.mul_(1000.0)
    trainer.train()
    events = [text for kind, text in trainer.logger.events if kind == "router_logits"]  # type: ignore[attr-defined]
    (event,) = events
    assert "layer 1" in event and "moe.z_coef" in event
    rows = [values for _, values in trainer.logger.rows if "logit_abs/layer.1" in values]  # type: ignore[attr-defined]
    assert rows[0]["logit_abs/layer.1"] > 10 > rows[0]["logit_abs/layer.0"]


def test_evaluation_sees_the_configured_k_and_capacity(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """In training k falls from 4 to 2 and the capacity factor from 3 to 1.25; evaluations have the last ones."""
    config = experiment(
        moe={
            "router": {"name": "topk", "top_k": 2},
            "capacity": {"factor": 1.25, "in_eval": True},
            "schedule": {"top_k": [[0, 4], [0.5, 2]], "capacity_factor": [[0, 3.0], [0.5, 1.25]]},
        }
    )
    seen: list[tuple[int, float]] = []

    def evaluate(model: Any, final: bool) -> dict[str, float]:
        model.eval()
        layer = model.moe_layers()[0]
        seen.append((layer.router.top_k, layer.capacity.factor))
        model.train()
        return {}

    trainer = make_trainer(config, dataset, tmp_path, evaluate=evaluate)
    trainer.train()
    assert seen == [(2, 1.25)] * 3
    rows = [values for _, values in trainer.logger.rows if "schedule/top_k" in values]  # type: ignore[attr-defined]
    assert [row["schedule/top_k"] for row in rows] == [4.0] * 6 + [2.0] * 6
    assert [row["balance/collapse_value"] for row in rows] == [1.0] * 6 + [2.0] * 6


# --- what must not be trained, and what does not work


@pytest.mark.parametrize(
    ("moe", "named"),
    [
        ({"router": "expert-choice"}, "layer 0's router 'expert-choice' lets later tokens"),
        ({"router": "top2", "capacity": {"factor": 1.0, "fill": "probability"}}, "its capacity, filled in order"),
    ],
    ids=["router", "capacity"],
)
def test_what_is_not_causal_is_refused_unless_allowed(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, moe: dict[str, Any], named: str
) -> None:
    config = experiment(moe=moe)
    with pytest.raises(ConfigError, match=named) as refused:
        make_trainer(config, dataset, tmp_path)
    assert "--allow-noncausal" in str(refused.value.hint) and refused.value.exit_code == 2
    allowed = experiment(moe=moe, train={"steps": 4, "allow_noncausal": True})
    assert make_trainer(allowed, dataset, tmp_path).train().status == "finished"


BAD_ROUTER = """
import torch
from moectl.moe import Router, RouterOutput
from moectl.moe.router import entropy, stable_topk


class Bad(Router):
    def route(self, x_TD, mask_T):
        logits = self.logits(x_TD)
        probs = torch.softmax(logits, -1)
        chosen = stable_topk(logits.detach(), 1)
        out = RouterOutput(chosen, probs.gather(1, chosen), logits, probs, probs, entropy(probs))
        {spoil}
        return out
"""


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ("out = out._replace(topk_weights=out.topk_weights * float('nan'))", "topk_weights"),
        ("if self.training: out = out._replace(topk_weights=out.topk_weights * float('inf'))", "topk_weights"),
        ("out = out._replace(topk_indices=out.topk_indices + self.num_experts)", "topk_indices"),
        ("out = out._replace(topk_indices=-1 - out.topk_indices)", "topk_indices"),
        ("out = out._replace(router_probs=out.router_probs * float('nan'))", "router_probs"),
        ("out = out._replace(router_probs=out.router_probs[:, 1:])", "router_probs"),
        ("{}['gate']", "KeyError"),
    ],
)
@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "not-evaluated"])
def test_a_router_that_does_not_work_is_named_before_anything_is_saved(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, spoil: str, named: str, evaluated: bool
) -> None:
    """NaN, indices out of range, wrong shapes, an error: plug-in, layer and field, and no checkpoint."""
    (tmp_path / "bad.py").write_text(BAD_ROUTER.replace("{spoil}", spoil))
    config = experiment(moe={"router": {"name": f"{tmp_path / 'bad.py'}:Bad"}, "layers": "1"})
    evaluate = (lambda model, final: {"eval/lm_loss": 1.0}) if evaluated else None
    trainer = make_trainer(config, dataset, tmp_path / "checkpoints", evaluate=evaluate)
    with pytest.raises(RouterError, match=named) as caught:
        trainer.train()
    assert "layer 1" in caught.value.message and "bad.py:Bad" in caught.value.message
    assert caught.value.exit_code == 2
    assert checkpoint_steps(tmp_path / "checkpoints") == []
    assert trainer.logger.rows == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            "probs = probs + probs.mean(0); out = out._replace(topk_weights=probs.gather(1, chosen))",
            "causal = True, but",
        ),
        ("out = out._replace(topk_weights=torch.ones_like(out.topk_weights))", "no language-model gradient"),
    ],
    ids=["sees-later-tokens", "constant-weights"],
)
def test_a_router_that_is_not_what_it_declares_is_refused_before_anything_is_saved(
    experiment: Make, dataset: PackedDataset, tmp_path: Path, spoil: str, named: str
) -> None:
    """Declared otherwise, the same router trains."""
    text = BAD_ROUTER.replace("{spoil}", spoil)
    (tmp_path / "false.py").write_text(text)
    (tmp_path / "true.py").write_text(text.replace("(Router):", "(Router):\n    causal = learns = False\n"))
    for name, refused in (("false", True), ("true", False)):
        config = experiment(
            moe={"router": {"name": f"{tmp_path / name}.py:Bad"}, "layers": "1"},
            train={"steps": 4, "allow_noncausal": True},
        )
        trainer = make_trainer(config, dataset, tmp_path / name)
        if not refused:
            assert trainer.train().status == "finished"
            continue
        with pytest.raises(ConfigError, match=named) as caught:
            trainer.train()
        assert "layer 1" in caught.value.message
        assert checkpoint_steps(tmp_path / name) == []


def test_what_a_router_raises_at_the_end_of_a_step_names_it(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    text = BAD_ROUTER.replace("{spoil}", "") + "\n    def after_step(self, load_E): raise RuntimeError('boom')\n"
    (tmp_path / "late.py").write_text(text)
    config = experiment(moe={"router": {"name": f"{tmp_path / 'late.py'}:Bad"}, "layers": "1"})
    with pytest.raises(RouterError, match=r"layer 1's router .*late\.py:Bad.*after_step\(\) raised RuntimeError: boom"):
        make_trainer(config, dataset, tmp_path / "checkpoints").train()


def test_a_router_that_breaks_later_is_named_and_the_last_checkpoint_stays(
    experiment: Make, dataset: PackedDataset, tmp_path: Path
) -> None:
    """Weights that turn NaN at the seventh step: the loss says so first, and the first bad field is the router's."""
    spoil = "out = out._replace(topk_weights=out.topk_weights * (float('nan') if self.steps > 5 else 1))"
    text = BAD_ROUTER.replace("{spoil}", spoil) + "\n    steps = 0\n    def after_step(self, load_E): self.steps += 1\n"
    (tmp_path / "late.py").write_text(text)
    config = experiment(moe={"router": {"name": f"{tmp_path / 'late.py'}:Bad"}, "layers": "1"})
    trainer = make_trainer(config, dataset, tmp_path / "checkpoints")
    result = trainer.train()
    assert (result.status, result.step) == ("failed", 6)
    assert "layers.1.mlp.router, topk_weights is the first output that is not finite" in result.reason
    assert checkpoint_steps(tmp_path / "checkpoints") == [0, 4]


def test_the_first_look_changes_nothing(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """Generators, sampler and weights of a run that looked at its routers first are those of one that did not."""
    config = experiment(moe={"router": {"name": "expert-choice-threshold"}}, train={"steps": 4})
    trainer, plain = (make_trainer(config, dataset, tmp_path / name) for name in ("looked", "plain"))
    torch.manual_seed(7)
    trainer.train()
    torch.manual_seed(7)
    for _ in range(4):
        plain.optimizer_step()
    assert_equal(weights(trainer), weights(plain))

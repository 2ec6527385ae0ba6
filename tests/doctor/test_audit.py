"""A healthy run has no problem; each planted fault is found under its code, and a look changes nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moectl.doctor.audit import CHECKS, examine
from moectl.doctor.report import Finding, Report, by_layer
from moectl.doctor.routing_checks import ERROR, STARVED, tokens_needed
from moectl.errors import CheckError, MoectlError, NotFoundError
from moectl.models import decoder
from moectl.runs.rundir import RunDir
from moectl.training import optim
from tests.doctor.conftest import STEPS, Lab, router_source


def codes(report: Report, *severities: str) -> set[str | None]:
    return {each.code for each in report.findings if not severities or each.severity in severities}


def found(report: Report, code: str) -> Finding:
    matching = [each for each in report.findings if each.code == code]
    assert matching, f"{code} is not among {report.findings}"
    return matching[0]


def check(report: Report, name: str) -> Any:
    return next(each for each in report.checks if each.name == name)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file's time of change and hash."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


GATE, UP, DOWN = "layers.1.mlp.router.weight", "layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"


# --- healthy runs


@pytest.mark.parametrize(
    "moe",
    [
        {"router": {"name": "top1"}},
        {"router": {"name": "top2"}},
        {"router": {"name": "switch"}, "n_shared_experts": 1},
        {"router": {"name": "sigmoid"}},
        {"router": {"name": "noisy-topk"}, "balance_loss": "switch+cv2"},
    ],
    ids=lambda moe: str(moe["router"]["name"]),
)
def test_a_healthy_run_has_no_problem_and_every_check_is_named(lab: Lab, moe: dict[str, Any]) -> None:
    name = f"fine-{moe['router']['name']}"
    report = examine(str(lab.train(name, moe=moe)))
    assert report.ok, report.problems
    assert [each.name for each in report.checks] == [examination.name for examination in CHECKS]
    assert codes(report, "problem", "warning") == set()
    assert all(each.detail for each in report.checks)
    # What could not be made says why, and is what has no object here.
    skipped = {each.name for each in report.checks if each.outcome == "not made"}
    assert skipped <= {"straight-through", "balance-gradient", "bias-dtype"}
    assert ("balance-gradient" in skipped) == (moe["router"]["name"] == "sigmoid")
    assert any("held-out tokens of its own data" in note for note in report.notes)


def test_of_many_layers_the_worst_are_shown_first() -> None:
    rows = [(float(value), f"layer {number}: {value}") for number, value in enumerate((5, 3, 9, 1))]
    assert by_layer(rows) == "layer 0: 5; layer 1: 3; layer 2: 9; layer 3: 1"
    assert by_layer(rows, most=2) == "the worst first: layer 3: 1; layer 1: 3; and 2 layers more"


def test_looking_writes_nothing_into_the_run(healthy: Path) -> None:
    before = snapshot(healthy)
    home = {path.name for path in healthy.parents[1].iterdir()}
    examine(healthy.name)
    assert snapshot(healthy) == before
    assert {path.name for path in healthy.parents[1].iterdir()} <= home  # SQLite may have put its log away


def test_a_look_is_the_same_every_time_and_leaves_chance_alone(healthy: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = examine(healthy.name)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert examine(healthy.name).to_dict() == first.to_dict()


def test_a_dense_run_has_nothing_to_route_and_is_looked_at_all_the_same(lab: Lab) -> None:
    report = examine(lab.train("dense", moe=None).name)
    assert report.ok and not report.findings
    assert "nothing to route" in check(report, "dead-experts").detail
    made = {each.name for each in report.checks if each.outcome == "ok"}
    assert {"parameters-finite", "outputs-finite", "trainable", "padding-outputs", "causality"} <= made


def test_newest_prefix_folder_and_step_name_a_run(healthy: Path) -> None:
    assert "'" in examine("newest").subject
    assert examine("healt").subject == examine(str(healthy)).subject == f"run 'healthy' (finished) at step {STEPS}"
    report = examine("healthy", step=0)
    assert report.subject.endswith("step 0") and report.ok
    assert "nothing has been trained" in check(report, "trainable").detail


def test_a_fresh_copy_is_a_note_at_step_0_and_its_copies_warn_later(lab: Lab) -> None:
    lab.train("parent", moe=None)
    shape = dict.fromkeys(("num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"))
    moe = {"init_noise": 0.0}
    lab.train("copied", model={"base": "parent", **shape}, moe=moe, optim={"lr": 1e-5, "warmup_steps": 2})
    fresh = found(examine("copied", step=0), "MOE058")
    assert fresh.severity == "note" and "fresh copies" in fresh.seen and "6 of 6 pairs" in fresh.seen
    assert examine("copied", step=0).ok
    stuck = found(examine(lab.broken(lab.runs / "copied", "copied-stuck", identical).name), "MOE058")
    assert stuck.severity == "problem" and f"after {STEPS} steps" in stuck.seen
    # Under renormalised weights a sum of equal experts is the same whatever the gate says: a note too, at step 0.
    moe2 = {"router": {"name": "top2"}, "init_noise": 0.0}
    lab.train("copied2", model={"base": "parent", **shape}, moe=moe2)
    start = examine("copied2", step=0)
    assert (
        start.ok and found(start, "MOE032").severity == "note" and "same under any gate" in found(start, "MOE032").seen
    )
    assert "MOE032" not in codes(examine("copied2"))
    # Steps of 1e-7 leave the copies all but identical.
    later = found(examine("copied"), "MOE058")
    assert (
        later.severity == "warning"
        and "nearly identical" in later.seen
        and "at step 0 the nearest were 0" in later.seen
    )


# --- faults in a router's code


ROUTERS: dict[str, tuple[str, dict[str, Any], set[str], str]] = {
    "bf16-router": (
        router_source(change="logits = noisy = logits.bfloat16().float()"),
        {},
        {"MOE027"},
        "bfloat16 numbers",
    ),
    "noise-in-eval": (
        router_source(change="noisy = logits + torch.randn_like(logits)"),
        {},
        {"MOE063"},
        "when only the seed differs",
    ),
    "frozen-gate": (
        router_source(init="self.weight.requires_grad_(False)"),
        {},
        {"MOE059"},
        "requires_grad is False, and equal to step 0",
    ),
    "balance-detached": (
        router_source(end="probs = probs.detach()"),
        {},
        {"MOE046"},
        "does not reach the gate",
    ),
    "constant-weight": (
        router_source(end="weights = torch.ones_like(soft) + 0.0 * soft"),
        {},
        {"MOE032"},
        "does not reach the gate",
    ),
    "counts-padding": (
        router_source(attributes="causal = False", change="logits = noisy = logits - logits.mean(0)"),
        {"train": {"allow_noncausal": True}},
        {"MOE036", "MOE061", "MOE042"},
        "padding",
    ),
    "probabilities": (
        router_source(end="logits = clean"),
        {},
        {"MOE057"},
        "softmax of a softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_a_fault_in_a_router_is_found_under_its_code(lab: Lab, name: str) -> None:
    source, changes, expected, said = ROUTERS[name]
    report = examine(lab.train_router(name, source, **changes).name)
    assert codes(report, "problem") == expected
    assert any(said in each.seen for each in report.problems), report.problems
    assert {each.layer for each in report.problems} <= {0, 1, None}
    if name == "constant-weight":
        assert check(report, "straight-through").outcome == "problem"
    assert not report.ok


def test_the_router_that_faults_are_planted_in_is_healthy_itself(lab: Lab) -> None:
    assert examine(lab.train_router("sound", router_source()).name).findings == ()


def test_straight_through_in_eval_is_a_note(lab: Lab) -> None:
    source = router_source(end="weights = 1.0 + (soft - soft.detach())")
    report = examine(lab.train_router("st-eval", source).name)
    assert codes(report) == {"MOE033"} and report.ok
    # In this order they miss 1 by a rounding error for one token in four, and are straight-through all the same.
    left = router_source(end="weights = (1.0 + soft) - soft.detach()")
    finding = found(examine(lab.train_router("st-left", left).name), "MOE033")
    assert "off by 6e-08" in finding.seen or "off by 1e-07" in finding.seen
    # Another matter: the weights of eval are no constants.
    soft = router_source(end="weights = weights if self.training else soft")
    assert "MOE033" not in codes(examine(lab.train_router("soft-eval", soft).name))


def test_an_expert_that_only_noise_reaches_is_a_warning(lab: Lab) -> None:
    """In eval expert 3's logit is the lowest; in training noise sends tokens to it."""
    change = (
        "logits = noisy = logits - 50.0 * torch.nn.functional.one_hot(torch.tensor(3), 4)\n"
        "        noisy = logits + 100.0 * torch.randn_like(logits) if self.training else logits"
    )
    report = examine(lab.train_router("noise-reaches", router_source(change=change)).name)
    finding = found(report, "MOE060")
    assert finding.severity == "warning" and "in training mode, by its noise, they get" in finding.seen
    assert report.ok


def test_a_mask_that_is_off_by_one_is_found_in_long_blocks_too(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows in the last token before the cut only, one of a hundred if the cut were in the middle of the block."""
    run = lab.train("long", data={"block_size": 220}, model={"num_layers": 1}, train={"batch_size": 2})
    assert "MOE006" not in codes(examine(run.name))
    true = decoder.attention_mask

    def late(length: int, *rest: Any) -> Any:
        mask = true(length, *rest)
        ahead = torch.ones(length, length, dtype=torch.bool).tril(1)
        return ahead[None, None] if mask is None else mask | ahead

    monkeypatch.setattr(decoder, "attention_mask", late)
    assert "MOE006" in codes(examine(run.name), "problem")


def test_a_router_that_does_not_learn_is_not_asked_to(lab: Lab) -> None:
    # A rule's logits are no sums: that they are numbers of bfloat16 says nothing.
    rule = "logits = noisy = (logits > 0).float()"
    source = router_source(attributes="learns = False", init="self.weight.requires_grad_(False)", change=rule)
    report = examine(lab.train_router("fixed-rule", source).name)
    assert not codes(report) & {"MOE059", "MOE032", "MOE046", "MOE027"}


def test_a_router_that_raises_outside_training_is_a_problem(lab: Lab) -> None:
    source = router_source(change="assert len(x_TD) != 8 * 22, 'not this many'")
    report = examine(lab.train_router("raises", source).name)
    # Only the padded rows (8 of 15 + 7) have so many tokens: every other check is made.
    broken = {each.name for each in report.checks if "not this many" in each.detail}
    assert broken == {"padding-balance", "padding-outputs"}
    assert not report.ok and all(each.code is None for each in report.problems)


# --- faults in configuration and optimizer


def test_expert_choice_leaks_and_capacity_drops_in_eval(lab: Lab) -> None:
    train = {"allow_noncausal": True}
    report = examine(lab.train("chosen", moe={"router": {"name": "expert-choice"}}, train=train).name)
    assert codes(report, "problem") == {"MOE042"} and {each.layer for each in report.problems} == {0, 1}
    tight = {"router": {"name": "top2"}, "capacity": {"factor": 0.5, "in_eval": True}}
    assert found(examine(lab.train("tight", moe=tight).name), "MOE028").severity == "warning"


def test_weight_decay_on_the_router_is_found_in_what_the_optimizer_was(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decayed(model: nn.Module, settings: Any) -> torch.optim.AdamW:
        groups = optim.parameter_groups(model, settings)
        next(group for group in groups if group["name"] == "router")["weight_decay"] = 0.05
        return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "build_optimizer", decayed)
        lab.train("decayed")
    report = examine("decayed")
    assert codes(report, "problem") == {"MOE047"} and len(report.problems) == 2
    assert "layers.0.mlp.router.weight (0.05)" in report.problems[0].seen


def test_weight_decay_that_today_s_optimizer_would_give_is_found_too(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = optim.parameter_groups

    def one_group(model: nn.Module, settings: Any) -> list[dict[str, object]]:
        return [{**group, "weight_decay": 0.1} for group in original(model, settings)]

    monkeypatch.setattr("moectl.doctor.run_subject.parameter_groups", one_group)
    assert "would be decayed" in found(examine(healthy.name), "MOE047").seen


def test_experts_that_the_optimizer_does_not_have_are_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_experts(model: nn.Module, settings: Any) -> torch.optim.AdamW:
        groups = [group for group in optim.parameter_groups(model, settings) if group["name"] != "experts"]
        return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "build_optimizer", without_experts)
        lab.train("left-out")
    report = examine("left-out")
    assert codes(report, "problem") == {"MOE059"}
    assert (
        "not in the optimizer, and equal to step 0" in report.problems[0].seen
        and "gate_up_proj" in report.problems[0].seen
    )


def test_attention_without_its_mask_is_not_blamed_on_the_experts(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everywhere(length: int, *rest: Any) -> Tensor:
        return torch.ones(1, 1, length, length, dtype=torch.bool)

    monkeypatch.setattr(decoder, "attention_mask", everywhere)
    report = examine(healthy.name)
    assert "MOE006" in codes(report, "problem") and "MOE042" not in codes(report)


# --- faults in the weights


def identical(model: dict[str, Tensor]) -> None:
    for name in (UP, DOWN):
        model[name][2] = model[name][0]


def average_row(model: dict[str, Tensor]) -> None:
    """Expert 3's logit is the mean of two others': it is never the largest."""
    model[GATE][3] = (model[GATE][0] + model[GATE][1]) / 2


def zeros(model: dict[str, Tensor]) -> None:
    model[GATE].zero_()


def not_a_number(model: dict[str, Tensor]) -> None:
    model[DOWN][1, 0, 0] = float("nan")


def unmoved(model: dict[str, Tensor]) -> None:
    """Expert 1 as it was at step 0, of which the test keeps a copy."""
    for name, values in START.items():
        model[name][1] = values[1]


START: dict[str, Tensor] = {}


@pytest.mark.parametrize(
    ("name", "edit", "expected", "said"),
    [
        ("identical", identical, "MOE058", "1 of 6 pairs of experts are identical, such as 0 and 2"),
        ("dead", average_row, "MOE060", "expert 3 of 4 got none"),
        ("zero-gate", zeros, "MOE034", "the gate is all zeros"),
        ("nan", not_a_number, "MOE072", DOWN),
        ("unmoved", unmoved, "MOE059", f"experts 1 are equal to step 0, bit for bit, after {STEPS} steps"),
    ],
)
def test_a_fault_in_the_weights_is_found_under_its_code_and_in_its_layer(
    lab: Lab, healthy: Path, name: str, edit: Callable[[dict[str, Tensor]], None], expected: str, said: str
) -> None:
    from moectl.training.state import load_checkpoint

    START.update(
        {
            n: t
            for n, t in load_checkpoint(healthy / "checkpoints/step-00000000").tensors["model"].items()
            if n in (UP, DOWN)
        }
    )
    report = examine(lab.broken(healthy, name, edit).name)
    finding = found(report, expected)
    assert finding.severity == "problem" and finding.layer == 1 and said in finding.seen
    assert finding.todo and not report.ok
    if name == "dead":  # and the last expert is the one that bincount hides
        assert found(report, "MOE043").severity == "note"
    if name in ("identical", "unmoved"):
        assert codes(report) == {expected}


def test_a_model_in_bf16_is_found_by_its_gate(lab: Lab, healthy: Path) -> None:
    def halve(model: dict[str, Tensor]) -> None:
        for name, tensor in model.items():
            if tensor.is_floating_point() and "router.noise" not in name:
                model[name] = tensor.bfloat16()
        model["lm_head.weight"] = model["embed_tokens.weight"]

    report = examine(lab.broken(healthy, "halved", halve).name)
    finding = found(report, "MOE027")
    assert finding.severity == "problem" and "the gate is bfloat16" in finding.seen and "% of" in finding.seen


def test_a_balancing_bias_in_bf16_is_found(lab: Lab) -> None:
    """A buffer of a router stays in float32 whatever is done to it; a bias that is a parameter does not."""
    init = "self.expert_bias = torch.nn.Parameter(torch.zeros(num_experts))"
    source = router_source(init=init, change="noisy = logits + self.expert_bias")

    def halve(model: dict[str, Tensor]) -> None:
        model.update({name: tensor.bfloat16() for name, tensor in model.items()})
        model["lm_head.weight"] = model["embed_tokens.weight"]

    report = examine(lab.broken(lab.train_router("biased", source), "biased-halved", halve).name)
    assert "MOE041" not in codes(examine("biased"))
    finding = found(report, "MOE041")
    assert "router.expert_bias is bfloat16" in finding.seen and finding.severity == "problem"


def test_a_dead_expert_is_no_problem_where_the_tokens_cannot_tell(lab: Lab, healthy: Path) -> None:
    def few(model: dict[str, Tensor]) -> None:
        average_row(model)

    folder = lab.broken(healthy, "unlucky", few)
    # Its data is gone, so that random tokens stand in: what they do not reach, text may.
    record = RunDir.open(folder)
    record.update(data={**record.record["data"], "id": "gone", "folder": "/nowhere"})
    report = examine("unlucky")
    assert any("random token ids" in note and "gone" in note for note in report.notes)
    assert found(report, "MOE060").severity == "warning" and report.ok


def test_the_number_of_tokens_that_can_tell_is_that_of_the_binomial() -> None:
    """Against the plain definition: the least T with experts · (1 - q)^T <= ERROR."""
    for experts, top_k, total in ((4, 1, 8), (8, 2, 32), (128, 8, 6144), (2, 2, 2)):
        tokens = tokens_needed(experts, top_k, total)
        starved = STARVED * top_k / experts
        assert total * (1 - starved) ** tokens <= ERROR < total * (1 - starved) ** (tokens - 1)


# --- runs that cannot be looked at, or only in part


def test_a_damaged_checkpoint_is_a_problem_and_stays_where_it_is(lab: Lab, healthy: Path) -> None:
    folder = lab.runs / "damaged"
    shutil.copytree(healthy, folder)
    newest = folder / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    before = snapshot(folder)
    report = examine("damaged")
    assert report.subject.endswith("step 4") and not report.ok
    assert report.problems[0].code is None and "SHA-256" in report.problems[0].seen
    assert snapshot(folder) == before
    for file in (folder / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckError, match="no checkpoint of the run 'damaged' is intact"):
        examine("damaged")


def test_a_run_without_weights_and_an_unknown_one(lab: Lab, healthy: Path) -> None:
    RunDir.create("unborn", config_yaml="{}", record={}, runs_dir=lab.runs).release()
    with pytest.raises(NotFoundError, match="'unborn' .lost. has no weights yet") as caught:
        examine("unborn")
    assert caught.value.exit_code == 4
    with pytest.raises(NotFoundError, match="no run 'healhty'") as caught:
        examine("healhty")
    assert "'healthy'" in (caught.value.hint or "")


def test_a_run_whose_router_is_missing_names_it(lab: Lab) -> None:
    folder = lab.train_router("orphan", router_source())
    (lab.folder / "orphan.py").unlink()
    assert examine("orphan").ok  # the run keeps a copy
    (folder / "router.py").unlink()
    with pytest.raises(MoectlError, match="the run 'orphan' was trained with the router '.*orphan.py:Mine'") as caught:
        examine("orphan")
    assert "no router file" in caught.value.message

"""Damage to the newest checkpoint of an interrupted run: found, set aside, and recovered from the one before.

Each run goes on from the checkpoint before, and ends with the same weights, moments, generators, logged numbers and
registry as the run that was never touched. "by": what finds it. *hash*: size or SHA-256 against the manifest;
*content*: the manifest is right (as another tool would write it), and what is in it is not what this run needs.

==================================  ========  =================================================
damage                              by        afterwards
==================================  ========  =================================================
a file is missing                   hash      set aside as step-XXXXXXXX.bad-1
weights cut in half                 hash      set aside
the folder is empty                 hash      set aside
a byte of the weights flipped       hash      set aside
the manifest is missing             hash      set aside
the manifest of another checkpoint  hash      set aside
state.json is garbage               hash      set aside
a file of zero bytes, in full size  hash      set aside
the optimizer is missing            content   set aside
a generator is missing              content   set aside
another shape                       content   set aside
experts one by one, not fused       content   set aside
another number of processes         content   set aside
no data cursor                      content   set aside
no model described                  content   set aside
state.json of another step          content   set aside
state.json is no state              content   set aside
a moment of another shape or dtype  content   set aside
no moments                          content   set aside
a zeroed generator                  content   set aside
an impossible cursor, token count,  content   set aside
record, best evaluation
capacity factors, collapse counters content   set aside
or spike losses missing or no       content   set aside
numbers
a manifest without a key            content   set aside
may not be read                     system    skipped and left where it is: it may be good
==================================  ========  =================================================
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from moectl import paths
from moectl.corpus.loader import PackedDataset
from moectl.disk import describe
from moectl.errors import CheckError, ConfigError, MoectlError
from moectl.runs.rundir import RunDir
from moectl.runs.store import Registry
from moectl.training import checkpoint_files as files
from moectl.training import state
from moectl.training.checkpoint_root import REPLACED, TEMPORARY, prune
from moectl.training.state import checkpoint_steps, load_checkpoint, step_name
from moectl.training.trainer import Trainer
from moectl.walk.loading import load_run
from moectl.walk.train import RunRequest, resume_run, start_run
from tests.support import of_the_clock, write_corpus
from tests.walk.test_train import experiment, interrupted

Tensors = dict[str, dict[str, Tensor]]
CHANGES = {
    "moe": {"router": {"name": "topk", "top_k": 2, "noise_std": 0.2}, "capacity": {"factor": 1.3, "dynamic": True}},
    "train": {"steps": 8, "checkpoint_every": 2, "eval_every": 3},
}
NEWEST, BEFORE = 5, 4


class Place(NamedTuple):
    """A home with a run that ended and a template of one that was interrupted after step 5."""

    home: Path
    whole: Path
    template: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("damage")
    write_corpus(folder / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(folder / "home"))
        whole = start_run(experiment(folder, name="whole", **CHANGES), RunRequest())
        cut = interrupted(folder, NEWEST, name="cut", **CHANGES)
    assert (whole.status, cut.status) == ("finished", "interrupted")
    shutil.move(cut.folder, folder / "template")
    return Place(folder, whole.folder, folder / "template")


@pytest.fixture
def run(place: Place, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the interrupted run, in the home."""
    monkeypatch.setenv("MOECTL_HOME", str(place.home / "home"))
    folder = paths.runs_dir() / re.sub("[^a-z]+", "-", request.node.name).strip("-")
    shutil.copytree(place.template, folder)
    assert checkpoint_steps(folder / "checkpoints") == [0, 3, BEFORE, NEWEST]
    return RunDir.open(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def forge(folder: Path, change: Callable[[dict[str, Any], Tensors], object]) -> None:
    """The checkpoint with something else in it, and a manifest that vouches for that."""
    good = load_checkpoint(folder)
    state, tensors = dict(good.state), {part: dict(each) for part, each in good.tensors.items()}
    change(state, tensors)
    shutil.rmtree(folder)
    folder.mkdir()
    files.write_folder(folder, good.step, tensors, state)


def one_by_one(state: dict[str, Any], tensors: Tensors) -> None:
    """Experts under names of their own, as older releases of transformers keep them."""
    for name in [name for name in tensors["model"] if name.endswith("experts.gate_up_proj")]:
        stacked = tensors["model"].pop(name)
        for expert, matrix in enumerate(stacked):
            gate, up = matrix.chunk(2)
            tensors["model"][name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.clone()
            tensors["model"][name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.clone()


def another_shape(state: dict[str, Any], tensors: Tensors) -> None:
    tensors["model"]["norm.weight"] = tensors["model"]["norm.weight"][:-1].clone()


def moment(
    state: dict[str, Any], tensors: Tensors, change: Callable[[Tensor], Tensor], *, vouched: bool = False
) -> None:
    """Another shape or dtype of a moment, which the fused kernel would run over; JSON may agree with it."""
    spoilt = tensors["optimizer"]["norm.weight/exp_avg"] = change(tensors["optimizer"]["norm.weight/exp_avg"]).clone()
    if vouched:
        kinds = state["optimizer"]["params"]["norm.weight"]["state"]["tensors"]
        kinds["exp_avg"] = f"{list(spoilt.shape)} {spoilt.dtype}"


def no_moments(state: dict[str, Any], tensors: Tensors) -> None:
    tensors["optimizer"].clear()
    for entry in state["optimizer"]["params"].values():
        entry["state"] = None


def without(folder: Path, key: str) -> None:
    """A manifest that lacks a key, with a right hash of itself."""
    manifest = json.loads((folder / "manifest.json").read_text("ascii"))
    del manifest["sha256"], manifest[key]
    manifest["sha256"] = files._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="ascii")


def no_state(folder: Path) -> None:
    """Garbage with a right manifest."""
    forge(folder, lambda state, tensors: None)
    (folder / "state.json").write_text("[1, 2", encoding="ascii")
    manifest = json.loads((folder / "manifest.json").read_text("ascii"))
    manifest["files"]["state.json"] = describe(folder / "state.json")
    del manifest["sha256"]
    manifest["sha256"] = files._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="ascii")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def another_manifest(folder: Path) -> None:
    shutil.copy(folder.with_name(f"step-{BEFORE:08d}") / "manifest.json", folder)


BY_HASH: dict[str, Callable[[Path], object]] = {
    "missing-file": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated-weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "empty-folder": empty,
    "flipped-byte": lambda folder: flip(folder / "model.safetensors"),
    "missing-manifest": lambda folder: (folder / "manifest.json").unlink(),
    "another-manifest": another_manifest,
    "garbage-state": lambda folder: (folder / "state.json").write_bytes(os.urandom(3000)),
    "zeroed-optimizer": lambda folder: zeros(folder / "optimizer.safetensors"),
}
BY_CONTENT: dict[str, Callable[[dict[str, Any], Tensors], object]] = {
    "missing-optimizer": lambda state, tensors: tensors.pop("optimizer"),
    "missing-generator": lambda state, tensors: tensors["rng"].pop("torch"),
    "missing-generators": lambda state, tensors: tensors.pop("rng"),
    "another-shape": another_shape,
    "experts-one-by-one": one_by_one,
    "another-world-size": lambda state, tensors: state.update(world_size=4),
    "no-cursor": lambda state, tensors: state["sampler"].pop("position"),
    "no-model-described": lambda state, tensors: state.update(model={}),
    "another-step": lambda state, tensors: state.update(step=BEFORE),
    "moment-shape": lambda state, tensors: moment(state, tensors, lambda tensor: tensor[:3]),
    "moment-dtype": lambda state, tensors: moment(state, tensors, Tensor.half),
    "moment-shape-vouched": lambda state, tensors: moment(state, tensors, lambda tensor: tensor[:3], vouched=True),
    "moment-dtype-vouched": lambda state, tensors: moment(state, tensors, Tensor.half, vouched=True),
    "no-moments": no_moments,
    "zeroed-generator": lambda state, tensors: tensors["rng"]["torch"].zero_(),
    "negative-cursor": lambda state, tensors: state["sampler"].update(position=-7),
    "cursor-too-low": lambda state, tensors: state["sampler"].update(position=NEWEST * 4 - 1),
    "other-tokens": lambda state, tensors: state.update(tokens=1),
    "half-a-record": lambda state, tensors: state["record"].pop("events"),
    "no-record": lambda state, tensors: state.update(record=None),
    "record-in-words": lambda state, tensors: state["record"].update(metrics="all"),
    "best-in-words": lambda state, tensors: state.update(best={"metric": "eval/lm_loss", "value": "x", "step": 3}),
    "no-capacity-factors": lambda state, tensors: state.update(capacity={}),
    "capacity-in-words": lambda state, tensors: state["capacity"].update({"0": "wide"}),
    "no-checks-in-a-row": lambda state, tensors: state["monitor"].update(collapse={"in_a_row": {}}),
    "losses-in-words": lambda state, tensors: state["spikes"].update(losses=["x"]),
    "no-pieces": lambda state, tensors: state.update(pieces=0),
}
DAMAGE = {
    **BY_HASH,
    **{name: (lambda folder, change=change: forge(folder, change)) for name, change in BY_CONTENT.items()},
    "no-state": no_state,
    **{f"manifest-without-{key}": lambda f, k=key: without(f, k) for key in ("aliases", "format", "step", "files")},
}


def rows(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [
        (line["step"], line["tokens"], {k: v for k, v in line["values"].items() if not of_the_clock(k)})
        for line in lines
    ]


def registered(run: str) -> dict[str, Any]:
    registry = Registry(paths.registry_path())
    try:
        names = [name for name in registry.metric_names(run) if not of_the_clock(name)]
        return {name: [(point.step, point.value) for point in registry.metrics(run, name)] for name in names}
    finally:
        registry.close()


def assert_recovered(place: Place, run: RunDir, said: list[str]) -> None:
    """It went on from the checkpoint before, and is now the run that was never touched."""
    assert any(f"resuming {run.id} from step {BEFORE}" in line for line in said), said
    assert rows(run.path) == rows(place.whole)
    assert registered(run.id) == registered(place.whole.name) != {}
    for part in ("model", "optimizer", "rng", "routing"):
        ours, theirs = (folder / f"checkpoints/step-00000008/{part}.safetensors" for folder in (run.path, place.whole))
        assert ours.read_bytes() == theirs.read_bytes(), part


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_recovered_from(place: Place, run: RunDir, damage: str) -> None:
    newest = run.checkpoints / f"step-{NEWEST:08d}"
    DAMAGE[damage](newest)
    said: list[str] = []
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    assert any(newest.name in line and f"set aside as {newest.name}.bad-1" in line for line in said), said
    assert newest.with_name(f"{newest.name}.bad-1").is_dir()
    events = [event for event in run.events() if event["kind"] == "bad_checkpoint"]
    assert len(events) == 1 and newest.name in events[0]["message"]
    assert_recovered(place, run, said)


def test_a_checkpoint_that_may_not_be_read_is_skipped_and_stays(place: Place, run: RunDir) -> None:
    """A link to itself, which not even root can read; rights are tried in the tests of the checkpoint contract."""
    weights = run.checkpoints / f"step-{NEWEST:08d}" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights.name)
    said: list[str] = []
    loaded = load_run(run.path)
    assert loaded.step == BEFORE and "is skipped" in loaded.messages[0]
    assert checkpoint_steps(run.checkpoints)[-1] == NEWEST, "it may be good: it is left where it is"
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    assert any("is skipped" in line for line in said)
    assert_recovered(place, run, said)


@pytest.mark.parametrize("damage", ["missing-optimizer", "another-world-size"])
def test_where_none_fits_none_is_set_aside(run: RunDir, damage: str) -> None:
    """The fault is then rather with who asks than with all of them."""
    before = sorted(entry.name for entry in run.checkpoints.iterdir())
    for step in checkpoint_steps(run.checkpoints):
        forge(run.checkpoints / f"step-{step:08d}", BY_CONTENT[damage])
    with pytest.raises(CheckError, match=f"step-{NEWEST:08d}"):
        resume_run(run.id, RunRequest())
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == before
    again = RunDir.open(run.path)
    assert again.status == "interrupted" and not again.live and again.record == run.record


def test_where_all_are_damaged_it_says_so(run: RunDir) -> None:
    for step in checkpoint_steps(run.checkpoints):
        flip(run.checkpoints / f"step-{step:08d}" / "rng.safetensors")
    assert load_run(run.path).step == NEWEST, "who reads the model alone needs no generators"
    with pytest.raises(CheckError, match="no checkpoint in .* is intact") as caught:
        resume_run(run.id, RunRequest())
    assert f"step-{NEWEST:08d}.bad-1" in caught.value.message
    with pytest.raises(MoectlError):
        resume_run(run.id, RunRequest())


def test_evaluation_falls_back_too(run: RunDir) -> None:
    forge(run.checkpoints / f"step-{NEWEST:08d}", one_by_one)
    loaded = load_run(run.path)
    assert loaded.step == BEFORE and "missing: layers.0.mlp.experts.gate_up_proj" in loaded.messages[0]


# --- the record, and who else is there


class Died(Exception):
    """What stands for a kill."""


def kinds(run: RunDir, kind: str) -> list[str]:
    return [event["message"] for event in run.events() if event["kind"] == kind]


def test_a_bad_checkpoint_stays_in_the_record_though_the_process_that_found_it_dies(
    place: Place, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run.checkpoints / f"step-{NEWEST:08d}" / "model.safetensors")

    def dies(trainer: Trainer) -> Any:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Trainer, "optimizer_step", dies)
        resume_run(run.id, RunRequest())
    said: list[str] = []
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    assert len(kinds(run, "bad_checkpoint")) == 1 and f"step-{NEWEST:08d}" in kinds(run, "bad_checkpoint")[0]
    assert_recovered(place, run, said)


@pytest.mark.parametrize("left", [0, 2, None], ids=["none", "two", "all"])
def test_a_record_that_has_lost_lines_is_told_of(run: RunDir, left: int | None) -> None:
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_bytes(b"".join(lines[:left]))
    said: list[str] = []
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    expected = "metrics.jsonl has lost lines since the checkpoint was written: they stay lost"
    assert [line for line in said if "warning" in line] == ([] if left is None else [f"warning: {expected}"])
    assert kinds(run, "warning") == ([] if left is None else [expected])
    assert len({row.step for row in run.metrics()}) == (9 if left is None else left + 3)


def test_a_line_removed_by_hand_doubles_no_other(place: Place, run: RunDir) -> None:
    """As a kill leaves it after step 5, with the checkpoint of step 4 the newest: its rows end where the file does."""
    shutil.rmtree(run.checkpoints / f"step-{NEWEST:08d}")
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert sum(json.loads(line)["step"] == NEWEST for line in lines) == 1
    (run.path / "metrics.jsonl").write_bytes(b"".join([lines[0], *lines[3:]]))
    assert resume_run(run.id, RunRequest()).status == "finished"
    whole = rows(place.whole)
    assert rows(run.path) == [whole[0], *whole[3:]]


@pytest.mark.parametrize("keep_best", [True, False])
def test_what_a_kill_after_the_last_checkpoint_leaves_is_removed(
    place: Place, monkeypatch: pytest.MonkeyPatch, keep_best: bool
) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(place.home / "home"))
    name = f"last-{keep_best}".lower()
    changes = {"train": {**CHANGES["train"], "keep_checkpoints": 1, "keep_best": keep_best}}
    config = experiment(place.home, name=name, **changes)

    def dies(root: Path, kept: Any) -> None:
        if 8 in checkpoint_steps(root):
            (root / f"{TEMPORARY}pruned-step-00000002-aa").mkdir()
            raise Died
        prune(root, kept)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(state, "prune", dies)
        start_run(config, RunRequest())
    run = RunDir.open(paths.runs_dir() / name)
    assert len(list(run.checkpoints.iterdir())) > 3
    assert resume_run(name, RunRequest()).status == "finished"
    run.reload()
    left = sorted(entry.name for entry in run.checkpoints.iterdir())
    assert left == sorted(step_name(step) for step in {0, 8, 8 if not keep_best else run.record["best"]["step"]}), left


def test_a_run_that_another_process_ends_meanwhile_is_not_opened_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, nested = PackedDataset.open.__func__, []  # type: ignore[attr-defined]

    def slow(cls: type, *args: Any) -> Any:
        if not nested:
            nested.append(True)
            assert resume_run(run.id, RunRequest()).status == "finished"
        return original(cls, *args)

    monkeypatch.setattr(PackedDataset, "open", classmethod(slow))
    with pytest.raises(ConfigError, match="has finished: there is nothing to resume"):
        resume_run(run.id, RunRequest())
    again = RunDir.open(run.path)
    assert again.status == "finished" and not again.live and len(kinds(again, "resumed")) == 1


def test_a_run_without_a_checkpoint_that_another_process_trains_meanwhile_is_not_begun_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process asks while the run has no checkpoint, the second one finishes it before the first begins."""
    monkeypatch.setenv("MOECTL_HOME", str(place.home / "home"))
    config = experiment(place.home, name="twice", train={"steps": 3})

    def dies(trainer: Trainer) -> Any:
        raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Trainer, "train", dies)
        start_run(config, RunRequest())
    acquire, nested = RunDir.acquire, []

    def slow(self: RunDir) -> RunDir:
        if not nested:
            nested.append(True)
            assert start_run(config, RunRequest(go_on=True)).status == "finished"
        return acquire(self)

    monkeypatch.setattr(RunDir, "acquire", slow)
    with pytest.raises(ConfigError, match="by another process meanwhile"):
        start_run(config, RunRequest(go_on=True))
    again = RunDir.open(paths.runs_dir() / "twice")
    assert again.status == "finished" and not again.live and checkpoint_steps(again.checkpoints)[-1] == 3


def test_other_threads_torch_or_device_than_before_are_told_of(run: RunDir) -> None:
    versions = run.record["versions"]
    run.update(threads=7, devices=["A card"], versions={**versions, "torch": "1.0"})
    said: list[str] = []
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    expected = [
        f"torch was 1.0, and is {versions['torch']} now: from here on numbers may differ in their last bits",
        "device was A card, and is cpu now: from here on numbers may differ in their last bits",
        "threads was 7, and is 1 now: from here on numbers may differ in their last bits",
    ]
    assert [line for line in said if "warning" in line] == [f"warning: {text}" for text in expected]
    assert kinds(run, "warning") == expected
    run.reload()
    assert (run.record["threads"], run.record["devices"]) == (1, ["cpu"])


def test_the_first_checkpoint_killed_while_it_was_replaced_is_found(run: RunDir) -> None:
    for step in checkpoint_steps(run.checkpoints)[1:]:
        shutil.rmtree(run.checkpoints / step_name(step))
    (run.checkpoints / step_name(0)).rename(run.checkpoints / f"{REPLACED}{step_name(0)}")
    said: list[str] = []
    assert resume_run(run.id, RunRequest(say=said.append)).status == "finished"
    assert any(f"resuming {run.id} from step 0" in line for line in said)

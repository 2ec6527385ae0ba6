"""The checkpoint contract, against real damage, a real full disk and real kills."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moectl.errors import CheckError, MoectlError, NotFoundError
from moectl.training import checkpoint_root
from moectl.training.state import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    load_model_strict,
    newest_checkpoint,
    newest_usable,
    save_checkpoint,
)

torch.set_num_threads(1)


def parts(step: int = 0, size: int = 64) -> dict[str, dict[str, Tensor]]:
    values = torch.arange(size, dtype=torch.float32) + step
    return {"model": {"weight": values, "bias": -values[:3].clone()}, "optimizer": {"moment": values * 2}}


def save(root: Path, *steps: int, keep: int = 100) -> Path:
    for step in steps:
        folder = save_checkpoint(root, step, parts(step), {"step": step, "loss": 0.1 + step}, keep=keep)
    return folder


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    alike = first.dtype == second.dtype and first.shape == second.shape
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)] if alike else []
    return alike and torch.equal(*flat)


# --- what is saved comes back -------------------------------------------------------------------------


def test_layout_is_the_contract(tmp_path: Path) -> None:
    folder = save(tmp_path / "run" / "checkpoints", 200)
    assert folder == tmp_path / "run" / "checkpoints" / "step-00000200"
    assert names(folder) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    for name, listed in manifest["files"].items():
        assert listed["size"] == (folder / name).stat().st_size
        # From the system's own tool, not from the code under test.
        digest = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True)
        assert listed["sha256"] == digest.stdout.split()[0]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1, "all files get the permissions that the user's umask gives"
    assert names(folder.parent) == ["step-00000200"]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e4m3fn),
        *(
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.uint16,
            torch.uint32,
            torch.bool,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (4, 0, 2)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    low, high = (0, 2) if dtype == torch.bool else (0, 256)
    raw = torch.randint(low, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = raw.view(dtype).reshape(shape)
    folder = save_checkpoint(tmp_path, 1, {"model": {"x": tensor}}, {}, keep=1)
    assert same(load_checkpoint(folder).tensors["model"]["x"], tensor)


def test_special_floats_keep_their_bits(tmp_path: Path) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 5e-324], dtype=torch.float64)
    folder = save_checkpoint(tmp_path, 1, {"model": {"x": tensor}}, {}, keep=1)
    assert same(load_checkpoint(folder).tensors["model"]["x"], tensor)


def test_views_overlaps_and_ties(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    tensors = {
        "whole": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "row": base[1],
        "overlapping": base.reshape(-1)[3:15],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "tied": base,
        "tied_view": base.view(4, 6),
        "conjugate": conjugate,
        "negative": conjugate.imag,
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "lone_slice": torch.arange(1000.0)[5:7],
    }
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    folder = save_checkpoint(tmp_path, 1, {"model": tensors, "empty": {}}, {}, keep=1)
    loaded = load_checkpoint(folder).tensors
    assert loaded["empty"] == {} and loaded["model"].keys() == tensors.keys()
    for name, tensor in before.items():
        assert same(loaded["model"][name], tensor), name
        assert loaded["model"][name].is_contiguous()
    assert loaded["model"]["tied"] is loaded["model"]["whole"]
    assert loaded["model"]["tied_view"] is loaded["model"]["whole"]
    assert loaded["model"]["row"].data_ptr() != loaded["model"]["whole"][1].data_ptr()
    assert tensors["whole"].data_ptr() == base.data_ptr(), "saving leaves the caller's tensors alone"
    assert (folder / "model.safetensors").stat().st_size < 3000, "the lone slice is saved without its base"


def test_loaded_tensors_outlive_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    loaded = load_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 10)
    shutil.rmtree(folder)
    assert same(loaded.tensors["model"]["weight"], parts(7)["model"]["weight"])


def test_json_state_round_trips_exactly(tmp_path: Path) -> None:
    generator = random.Random(0)
    state = {
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1.0, 1e22, math.pi],
        "many": [generator.uniform(-1, 1) * 10.0 ** generator.randint(-300, 300) for _ in range(500)],
        "infinite": [float("inf"), -float("inf")],
        "string": "NaN",
        "big": 2**80 + 1,
        "nested": {
            "betas": (0.9, 0.95),
            "none": None,
            "flag": True,
            "empty": [],
            "void": {},
            "pair": ((), 1),
        },
        "unicode": "é 漢 \ud800 \n",
    }
    folder = save_checkpoint(tmp_path, 1, {}, {**state, "nan": float("nan")}, keep=1)
    loaded = load_checkpoint(folder).state
    assert math.isnan(loaded.pop("nan"))
    assert repr(loaded) == repr(state)
    strict = json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)
    assert strict["string"] == "NaN" and strict["nan"] != "NaN"


@pytest.mark.parametrize(
    ("tensors", "state", "kind", "match"),
    [
        ({}, {"a": {"b": [torch.ones(1)]}}, TypeError, r"state\.a\.b\[0\]: a Tensor"),
        ({}, {"a": {1: 2}}, TypeError, "key 1 is no string"),
        ({}, {"a": {"$float": "NaN"}}, ValueError, "reserved"),
        ({"../evil": {}}, {}, ValueError, "cannot name a part"),
        ({"model": {"x": torch.ones(2, device="meta")}}, {}, TypeError, "'x'"),
        ({"model": {"x": torch.eye(2).to_sparse()}}, {}, TypeError, "'x'"),
        ({"model": {"x": torch.ones(2, dtype=torch.complex128)}}, {}, TypeError, "complex128"),
        ({"model": {"__metadata__": torch.ones(2)}}, {}, ValueError, "reserved"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(
    tmp_path: Path, tensors: dict, state: dict, kind: type[Exception], match: str
) -> None:
    save(tmp_path, 1)
    with pytest.raises(kind, match=match):
        save_checkpoint(tmp_path, 2, tensors, state, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_parts_are_read_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    damage_payload(folder / "optimizer.safetensors")
    loaded = load_checkpoint(folder, parts=["model"])
    assert loaded.tensors.keys() == {"model"} and loaded.state["step"] == 3
    assert newest_checkpoint(tmp_path, parts={"model"})[0].step == 3
    for read, place in ((load_checkpoint, folder), (newest_checkpoint, tmp_path)):
        with pytest.raises(NotFoundError, match="no part 'ema'") as caught:
            read(place, parts=["model", "ema"])
        assert "model, optimizer" in str(caught.value.hint)
    assert names(tmp_path) == ["step-00000003"], "a part nobody saved is no damage"


# --- damage -------------------------------------------------------------------------------------------


def damage_payload(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x01
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    for entry in path.parent.iterdir():
        entry.unlink()


DAMAGE = {
    "truncated": (truncate, "model.safetensors", r"model\.safetensors has \d+ bytes"),
    "flipped": (damage_payload, "model.safetensors", r"model\.safetensors is damaged"),
    "flipped_state": (damage_payload, "state.json", r"state\.json is damaged"),
    "missing": (Path.unlink, "optimizer.safetensors", r"optimizer\.safetensors is missing"),
    "empty_folder": (empty, "manifest.json", r"manifest\.json is missing"),
    "no_manifest": (Path.unlink, "manifest.json", r"manifest\.json is missing"),
    "cut_manifest": (truncate, "manifest.json", r"manifest\.json is damaged"),
    "blank_manifest": (lambda path: path.write_bytes(b""), "manifest.json", r"manifest\.json is damaged"),
    "list_manifest": (lambda path: path.write_text("[1]"), "manifest.json", r"manifest\.json is damaged"),
    "extra": (
        lambda path: path.write_text("?"),
        "ema.safetensors",
        r"ema\.safetensors is not in the manifest",
    ),
    "zeroed": (
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "optimizer.safetensors",
        r"optimizer\.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_set_aside(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1, 2, 3)
    bad = tmp_path / "step-00000003"
    harm, name, message = DAMAGE[kind]
    harm(bad / name)
    with pytest.raises(CheckError, match=message) as caught:
        load_checkpoint(bad)
    assert caught.value.exit_code == 3
    assert bad.is_dir(), "reading one checkpoint moves nothing"

    found, messages = newest_checkpoint(tmp_path)
    assert found.step == 2 and found.state == {"step": 2, "loss": 2.1}
    assert same(found.tensors["model"]["weight"], parts(2)["model"]["weight"])
    assert len(messages) == 1 and "step-00000003.bad-1" in messages[0] and name in messages[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.bad-1"]
    assert newest_checkpoint(tmp_path)[1] == [], "said once"


def test_any_single_flipped_byte_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    good = load_checkpoint(folder)
    generator = random.Random(1)
    caught = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for position in generator.sample(range(len(data)), min(90, len(data))):
            flipped = bytearray(data)
            flipped[position] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            try:
                loaded = load_checkpoint(folder)
            except CheckError as error:
                caught += 1
                assert path.name in error.message or path.name == "manifest.json"
            else:  # white space of the manifest, which means nothing
                assert path.name == "manifest.json" and chr(data[position]).isspace()
                assert loaded.state == good.state
        path.write_bytes(data)
    assert caught > 200
    load_checkpoint(folder)


def test_a_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    with pytest.raises(CheckError, match="is that of step 2"):
        load_checkpoint(tmp_path / "step-00000009")
    copied = shutil.copytree(tmp_path / "step-00000009", tmp_path / "my-copy")
    assert load_checkpoint(copied).step == 2, "any other name is the user's to give"


def test_a_later_format_is_not_damage(tmp_path: Path) -> None:
    from moectl.training import checkpoint_files

    folder = save(tmp_path, 1, 2)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    del manifest["sha256"]
    manifest["sha256"] = checkpoint_files._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MoectlError, match="format 99") as caught:
        newest_checkpoint(tmp_path)
    assert caught.value.exit_code == 1 and checkpoint_steps(tmp_path) == [1, 2]


def test_hidden_files_and_strangers_are_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, 2)
    (folder / ".DS_Store").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000042").write_text("a file, not a folder")
    (tmp_path / "step-7").mkdir()
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert newest_checkpoint(tmp_path)[0].step == 2
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-00000003", "step-00000042", "step-7"]


def test_all_bad_then_none(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 1, 2)
        for step in (1, 2):
            truncate(tmp_path / f"step-{step:08d}" / "model.safetensors")
        with pytest.raises(CheckError, match=r"step-00000002\.bad-.*step-00000001\.bad-") as caught:
            newest_checkpoint(tmp_path)
        assert caught.value.exit_code == 3
    assert names(tmp_path) == [f"step-0000000{step}.bad-{number}" for step in (1, 2) for number in (1, 2)]
    with pytest.raises(NotFoundError) as caught:
        newest_checkpoint(tmp_path)
    assert caught.value.exit_code == 4 and "step-00000001.bad-1" in str(caught.value.hint)


def test_absent_folders(tmp_path: Path) -> None:
    assert checkpoint_steps(tmp_path / "no") == []
    with pytest.raises(NotFoundError):
        newest_checkpoint(tmp_path / "no")
    save(tmp_path, 1, 2)
    with pytest.raises(NotFoundError) as caught:
        load_checkpoint(tmp_path / "step-00000003")
    assert "1, 2" in str(caught.value.hint)


# --- pruning and replacing ----------------------------------------------------------------------------


def test_pruning_keeps_newest_and_protected(tmp_path: Path) -> None:
    for step in range(0, 60, 10):
        save_checkpoint(tmp_path, step, parts(step), {}, keep=2, protect={0, 20})
    assert checkpoint_steps(tmp_path) == [0, 20, 40, 50]
    save(tmp_path, 60, keep=1)
    assert names(tmp_path) == ["step-00000060"]


def test_the_new_one_is_never_pruned(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 15, keep=1)
    assert checkpoint_steps(tmp_path) == [15, 30]


def test_bad_ones_set_aside_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    truncate(tmp_path / "step-00000002" / "model.safetensors")
    newest_checkpoint(tmp_path)
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002.bad-1", "step-00000003"]


def test_a_step_saved_again_replaces_the_old(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    (folder / "stray").write_text("old")
    save_checkpoint(tmp_path, 4, {"model": {"x": torch.ones(2)}}, {"new": True}, keep=3)
    loaded = load_checkpoint(folder)
    assert loaded.state == {"new": True} and loaded.tensors.keys() == {"model"}
    assert names(tmp_path) == ["step-00000004"]


def test_a_failed_replacement_keeps_the_old(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 4, parts(9), {"x": object()}, keep=1)
    assert newest_checkpoint(tmp_path)[0].state["step"] == 4


def test_steps_past_eight_digits(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 123_456_789)
    assert newest_checkpoint(tmp_path)[0].step == 123_456_789


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (1, 0)])
def test_senseless_numbers(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match="keep must be"):
        save_checkpoint(tmp_path, step, {}, {}, keep=keep)


# --- full disks, folders one cannot write to ----------------------------------------------------------

LIMITED = """
import json, resource, sys, torch
from pathlib import Path
from moectl.errors import MoectlError
from moectl.training.state import save_checkpoint
root = Path(sys.argv[1])
save_checkpoint(root, 1, {"model": {"x": torch.ones(1000)}}, {}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
cases = {"tensors": ({"model": {"x": torch.ones(100_000)}}, {}), "state": ({}, {"x": [0] * 100_000})}
for name, (tensors, state) in cases.items():
    for step in (1, 2):
        try:
            save_checkpoint(root, step, tensors, state, keep=1)
        except MoectlError as error:
            print(json.dumps([name, step, error.message, error.exit_code, error.__cause__.errno]))
"""


def test_a_file_size_limit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(name, step) for name, step, *_ in rows] == [(n, s) for n in ("tensors", "state") for s in (1, 2)]
    for _, step, message, code, number in rows:
        assert code == 1 and number == errno.EFBIG and "disk is full" in message
        assert ("the checkpoint of step 1 is untouched" in message) == (step == 2)
    assert names(tmp_path) == ["step-00000001"]
    assert same(newest_checkpoint(tmp_path)[0].tensors["model"]["x"], torch.ones(1000))


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    if shutil.which("mount") is None or subprocess.run(["mount", *options, folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with mounted(root, "-t", "tmpfs", "-o", "size=256k", "tmpfs"):
        saved = []
        with pytest.raises(MoectlError, match="disk is full") as caught:
            for step in range(1, 100):
                save_checkpoint(root, step, parts(step, size=5000), {"step": step}, keep=100)
                saved.append(step)
        assert caught.value.exit_code == 1 and isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert f"the checkpoint of step {saved[-1]} is untouched" in caught.value.message
        assert len(saved) >= 2 and names(root) == [f"step-{step:08d}" for step in saved]
        assert newest_checkpoint(root)[0].state == {"step": saved[-1]}
        shutil.rmtree(root / "step-00000001")
        save_checkpoint(root, 50, parts(50, size=5000), {"step": 50}, keep=1)
        assert names(root) == ["step-00000050"], "with room again, it goes on"


def test_a_checkpoint_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """Ten million gigabytes, in a tensor that takes none itself; a tied one is counted once."""
    save(tmp_path, 1)
    endless = torch.zeros(1).expand(10**16)
    with pytest.raises(MoectlError, match=r"the disk is full.*it takes about .* MB, and [\d,.]+ MB are free") as caught:
        save_checkpoint(tmp_path, 2, {"model": {"x": endless, "tied": endless}}, {}, keep=1)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert (
        "40,000,000,000.0 MB" in caught.value.message
        and "the checkpoint of step 1 is untouched" in caught.value.message
    )
    assert "moectl runs rm" in str(caught.value.hint) and "train.keep_checkpoints=1" in str(caught.value.hint)
    assert names(tmp_path) == ["step-00000001"]


def test_a_read_only_file_system(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    with mounted(root, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        save(root, 1, 2)
        truncate(root / "step-00000002" / "model.safetensors")
        subprocess.run(["mount", "-o", "remount,ro", root], check=True)
        found, messages = newest_checkpoint(root)
        assert found.step == 1 and "cannot be renamed" in messages[0] and "step-00000002" in messages[0]
        with pytest.raises(MoectlError, match="Read-only file system") as caught:
            save(root, 3)
        assert caught.value.exit_code == 1


@contextmanager
def without_rights(root: Path) -> Iterator[None]:
    """``root`` cannot be written to: by its mode, and as nobody where the tests run as root."""
    root.chmod(0o555)
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)
        root.chmod(0o755)


def test_a_folder_without_write_permission() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        root = Path(name) / "checkpoints"
        save(root, 1, 2)
        damage_payload(root / "step-00000002" / "model.safetensors")
        with without_rights(root):
            with pytest.raises(MoectlError, match="Permission denied") as caught:
                save(root, 3)
            assert caught.value.exit_code == 1
            found, messages = newest_checkpoint(root)
            assert found.step == 1 and "cannot be renamed" in messages[0]
        assert names(root) == ["step-00000001", "step-00000002"]

        (root / "step-00000001" / "model.safetensors").chmod(0o000)
        with without_rights(root), pytest.raises(MoectlError, match="Permission denied") as caught:
            load_checkpoint(root / "step-00000001")
        assert not isinstance(caught.value, CheckError), "missing rights are no damage"


def test_a_checkpoint_that_may_not_be_read_is_skipped_and_stays() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        root = Path(name) / "checkpoints"
        save(root, 1, 2, 3)
        for step in (2, 3):
            (root / f"step-0000000{step}" / "model.safetensors").chmod(0o000)
        with without_rights(root):
            found, messages = newest_checkpoint(root)
            assert (
                found.step == 1
                and [("is skipped" in m, "Permission denied" in m) for m in messages] == [(True,) * 2] * 2
            )
        assert checkpoint_steps(root) == [1, 2, 3]
        (root / "step-00000001" / "model.safetensors").chmod(0o000)
        with without_rights(root), pytest.raises(MoectlError, match="step-00000003.*Permission denied") as caught:
            newest_checkpoint(root)
        assert not isinstance(caught.value, CheckError), "they may all be good"


def test_what_is_refused_is_set_aside_once_an_older_one_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)

    def use(checkpoint: Checkpoint) -> str:
        if checkpoint.step > limit:
            raise CheckError(f"{checkpoint.step} does not fit")
        return f"used {checkpoint.step}"

    limit = 0
    with pytest.raises(CheckError, match="^3 does not fit$"):
        newest_usable(tmp_path, use)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]
    limit = 1
    checkpoint, used, messages = newest_usable(tmp_path, use)
    assert (checkpoint.step, used) == (1, "used 1")
    assert [message.endswith(f"bad-1: {step} does not fit") for step, message in zip((3, 2), messages, strict=True)]
    assert names(tmp_path) == ["step-00000001", "step-00000002.bad-1", "step-00000003.bad-1"]


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(MoectlError, match="cannot write"):
        save(tmp_path / "root", 1)


# --- processes killed in the middle -------------------------------------------------------------------

KILLED = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
from moectl.training.state import checkpoint_steps, load_checkpoint, newest_checkpoint
from moectl.training.state import save_checkpoint, step_name
torch.set_num_threads(1)
root, same_step, rounds = Path(sys.argv[1]), sys.argv[2] == "same", int(sys.argv[3])
generator = random.Random(sys.argv[2])

def save(count):
    parts = {f"part{n}": {"y": torch.full((9,), count)} for n in range(8)}
    parts["model"] = {"x": torch.full((30_000,), float(count))}
    save_checkpoint(root, 7 if same_step else count, parts, {"count": count}, keep=2)

started = time.monotonic()
save(0)
duration = time.monotonic() - started
for _ in range(rounds):
    count = before = newest_checkpoint(root)[0].state["count"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            count += 1
            save(count)
            os.write(writing, b".")
    os.close(writing)
    # Kill it after 0 to 2 saves that it said were finished, somewhere in the next one.
    finished = sum(len(os.read(reading, 1)) for _ in range(generator.randrange(3)))
    time.sleep(generator.uniform(0, duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    finished += len(os.read(reading, 10_000))
    os.close(reading)
    left = [entry.name for entry in root.iterdir() if entry.name.startswith(".")]
    for step in checkpoint_steps(root):
        load_checkpoint(root / step_name(step))  # half pruned or half written ones have other names
    found, messages = newest_checkpoint(root)
    number = found.state["count"]
    whole = all(bool((tensor == number).all()) for part in found.tensors.values() for tensor in part.values())
    print(json.dumps([before, finished, number, whole, found.step, messages, left]))
save(number + 1)
print(json.dumps(sorted(entry.name for entry in root.iterdir())))
"""


@pytest.mark.parametrize("mode", ["next", "same"])
def test_killed_while_saving(tmp_path: Path, mode: str) -> None:
    """SIGKILL at random moments: the newest checkpoint is whole, and no finished save is lost."""
    rounds = 15
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), mode, str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *rows, final = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == rounds
    for before, finished, number, whole, step, messages, _ in rows:
        # The save in which it was killed may have been published already, but not yet reported.
        assert whole and messages == [] and before + finished <= number <= before + finished + 1
        assert step == (7 if mode == "same" else number)
    assert any(finished for _, finished, *_ in rows) and any(left for *_, left in rows), "kills hit saves"
    newest = rows[-1][2] + 1
    expected = [7] if mode == "same" else [newest - 1, newest]
    assert final == [f"step-{step:08d}" for step in expected], "the next save removes what kills left"


@pytest.mark.parametrize("mode", ["next", "same"])
def test_a_reader_beside_a_writer_sees_no_folder_in_motion(tmp_path: Path, mode: str) -> None:
    many = {f"part{number}": {"x": torch.ones(9)} for number in range(12)}
    save_checkpoint(tmp_path, 0, many, {"save": 0}, keep=1)
    stop = threading.Event()

    def write() -> None:
        for number in itertools.count(1):
            if stop.is_set():
                return
            save_checkpoint(tmp_path, 0 if mode == "same" else number, many, {"save": number}, keep=1)
            time.sleep(0.001)  # the lock is not a fair one: leave the reader a chance

    seen = []
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            while not writing.done() and len({found.state["save"] for found, _ in seen}) < 8:
                seen.append(newest_checkpoint(tmp_path))
        finally:
            stop.set()
        writing.result()
    assert all(messages == [] and found.tensors.keys() == many.keys() for found, messages in seen)


HOLDS = """
import fcntl, os, signal, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_stopped_reader_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and after the patience the save goes on without the lock."""
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_root, "SAID_AFTER_S", 0.2)
    monkeypatch.setattr(checkpoint_root, "PATIENCE_S", 1.0)
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            began = time.monotonic()
            with pytest.warns(UserWarning, match="another process has held") as told:
                save(tmp_path, 2)
            assert time.monotonic() - began >= 1.0 and len(told) == 1
        finally:
            process.kill()
    assert newest_checkpoint(tmp_path)[0].step == 2


def test_the_folder_is_free_while_a_checkpoint_is_used(tmp_path: Path) -> None:
    """Building a model takes long: a run may save and prune meanwhile, and a new checkpoint is not set aside."""
    save(tmp_path, 1, 2)

    def use(checkpoint: Checkpoint) -> int:
        if checkpoint.step == 2:
            save_checkpoint(tmp_path, 2, parts(9), {"again": True}, keep=9)
            raise CheckError("not mine")
        return checkpoint.step

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint, used, messages = newest_usable(tmp_path, use)
    assert (checkpoint.step, used, messages) == (1, 1, [])
    assert names(tmp_path) == ["step-00000001", "step-00000002"], "it is another one than was refused"


@pytest.mark.parametrize("published", [False, True])
def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path, published: bool) -> None:
    """The folders as a kill leaves them just before and just after the new one takes its place."""
    save_checkpoint(tmp_path / "other", 4, parts(4), {"age": "new"}, keep=1)
    save_checkpoint(tmp_path, 4, parts(4), {"age": "old"}, keep=1)
    (tmp_path / "step-00000004").rename(tmp_path / ".replaced-step-00000004")
    target = "step-00000004" if published else ".tmp-step-00000004-0badf00d"
    (tmp_path / "other" / "step-00000004").rename(tmp_path / target)
    (tmp_path / "other").rmdir()
    assert newest_checkpoint(tmp_path)[0].state["age"] == ("new" if published else "old")
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    assert load_checkpoint(tmp_path / "step-00000004").state["age"] == ("new" if published else "old")


# --- into the model -----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, vocabulary: int = 11, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, vocabulary, bias=False)
        self.register_buffer("expert_bias", torch.zeros(3))
        if tie:
            self.head.weight = self.embed.weight


def test_a_tied_model_round_trips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    model.expert_bias += 1
    folder = save_checkpoint(tmp_path, 1, {"model": model.state_dict()}, {}, keep=1)
    load_model_strict(other, load_checkpoint(folder).tensors["model"])
    assert other.head.weight is other.embed.weight
    assert all(same(value, other.state_dict()[name]) for name, value in model.state_dict().items())

    untied = Tied(tie=False)
    load_model_strict(untied, load_checkpoint(folder).tensors["model"])
    assert same(untied.head.weight, untied.embed.weight)
    with torch.no_grad():
        untied.head.weight.zero_()
    assert not same(untied.head.weight, untied.embed.weight), "an untied model stays untied"


def test_every_wrong_key_is_listed_and_nothing_is_loaded() -> None:
    model = Tied(tie=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: torch.full_like(value, 3.0) for name, value in before.items()}
    del tensors["norm.weight"], tensors["expert_bias"]
    tensors |= {"layers.0.gate": torch.ones(2), "layers.1.gate": torch.ones(2)}
    tensors["embed.weight"] = torch.ones(12, 4)
    tensors["head.weight"] = tensors["head.weight"].double()
    with pytest.raises(CheckError) as caught:
        load_model_strict(model, tensors)
    message = caught.value.message
    assert "6 place(s)" in message and caught.value.exit_code == 3
    for line in (
        "missing: norm.weight",
        "missing: expert_bias",
        "unexpected: layers.0.gate",
        "unexpected: layers.1.gate",
        "embed.weight is [12, 4] torch.float32 in the checkpoint, [11, 4] torch.float32 in the model",
        "head.weight is [11, 4] torch.float64 in the checkpoint, [11, 4] torch.float32 in the model",
    ):
        assert line in message
    assert all(same(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    folder = save_checkpoint(tmp_path, 1, {"model": other.state_dict()}, {}, keep=1)
    with pytest.raises(CheckError) as caught:
        load_model_strict(Tied(), load_checkpoint(folder).tensors["model"])
    for name in (*Tied().state_dict(), *other.state_dict()):
        assert f": {name}" in caught.value.message


def test_untied_values_do_not_fit_a_tied_model() -> None:
    untied, tied = Tied(tie=False), Tied()
    before = tied.embed.weight.detach().clone()
    with pytest.raises(CheckError, match=r"head\.weight and embed\.weight are one tensor in the model"):
        load_model_strict(tied, untied.state_dict())
    assert same(tied.embed.weight, before)

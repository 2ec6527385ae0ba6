"""Groups: what belongs to them, in their own file and in the runs' own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from moectl import paths
from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.runs import RunDir
from moectl.runs.catalog import list_runs
from moectl.runs.groups import Group, Member, evaluated, group_names
from moectl.runs.store import rebuild

MakeRun = Callable[..., RunDir]
A, B, C = (Member(f"g-{variant}-s{seed}", variant, seed) for variant, seed in (("moe", 0), ("dense", 0), ("moe", 1)))


def of_group(variant: str, name: str = "g") -> dict[str, object]:
    return {"group": {"name": name, "variant": variant}}


def test_members_stay_in_order_and_once() -> None:
    with Group.begin("g") as group:
        group.add([A, B])
        group.add([B, C])
    assert Group.open("g").members == (A, B, C)
    with Group.begin("g") as group:
        assert group.record["created"] and group.members == (A, B, C)
    assert group_names() == ["g"]


def test_one_process_works_on_a_group() -> None:
    with Group.begin("g"), pytest.raises(ConfigError, match="is being worked on by PID"):
        Group.begin("g")
    Group.begin("g").release()


@pytest.mark.parametrize("name", ["", "../g", "a/b", "g h"])
def test_names_that_are_no_folders(name: str) -> None:
    with pytest.raises(ConfigError, match="group name"):
        Group.begin(name)
    assert not paths.groups_dir().exists()


def test_no_such_group(make_run: MakeRun) -> None:
    Group.begin("ablation").release()
    with pytest.raises(NotFoundError, match="no group 'ablatoin'") as caught:
        Group.open("ablatoin")
    assert "ablation" in (caught.value.hint or "") and caught.value.exit_code == 4
    for name in ("", "..", "."):
        with pytest.raises(NotFoundError):
            Group.open(name)


def test_runs_are_the_truth_with_the_groups_folder_gone(make_run: MakeRun) -> None:
    with Group.begin("g") as group:
        group.add([A, B, C])
    make_run(A.run, **of_group("moe"))
    make_run(B.run, router=None, **of_group("dense"))
    make_run("h-moe-s0", **of_group("moe", "h"))
    folders, without = evaluated("g")
    assert [folder.name for folder in folders] == [A.run, B.run] and without == []
    shutil.rmtree(paths.groups_dir())
    folders, _ = evaluated("g")
    assert sorted(folder.name for folder in folders) == [B.run, A.run]
    assert [entry.id for entry in list_runs(group="h")[0]] == ["h-moe-s0"]
    for file in paths.home().glob("registry.db*"):
        file.unlink()
    rebuild(paths.registry_path(), paths.runs_dir())[0].close()
    entries, _ = list_runs(group="g")
    assert {entry.id for entry in entries} == {A.run, B.run} and {entry.group for entry in entries} == {"g"}


def test_the_first_variant_comes_first_and_runs_without_a_loss_are_named(make_run: MakeRun) -> None:
    with Group.begin("g") as group:
        group.add([A, B, C])
    make_run(B.run, router=None, **of_group("dense"))
    make_run(C.run, seed=1, **of_group("moe"))
    make_run(A.run, losses=[], **of_group("moe"))
    folders, without = evaluated("g")
    assert [folder.name for folder in folders] == [C.run, B.run] and without == [A.run]


def test_a_broken_file_is_named() -> None:
    with Group.begin("g") as group:
        group.add([A])
    file = paths.groups_dir() / "g" / "group.json"
    file.write_text(json.dumps({"members": [{"run": "x"}]}))
    with pytest.raises(MoectlError, match=r"group.json is broken"):
        _ = Group.open("g").members
    file.write_text("{")
    with pytest.raises(MoectlError, match=r"group.json"):
        Group.open("g")

"""Routers found by entry points: real distributions on a real path, broken ones among them."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.plugins import BUILT_IN, GROUP, PluginError, load_router_class, reading, router_entries
from tests.testing.install import ROUTER, Installer


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(tmp_path, monkeypatch)


def test_table_of_built_in_routers_equals_the_entry_points() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["project"]["entry-points"][GROUP] == BUILT_IN


def test_own_routers_come_first_and_say_what_they_do() -> None:
    entries = router_entries()
    assert list(entries)[: len(BUILT_IN)] == list(BUILT_IN)
    for name in BUILT_IN:
        assert entries[name].distribution == "moectl"
        assert reading(entries[name]).summary
        assert reading(entries[name]).problem is None


def test_without_metadata_the_table_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda: iter(()))
    assert {name: entry.target for name, entry in router_entries().items()} == BUILT_IN
    assert load_router_class("top1").__name__ == "Top1Router"


def test_plugin_is_listed_without_being_imported(install: Installer) -> None:
    install("other-routers", router="homeward")
    entry = router_entries()["homeward"]
    assert (entry.distribution, entry.version, entry.target) == ("other-routers", "1.2", "other_routers:Mine")
    assert reading(entry) == ("Sends every token home.", None)
    assert "other_routers" not in sys.modules
    assert load_router_class("homeward").__name__ == "Mine"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def broken(:", "SyntaxError"),
        ("other = 1", "AttributeError"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
    ],
)
def test_broken_plugin_breaks_only_itself(install: Installer, source: str, says: str) -> None:
    install("bad-routers", router="bad", source=source)
    assert "bad" in router_entries()
    assert load_router_class("top1").__name__ == "Top1Router"
    with pytest.raises(PluginError) as caught:
        load_router_class("bad")
    assert says in caught.value.message
    assert "'bad'" in caught.value.message
    assert "'bad-routers'" in caught.value.message
    assert "bad-routers" in str(caught.value.hint)


def test_malformed_entry_points_are_rows_of_their_own(install: Installer) -> None:
    points = (
        f"stray = line\n[{GROUP}]\n# a comment\nno target\nno-class = other_routers\nodd=:Mine\n"
        f"extra = other_routers:Mine [cuda]\n\n[ {GROUP} ]\nspaced = other_routers:Mine\n[console_scripts]\nx = y:z\n"
    )
    install("other-routers", router="many", points=points)
    entries = router_entries()
    assert set(entries) - set(BUILT_IN) >= {"no target", "no-class", "odd", "extra", "spaced"}
    assert not {"stray", "x", "# a comment"} & set(entries)
    for name in ("no target", "no-class", "odd"):
        assert "is not of the form module:Class" in str(reading(entries[name]).problem)
        with pytest.raises(PluginError):
            load_router_class(name)
    assert load_router_class("extra") is load_router_class("spaced")


def test_package_without_readable_metadata_harms_nobody(install: Installer) -> None:
    nameless = install("nameless-routers", router="nameless").parent
    (nameless / "nameless_routers-1.2.dist-info" / "METADATA").unlink()
    binary = install("binary-routers", router="binary").parent
    (binary / "binary_routers-1.2.dist-info" / "entry_points.txt").write_bytes(b"[moectl.routers]\n\xff\xfe = x:y\n")
    entries = router_entries()
    assert (entries["nameless"].distribution, entries["nameless"].version) == ("unknown package", "")
    assert load_router_class("nameless").__name__ == "Mine"
    assert "binary" not in entries
    assert set(BUILT_IN) <= set(entries)


def test_copy_that_is_not_in_use_is_not_listed(install: Installer, tmp_path: Path) -> None:
    """A package that comes twice on the path: the first is the one that imports find."""
    install("twice-routers", router="old", source="old = 1")
    install("twice-routers", router="new")
    entries = router_entries()
    assert "old" not in entries
    assert entries["new"].rivals == ()


def test_name_claimed_twice_names_both(install: Installer) -> None:
    install("first-routers", router="same")
    install("second-routers", router="same")
    with pytest.raises(ConfigError) as caught:
        load_router_class("same")
    assert "first-routers" in caught.value.message
    assert "second-routers" in caught.value.message
    assert "all but one of" in str(caught.value.hint)


def test_claiming_a_built_in_name_is_refused_too(install: Installer) -> None:
    install("greedy-routers", router="top1")
    with pytest.raises(ConfigError, match=r"'top1' is claimed by .*greedy-routers") as caught:
        load_router_class("top1")
    assert "moectl" in caught.value.message
    assert str(caught.value.hint).startswith("Uninstall greedy-routers")
    assert load_router_class("topk").__name__ == "TopKRouter"


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        load_router_class("swich")
    assert caught.value.exit_code == 2
    assert "Did you mean 'switch'?" in str(caught.value.hint)


# path.py:Class


def test_class_from_a_file_is_loaded_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ROUTER)
    cls = load_router_class(f"{file}:Mine")
    assert cls.__doc__ == "Sends every token home."
    assert load_router_class(f"{file}:Mine") is cls
    assert sys.modules[cls.__module__].Mine is cls


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no router file"):
        load_router_class(f"{tmp_path}/none.py:Mine")


def test_class_that_is_not_there_or_not_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ROUTER)
    with pytest.raises(ConfigError) as caught:
        load_router_class(f"{file}:Mien")
    assert "Did you mean 'Mine'?" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="names no class") as caught:
        load_router_class(str(file))
    assert caught.value.hint == f"Name one, as in {file}:Mine."


def test_hint_names_the_routers_of_a_file_and_not_its_helpers(tmp_path: Path) -> None:
    file = tmp_path / "several.py"
    file.write_text(f"{ROUTER}\nclass Helper:\n    pass\n\nclass Yours(Mine):\n    pass\n")
    with pytest.raises(ConfigError) as caught:
        load_router_class(str(file))
    assert caught.value.hint == f"Name one, as in {file}:Mine or {file}:Yours."


def test_file_that_does_not_import_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1\ndef broken(:\n")
    with pytest.raises(MoectlError, match=r"line 2.*SyntaxError"):
        load_router_class(f"{file}:Mine")
    assert not [name for name in sys.modules if name.startswith("moectl_file_") and "broken" in vars(sys.modules[name])]

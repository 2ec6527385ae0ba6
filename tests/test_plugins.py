"""Routers found by entry points: real distributions on a real path, broken ones among them."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.plugins import BUILT_IN, GROUP, load_router_class, router_entries, summary

Install = Callable[..., None]
ROUTER = '''
class Mine:
    """Sends every token home."""
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module and one router, as pip would leave it."""

    def install(distribution: str, *, router: str, source: str = ROUTER, attribute: str = "Mine") -> None:
        site = tmp_path / distribution
        module = distribution.replace("-", "_")
        info = site / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{router} = {module}:{attribute}\n")
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_table_of_built_in_routers_equals_the_entry_points() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["project"]["entry-points"][GROUP] == BUILT_IN


def test_own_routers_come_first_and_say_what_they_do() -> None:
    entries = router_entries()
    assert list(entries)[: len(BUILT_IN)] == list(BUILT_IN)
    for name in BUILT_IN:
        assert entries[name].distribution == "moectl"
        assert summary(entries[name])


def test_without_metadata_the_table_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints())
    assert {name: entry.target for name, entry in router_entries().items()} == BUILT_IN
    assert load_router_class("top1").__name__ == "Top1Router"


def test_plugin_is_listed_without_being_imported(install: Install) -> None:
    install("other-routers", router="homeward")
    entry = router_entries()["homeward"]
    assert (entry.distribution, entry.version, entry.target) == ("other-routers", "1.2", "other_routers:Mine")
    assert summary(entry) == "Sends every token home."
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
def test_broken_plugin_breaks_only_itself(install: Install, source: str, says: str) -> None:
    install("bad-routers", router="bad", source=source)
    assert "bad" in router_entries()
    assert load_router_class("top1").__name__ == "Top1Router"
    with pytest.raises(MoectlError) as caught:
        load_router_class("bad")
    assert says in caught.value.message
    assert "'bad'" in caught.value.message
    assert "'bad-routers'" in caught.value.message
    assert "bad-routers" in str(caught.value.hint)


def test_name_claimed_twice_names_both(install: Install) -> None:
    install("first-routers", router="same")
    install("second-routers", router="same")
    with pytest.raises(ConfigError) as caught:
        load_router_class("same")
    assert "first-routers" in caught.value.message
    assert "second-routers" in caught.value.message


def test_claiming_a_built_in_name_is_refused_too(install: Install) -> None:
    install("greedy-routers", router="top1")
    with pytest.raises(ConfigError, match=r"'top1' is claimed by .*greedy-routers") as caught:
        load_router_class("top1")
    assert "moectl" in caught.value.message
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
    with pytest.raises(ConfigError) as caught:
        load_router_class(str(file))
    assert f"{file}:Mine" in str(caught.value.hint)


def test_file_that_does_not_import_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("x = 1\ndef broken(:\n")
    with pytest.raises(MoectlError, match=r"line 2.*SyntaxError"):
        load_router_class(f"{file}:Mine")
    assert not [name for name in sys.modules if name.startswith("moectl_file_") and "broken" in vars(sys.modules[name])]

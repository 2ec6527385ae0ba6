"""What reading a module tells without importing it: never wrong about a class that would load."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

import pytest

from moectl.plugin_source import Reading, read

ROUTER = '''
class Mine(Base):
    """Does this.

    And that.
    """
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def reading_of(site: Path, source: str, attribute: str = "Mine") -> Reading:
    (site / "read_me_router.py").write_text(dedent(source))
    found = read("read_me_router", attribute)
    assert "read_me_router" not in sys.modules
    return found


def test_summary_is_the_first_line_of_the_docstring(site: Path) -> None:
    assert reading_of(site, ROUTER) == Reading("Does this.", None)
    assert reading_of(site, "class Mine(Base):\n    pass") == Reading("", None)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def broken(:", "line 1: SyntaxError: "),
        ("x = 1\n\n'", "line 3: SyntaxError: "),
        ("a\0b", "SyntaxError"),
        ("class Other(Base): pass", "has no 'Mine'"),
        ("def f():\n    class Mine(Base): pass", "has no 'Mine'"),
        ("class Outer:\n    class Mine(Base): pass", "has no 'Mine'"),
        ("class Mine: pass", "is not a subclass of moectl.moe.Router"),
        ("def Mine(): pass", "is a function, not a subclass"),
    ],
)
def test_what_cannot_load_is_said(site: Path, source: str, says: str) -> None:
    problem = reading_of(site, source).problem
    assert problem is not None
    assert says in problem
    assert "read_me_router.py" in problem


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import Mine",
        "from elsewhere import *",
        "import elsewhere as Mine",
        "Mine = make()",
        "Mine: type = make()",
        "(Mine, Other) = make()",
        "if True:\n    class Mine(Base): pass",
        "try:\n    import fast\nexcept ImportError:\n    Mine = None",
        "try:\n    pass\nfinally:\n    class Mine(Base): pass",
        "with make() as Mine: pass",
        "for Mine in make(): pass",
        "match make():\n    case _:\n        class Mine(Base): pass",
        "(Mine := make())",
        "def __getattr__(name): return make(name)",
        "globals()['Mine'] = make()",
        "@register\nclass Mine: pass",
        "class Mine(metaclass=Meta): pass",
        "Mine = " + " + ".join(["a"] * 3000),
    ],
)
def test_what_may_load_is_left_to_the_import(site: Path, source: str) -> None:
    assert reading_of(site, source).problem is None


def test_an_expression_too_deep_to_parse_is_an_answer(site: Path) -> None:
    assert isinstance(reading_of(site, "(" * 5000 + "1" + ")" * 5000), Reading)


def test_modules_that_are_nowhere(site: Path) -> None:
    (site / "read_me_package").mkdir()
    (site / "read_me_package" / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "read_me_package" / "inner.py").write_text(ROUTER)
    assert read("read_me_package.inner", "Mine").summary == "Does this."
    assert read("read_me_package.none", "Mine").problem == "no module named 'read_me_package.none'"
    assert read("read_me_nowhere.deep.down", "Mine").problem == "no module named 'read_me_nowhere'"
    assert "is a module, not a package" in str(read("read_me_package.inner.more", "Mine").problem)
    assert "read_me_package" not in sys.modules


@pytest.mark.parametrize(
    ("module", "attribute"), [("", "Mine"), ("a-b", "Mine"), ("a", ""), ("a", "x y"), ("a..b", "C")]
)
def test_targets_of_no_form(module: str, attribute: str) -> None:
    assert "is not of the form module:Class" in str(read(module, attribute).problem)


def test_what_python_cannot_show_as_text_is_left_to_the_import() -> None:
    assert read("math", "sqrt") == Reading()
    assert read("sys", "Mine") == Reading()

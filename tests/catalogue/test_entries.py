"""The entries themselves: complete, unique, no stubs, and true where a machine can tell."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

from moectl.catalogue import COMPONENTS, SEVERITIES, Entry, entries
from moectl.cli.app import COMMANDS, app
from moectl.config.keys import all_keys
from moectl.config.schema import ExperimentConfig

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("symptom", "cause", "fix", "check", "avoid", "source")
#: Least and most characters of a field: below, it is a stub; above, nobody reads it.
BOUNDS = {"title": (8, 80), "symptom": (60, 420), "cause": (60, 480), "fix": (60, 700), "check": (10, 420)}
BOUNDS |= {"avoid": (18, 240), "source": (18, 240)}
#: What the rest of moectl cites; from 076 on the catalogue is free to grow.
FIXED = [f"MOE{number:03d}" for number in range(1, 76)]
TITLE_WORDS = {
    "MOE001": "RoPE",
    "MOE007": "up projections swapped",
    "MOE016": "norm_topk_prob",
    "MOE028": "dropped",
    "MOE032": "gradient",
    "MOE038": "pooled over layers",
    "MOE041": "bias in bf16",
    "MOE047": "decay",
    "MOE057": "router_logits",
    "MOE058": "identical",
    "MOE069": "Pickled",
    "MOE073": "bias used in the weights",
    "MOE075": "scaling factor",
}
# Of the words in backticks, a whole command line: `moectl train --base RUN`.
COMMAND_LINE = re.compile(r"`(moectl [^`]+)`")
ALL = pytest.mark.parametrize("one", entries(), ids=lambda each: each.code)


def text_of(one: Entry) -> str:
    return "\n".join(getattr(one, field.name) for field in fields(one))


def command_lines(one: Entry) -> list[str]:
    return [" ".join(line.split()) for line in COMMAND_LINE.findall(text_of(one))]


def test_codes_are_unique_in_order_and_without_gaps() -> None:
    codes = [one.code for one in entries()]
    assert codes[: len(FIXED)] == FIXED
    assert codes == [f"MOE{number:03d}" for number in range(1, len(codes) + 1)]
    assert len(codes) >= 80


def test_codes_mean_what_the_rest_of_moectl_takes_them_for() -> None:
    titles = {one.code: one.title for one in entries()}
    assert {code for code, words in TITLE_WORDS.items() if words not in titles[code]} == set()


def test_titles_are_unique() -> None:
    titles = [one.title.lower() for one in entries()]
    assert sorted(set(titles)) == sorted(titles)


@ALL
def test_no_field_is_a_stub(one: Entry) -> None:
    outside = {}
    for field, (least, most) in BOUNDS.items():
        length = len(getattr(one, field))
        if not least <= length <= most:
            outside[field] = length
    assert outside == {}
    assert one.severity in SEVERITIES
    assert one.component in COMPONENTS
    assert not re.search(r"\b(TODO|TBD|FIXME|lorem)\b", text_of(one), re.IGNORECASE)
    assert "\n" not in one.title


@ALL
def test_text_is_not_copied_from_another_entry(one: Entry) -> None:
    others = [other for other in entries() if other.code != one.code]
    for section in ("symptom", "cause", "fix", "avoid"):
        assert getattr(one, section) not in [getattr(other, section) for other in others]


@ALL
def test_check_is_a_command_or_by_reading(one: Entry) -> None:
    says = " ".join(one.check.split()).lower()
    assert "`moectl " in says or "by reading" in says


@ALL
def test_source_names_something(one: Entry) -> None:
    known = ("arXiv:", "transformers", "PyTorch", "torch", "issue ", "pull request ", "moectl/", "docs/", "config.json")
    assert any(word in one.source for word in known), one.source


@ALL
def test_code_is_python(one: Entry) -> None:
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(one), re.DOTALL | re.MULTILINE):
        assert language == "python"
        ast.parse(code)


@ALL
def test_fences_are_closed(one: Entry) -> None:
    for section in SECTIONS:
        assert len(re.findall(r"^```", getattr(one, section), re.MULTILINE)) % 2 == 0, section


@ALL
def test_other_codes_exist(one: Entry) -> None:
    cited = set(re.findall(r"MOE\d{3}", text_of(one)))
    assert cited <= {other.code for other in entries()}


@ALL
def test_named_files_exist(one: Entry) -> None:
    named = re.findall(r"`((?:moectl|docs|benchmarks|plugins)/[\w./-]+)`", text_of(one))
    assert [path for path in named if not (ROOT / path).exists()] == []


@ALL
def test_named_config_keys_exist(one: Entry) -> None:
    known = set(all_keys(ExperimentConfig))
    named = re.findall(r"--set ([\w.]+)=", text_of(one))
    named += re.findall(r"`((?:moe|train|optim|data)\.[a-z_.]+)", text_of(one))
    assert [key for key in named if key not in known] == []


@ALL
def test_named_checks_of_routers_exist(one: Entry) -> None:
    from moectl.testing.runner import CHECKS

    named: list[str] = []
    for group in re.findall(r"\((?:checks?) ([^)]*)\)", " ".join(one.check.split())):
        named += re.findall(r'"([a-z-]+)"', group)
    assert [name for name in named if name not in CHECKS] == []


@pytest.fixture(scope="module")
def tool() -> Any:
    """The whole command line, as Typer builds it."""
    return typer.main.get_command(app())


@ALL
def test_commands_exist_with_their_options(one: Entry, tool: Any) -> None:
    """Each command line is parsed by the real parser, types and required arguments included; nothing is run."""
    for line in command_lines(one):
        name, *rest = shlex.split(line)[1:]
        assert name in {command.name for command in COMMANDS}, f"{line}: there is no such command"
        command = tool.commands[name]
        if hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"{line}: there is no such sub-command"
            command = command.commands[rest.pop(0)]
        if rest:  # "`moectl prepare` splits by group" is a mention, and no command line
            command.make_context(name, rest)


def test_every_code_that_moectl_cites_exists() -> None:
    known = {one.code for one in entries()}
    missing = {}
    for file in sorted((ROOT / "moectl").rglob("*")):
        if file.suffix in (".py", ".html", ".j2", ".yaml", ".md") and "__pycache__" not in file.parts:
            cited = set(re.findall(r"MOE\d{3}", file.read_text(encoding="utf-8")))
            if cited - known:
                missing[str(file.relative_to(ROOT))] = sorted(cited - known)
    assert missing == {}


def cited_in(package: str) -> set[str]:
    """Codes in the sources of one part of moectl."""
    files = (ROOT / "moectl" / package).rglob("*.py")
    return {code for file in files for code in re.findall(r"MOE\d{3}", file.read_text(encoding="utf-8"))}


def test_what_doctor_is_said_to_find_it_knows() -> None:
    claimed = {one.code for one in entries() if "`moectl doctor" in one.check}
    assert claimed and claimed - cited_in("doctor") - cited_in("hf") == set()


def test_what_compare_hf_is_said_to_name_it_knows() -> None:
    claimed = {one.code for one in entries() if f"names {one.code}" in " ".join(one.check.split())}
    claimed |= {one.code for one in entries() if f"{one.code} is named" in " ".join(one.check.split())}
    assert claimed and claimed - cited_in("parity") == set()


def test_python_names_of_moectl_exist() -> None:
    for one in entries():
        for name in re.findall(r"`(moectl\.[A-Za-z_.]+)`", text_of(one)):
            module, _, attribute = name.rpartition(".")
            assert hasattr(import_module(module), attribute), f"{one.code}: {name}"

"""The README's promises that a test can hold: its router works, its tree is the tree, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moectl.cli.app import COMMANDS, main
from moectl.routers import build_router

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_router_of_the_readme_works(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n# my_router\.py\n(.*?)```", README, flags=re.DOTALL)
    file = tmp_path / "my_router.py"
    file.write_text(source, encoding="utf-8")
    torch.manual_seed(0)
    router = build_router(f"{file}:Temperature", hidden_size=16, num_experts=4, temperature=0.5)
    x = torch.randn(3, 5, 16)
    out = router(x)
    expected = torch.softmax(x.reshape(-1, 16) @ router.weight.T / 0.5, dim=-1)
    top = expected.topk(2)
    assert torch.equal(out.topk_indices, top.indices)
    torch.testing.assert_close(out.topk_weights, top.values / top.values.sum(-1, keepdim=True))
    out.topk_weights[:, 0].sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 0


def test_the_wrong_block_of_the_readme_is_told_its_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = re.findall(r"```python\n# my_moe\.py\n(.*?)```", README, flags=re.DOTALL)
    file = tmp_path / "my_moe.py"
    file.write_text(source, encoding="utf-8")
    assert main(["compare-hf", "qwen3", "--candidate", f"{file}:MyMoE", "--probe", "float64"]) == 3
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(compare-hf qwen3.*?)```", README, flags=re.DOTALL)
    said = [line for line in shown.splitlines() if line.startswith(("my_moe", "  gate", "  experts", "  MOE", "    "))]
    assert len(said) == 7
    assert [line for line in said if line not in printed] == []
    verdicts = [(line.split()[0], line.split()[-1]) for line in shown.splitlines() if line.startswith("mlp.")]
    assert len(verdicts) == 6
    for name, verdict in verdicts:
        assert re.search(rf"^{re.escape(name)} .* {verdict}$", printed, flags=re.MULTILINE)


def test_the_tree_names_every_file() -> None:
    (tree,) = re.findall(r"## The files\n\n```text\n(.*?)```", README, flags=re.DOTALL)
    modules = {path for path in (ROOT / "moectl").rglob("*.py") if path.name != "__init__.py"}
    missing = sorted(str(path.relative_to(ROOT)) for path in modules if path.name not in tree)
    assert not missing


def test_every_command_is_in_the_readme() -> None:
    assert [command.name for command in COMMANDS if f"moectl {command.name}" not in README] == []


@pytest.mark.parametrize("target", re.findall(r"`((?:data|docs|benchmarks|tests)/[\w./-]*)`", README))
def test_named_paths_exist(target: str) -> None:
    assert (ROOT / target).exists()

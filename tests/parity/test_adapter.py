"""Adapters: what they can say, how the template is used for real, and whose fault a failure is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moectl.errors import ConfigError, NotFoundError
from moectl.parity.adapter import new_adapter
from moectl.parity.candidate.side import Candidate, load_candidate
from moectl.parity.candidate.user_code import AdapterError, CandidateError
from moectl.parity.case import Case, Level
from moectl.parity.hugging_face import HuggingFace, rerouted_by
from tests.parity.cases import case, error

HERE = Path(__file__).parent
STRANGE = HERE / "bad" / "strange.py"
BEGINNING = "import torch\nfrom moectl.parity import adapter\n\n\nclass Adapter(adapter.Adapter):\n"
WHOLE = f"""{BEGINNING}
    def build(self, cls):
        return cls(torch.device("cpu"), self.sizes["D"], self.sizes["F"], [self.sizes["E"], self.sizes["K"]])

    def weights(self, module):
        sources = dict(super().weights(module))
        sources["alpha"] = "gate.weight.mT"
        sources["beta"] = "experts.gate_up_proj.unflatten(1, [2, F]).permute(1, 0, 3, 2)"
        sources["gamma"] = lambda weights: weights["experts.down_proj"].mT.contiguous()
        return sources

    def call(self, module, inputs):
        return module(inputs.hidden.flatten(0, 1).T)["y"].T

    def tensors(self, module):
        return {{"mlp.router_logits": "scores", "mlp.input": "scores:input", "mlp.routed": lambda result: result}}
"""


def adapted(text: str, folder: Path, spec: str = f"{STRANGE}:Strange", level: Level | None = "moe") -> Candidate:
    file = folder / "mine.py"
    file.write_text(text, encoding="utf-8")
    return load_candidate(spec, adapter=file, family="qwen3", level=level)


def differing(candidate: Candidate, of: Case) -> dict[str, float]:
    reference, shown = HuggingFace("qwen3").run(of), candidate.run(of)
    gaps = {name: error(reference[name], shown[name]) for name in reference if name in shown}
    return {name: gap for name, gap in gaps.items() if not gap <= 1e-10}


def test_an_adapter_makes_strange_code_comparable(tmp_path: Path) -> None:
    candidate = adapted(WHOLE, tmp_path)
    of = case("qwen3", "moe")
    shown = candidate.run(of)
    assert not differing(candidate, of)
    assert {"mlp.router_logits", "mlp.routed", "mlp.output", "grad.experts.gate_up_proj", "grad.gate.weight"} <= set(
        shown
    )
    assert [line.remark for line in candidate.mapping] == ["by its shape", "by the adapter", "by the adapter"]
    assert torch.equal(shown["mlp.input"].flatten(0, 1), of.inputs.hidden.flatten(0, 1))


def test_without_it_the_same_code_is_refused_with_what_to_do() -> None:
    with pytest.raises(CandidateError, match="cannot tell what to build Strange with: 'where', 'wide'") as caught:
        load_candidate(f"{STRANGE}:Strange", family="qwen3", level="moe")
    assert "new-adapter" in str(caught.value.hint)


@pytest.mark.parametrize("level", ["model", "layer", "moe", "attention", "router"])
def test_the_template_as_it_is_changes_nothing(level: Level, tmp_path: Path) -> None:
    names = {
        "model": "MoEModel",
        "layer": "DecoderBlock",
        "moe": "MoEBlock",
        "attention": "Attention",
        "router": "Router",
    }
    spec = f"{HERE / 'candidates/modulelist_style.py'}:{names[level]}"
    written = new_adapter(tmp_path / "mine.py", level)
    assert f"compare a {level} " in written.read_text(encoding="utf-8")
    candidate = load_candidate(spec, adapter=written, family="qwen3", level=level)
    guessed = load_candidate(spec, family="qwen3", level=level)
    of = case("qwen3", level)
    assert not differing(candidate, of)
    assert set(candidate.run(of)) == set(guessed.run(of))


def test_the_templates_own_lines_work_when_they_are_uncommented(tmp_path: Path) -> None:
    """For names that no guess knows; every line that the test uncomments is the template's own, but for the name."""
    text = new_adapter(tmp_path / "raw.py", "router").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if 'sources["w_gate"]' in line)
    text = text.replace(line, line.replace("# ", "", 1).replace("w_gate", "odd"))
    candidate = adapted(text, tmp_path, f"{STRANGE}:OddRouter", "router")
    assert not differing(candidate, case("qwen3", "router"))
    with pytest.raises(CandidateError, match="cannot be mapped as a router"):
        load_candidate(f"{STRANGE}:OddRouter", family="qwen3", level="router")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="exists already"):
        new_adapter(file, "moe")
    assert file.read_text(encoding="utf-8") == "mine"
    with pytest.raises(NotFoundError, match="no folder"):
        new_adapter(tmp_path / "none" / "mine.py", "moe")
    with pytest.raises(ConfigError, match="no Python file"):
        new_adapter(tmp_path / "mine.txt", "moe")


def test_a_guessed_tensor_can_be_taken_away_or_replaced(tmp_path: Path) -> None:
    spec = f"{HERE / 'bad/misbehaving.py'}:Right"
    text = f'{BEGINNING}    def tensors(self, module):\n        return {{"mlp.router_logits": None, "mlp.weights": lambda out: out.new_ones(18, 8)}}\n'  # noqa: E501
    shown = adapted(text.replace("18", "out.shape[0] * out.shape[1]"), tmp_path, spec).run(case("qwen3", "moe"))
    assert "mlp.router_logits" not in shown and torch.equal(shown["mlp.weights"], torch.ones(18, 8).double())


def test_an_adapter_reroutes_what_chooses_without_topk(tmp_path: Path) -> None:
    text = f"""from contextlib import contextmanager
{BEGINNING}
    @contextmanager
    def reroute(self, module, choose):
        module.choose = lambda logits: choose(0, logits)
        yield
        module.choose = None
"""
    candidate = adapted(text, tmp_path, f"{STRANGE}:Chooser")
    of = case("qwen3", "moe")
    other = HuggingFace("qwen3").run(of)
    changed = type(other)()
    changed.record("mlp.chosen", other["mlp.chosen"].roll(1, dims=1))
    reroute = rerouted_by(changed, of)
    expected = HuggingFace("qwen3").run(of, reroute)["mlp.output"]
    assert error(expected, candidate.run(of, reroute)["mlp.output"]) <= 1e-10
    assert error(other["mlp.output"], candidate.run(of)["mlp.output"]) <= 1e-10


def test_an_adapter_gives_a_cache(tmp_path: Path) -> None:
    text = f"""{BEGINNING}
    def call_cached(self, module, inputs, cache, past):
        seen = inputs.input_ids if cache is None else torch.cat([cache, inputs.input_ids], dim=1)
        return module(seen)[:, past:], seen
"""
    spec = f"{HERE / 'candidates/modulelist_style.py'}:MoEModel"
    candidate = adapted(text, tmp_path, spec, "model")
    of = case("qwen3", "model", chunks=(4, 3, 2))
    assert error(HuggingFace("qwen3").run(of)["logits"], candidate.run(of)["logits"]) <= 1e-10


@pytest.mark.parametrize(
    ("method", "returns", "says"),
    [
        ("build(self, cls)", "cls.nothing()", r"adapter's build\(\) fails: AttributeError.*mine\.py:7\)"),
        ("build(self, cls)", "5", r"adapter's build\(\) returns a int"),
        ("weights(self, module)", "{}[0]", r"adapter's weights\(\) fails: KeyError: 0 \(\S*mine\.py:7\)"),
        ("weights(self, module)", "{'no': 'gate.weight'}", r"weights\(\) names 'no', which the module has not"),
        ("weights(self, module)", "{'gate.weight': 'gate.weight.mT'}", r"is \[32, 8\]; the parameter is \[8, 32\]"),
        ("weights(self, module)", "{'gate.weight': 'gate.wait'}", r"'gate\.wait': 'gate(\.wait)?' is not known"),
        ("weights(self, module)", "{'gate.weight': lambda w: w['x']}", r"fails: KeyError: 'x' \(\S*mine\.py:7\)"),
        ("call(self, module, inputs)", "module(inputs.x)", r"call\(\) fails: AttributeError.*mine\.py:7\)"),
        ("tensors(self, module)", "{'mlp.input': 'nowhere'}", r"reads 'mlp\.input' from 'nowhere'"),
        ("tensors(self, module)", "{'mlp.input': lambda out: out.x}", r"fails for 'mlp\.input'.*mine\.py:7\)"),
        ("tensors(self, module)", "{'mlp.input': lambda out: 3}", r"'mlp\.input': it gives a int"),
        ("tensors(self, module)", "3", r"adapter's tensors\(\) fails: TypeError"),
    ],
)
def test_a_failure_in_an_adapter_is_the_adapters(method: str, returns: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=says) as caught:
        adapted(
            f"{BEGINNING}    def {method}:\n        return {returns}\n",
            tmp_path,
            f"{HERE / 'bad/misbehaving.py'}:Right",
        )
    assert getattr(caught.value, "hint", None) and getattr(caught.value, "exit_code", None) == 1
    assert isinstance(caught.value, AdapterError) or "gate.wait" in str(caught.value)


def test_their_own_failure_under_an_adapter_is_theirs(tmp_path: Path) -> None:
    text = f"{BEGINNING}    def call(self, module, inputs):\n        return module(inputs.hidden)\n"
    with pytest.raises(CandidateError, match=r"misbehaving\.py:\d+"):
        adapted(text, tmp_path, f"{HERE / 'bad/misbehaving.py'}:Raising")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("class Other:\n    pass\n", "has no class Adapter"),
        ("class Adapter:\n    pass\n", "has no class Adapter"),
        ("import nothing_like_it\n", r"the adapter \S*mine\.py cannot be imported: ModuleNotFoundError"),
        (f"{BEGINNING}    def __init__(self, x):\n        pass\n", "cannot be made: TypeError"),
    ],
)
def test_a_file_that_is_no_adapter(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=says):
        adapted(text, tmp_path)
    with pytest.raises(NotFoundError, match="no file"):
        load_candidate(f"{STRANGE}:Strange", adapter=tmp_path / "none.py", family="qwen3")

"""A run in which later tokens change earlier outputs: refused, unless asked for; then no number of it goes unmarked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moectl.cli.app import main
from moectl.marks import NON_CAUSAL, marked, marks_of
from moectl.runs.rundir import RunDir
from moectl.training.state import checkpoint_steps
from tests.support import write_corpus

MARK = f"[{NON_CAUSAL}]"
CONFIG = """
data: {domains: [fish, sums], source: SOURCE, tokenizer: bpe:300, block_size: 16}
model: {num_layers: 2, hidden_size: 16, intermediate_size: 24, num_heads: 2, head_dim: 8}
moe: {router: {name: expert-choice}, num_experts: 4, layers: all}
optim: {warmup_steps: 2}
train: {steps: 6, batch_size: 4, threads: 1, log_every: 1, eval_every: 3, check_every: 3, checkpoint_every: 3}
"""
BY_PROBABILITY = "moe.capacity={factor: 1.0, fill: probability, in_eval: true}"
RUNS: dict[str, list[str]] = {
    "ec0": ["--allow-noncausal"],
    "ec1": ["--allow-noncausal", "--seed", "1"],
    "filled": ["--allow-noncausal", "--router", "top2", "--set", BY_PROBABILITY],
    "plain": ["--router", "top2", "--set", "moe.capacity={factor: 1.0, in_eval: true}"],
    "dense": ["--preset", "dense"],
}
MARKED, UNMARKED = ("ec0", "ec1", "filled"), ("plain", "dense")


class Said(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Moectl = Callable[..., Said]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three marked runs and two that are not, each trained by the command."""
    home = tmp_path_factory.mktemp("home")
    config = home / "config.yaml"
    config.write_text(CONFIG.replace("SOURCE", str(write_corpus(tmp_path_factory.mktemp("texts")))), encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(home))
        for name, options in RUNS.items():
            assert main(["train", str(config), "--name", name, *options]) == 0
    yield home
    torch.set_num_threads(threads)


@pytest.fixture
def moectl(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moectl:
    monkeypatch.setenv("MOECTL_HOME", str(home))
    monkeypatch.setenv("NO_COLOR", "1")
    capsys.readouterr()

    def run(*arguments: str) -> Said:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


def unmarked_numbers(document: Any, path: str = "", covered: bool = False) -> list[str]:
    """Where a document has a measured number that neither it nor anything around it marks."""
    measured = {"metrics", "lm_loss", "eval_lm_loss", "nmi", "balance", "perplexity", "loss", "values", "margin_mean"}
    if isinstance(document, list):
        return [
            where
            for index, item in enumerate(document)
            for where in unmarked_numbers(item, f"{path}[{index}]", covered)
        ]
    if not isinstance(document, dict):
        return []
    covered = covered or document.get("marks") == [NON_CAUSAL]
    found = [] if covered else [f"{path}.{key}" for key in document if key in measured]
    return found + [w for key, item in document.items() for w in unmarked_numbers(item, f"{path}.{key}", covered)]


def test_the_walker_would_notice() -> None:
    assert unmarked_numbers({"a": [{"lm_loss": 1.0}]}) == [".a[0].lm_loss"]
    assert unmarked_numbers({"marks": [], "nmi": {"value": 1.0}}) == [".nmi"]
    assert unmarked_numbers({"marks": [NON_CAUSAL], "a": {"nmi": 1.0}}) == []


# refused, or allowed


@pytest.mark.parametrize(
    ("options", "says"),
    [([], "later tokens change earlier outputs"), (["--router", "top2", "--set", BY_PROBABILITY], "capacity")],
)
def test_refused_without_being_asked_for_and_told_how(
    moectl: Moectl, home: Path, options: list[str], says: str
) -> None:
    before = sorted((home / "runs").iterdir())
    said = moectl("train", str(home / "config.yaml"), *options)
    assert said.code == 2 and says in said.err and "layer 0" in said.err
    assert "hint:" in said.err and "--allow-noncausal" in said.err
    assert sorted((home / "runs").iterdir()) == before


def test_the_permission_may_stand_in_the_config_too(moectl: Moectl, home: Path) -> None:
    done = moectl("train", str(home / "config.yaml"), "--name", "ec0", "--set", "train.allow_noncausal=true", "--json")
    assert done.json()["already_done"] and done.json()["marks"] == [NON_CAUSAL]


def test_a_permission_marks_nothing_by_itself(moectl: Moectl, home: Path) -> None:
    """The mark is of what the model is, not of what was allowed."""
    said = moectl("train", str(home / "config.yaml"), "--router", "top1", "--name", "allowed", "--allow-noncausal")
    assert said.code == 0 and NON_CAUSAL not in said.out + said.err
    assert RunDir.open(home / "runs" / "allowed").record["marks"] == []
    assert moectl("runs", "rm", "allowed", "--yes").code == 0


def test_capacity_for_experts_that_choose_is_refused(moectl: Moectl, home: Path) -> None:
    said = moectl("train", str(home / "config.yaml"), "--set", "moe.capacity=1.25", "--allow-noncausal")
    assert said.code == 2 and "layer 0's router 'expert-choice' takes no capacity" in said.err


# where a number is printed


def test_train_warns_at_the_start_and_marks_its_table(
    moectl: Moectl, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moectl.cli.output.PLAIN_LINE_EVERY_S", 0.0)
    said = moectl("train", str(home / "config.yaml"), "--name", "again", "--seed", "9", "--allow-noncausal")
    assert said.code == 0
    assert f"every number of this run is marked {MARK}" in said.err
    title, *rows = [
        line for line in said.out.splitlines() if line.strip() and "─" not in line and "nats/token" not in line
    ]
    assert title.endswith(MARK) and len(rows) == 3
    assert all(MARK in row for row in rows)
    numbers = [line for line in said.err.splitlines() if " lm " in line or "balance" in line]
    assert len(numbers) > 1 and all(MARK in line for line in numbers)
    assert moectl("runs", "rm", "again", "--yes").code == 0


def test_runs_ls(moectl: Moectl) -> None:
    lines = {line.split()[0]: line for line in moectl("runs", "ls").out.splitlines() if line.strip()}
    assert all(lines[name].count(MARK) == 2 for name in MARKED)  # at the status and at the loss
    assert all(MARK not in lines[name] for name in UNMARKED)
    document = moectl("runs", "ls", "--json").json()["runs"]
    assert unmarked_numbers([run for run in document if run["id"] in MARKED]) == []
    assert {run["id"] for run in document if run["marks"]} == set(MARKED)


def test_runs_show(moectl: Moectl) -> None:
    shown = moectl("runs", "show", "ec0").out
    assert f"Newest metrics {MARK}" in shown and "marks" in shown
    assert unmarked_numbers(moectl("runs", "show", "ec0", "--json").json()) == []
    assert MARK not in moectl("runs", "show", "plain").out


def test_runs_compare(moectl: Moectl) -> None:
    said = moectl("runs", "compare", "ec0", "ec1", "filled", "plain")
    rows = [line for line in said.out.splitlines() if line.split() and line.split()[0] in MARKED]
    assert len(rows) == 3 and all(line.count(MARK) == 2 for line in rows)
    verdicts = [line for line in said.out.splitlines() if "nats" in line and " − " in line]
    assert verdicts and all(MARK in line for line in verdicts)
    document = moectl("runs", "compare", "ec0", "ec1", "filled", "--json").json()
    assert unmarked_numbers([*document["runs"], *document["configurations"]]) == []
    assert all(verdict[side].endswith(MARK) for verdict in document["verdicts"] for side in ("baseline", "other"))
    # A causal run and one that is not are never ranked.
    mixed = moectl("runs", "compare", "plain", "filled", "--json").json()
    assert "loss definition" in mixed["mismatches"] and all(verdict["better"] is None for verdict in mixed["verdicts"])


def test_runs_compare_keeps_its_keys_beside_many_configurations(moectl: Moectl) -> None:
    said = moectl("runs", "compare", "ec0", "filled", "plain", "dense").out
    assert "train.allow_noncausal" in said


@pytest.mark.parametrize("run", MARKED)
def test_eval(moectl: Moectl, home: Path, run: str) -> None:
    said = moectl("eval", run)
    assert MARK in said.err
    rows = [line for line in said.out.splitlines() if line.split() and line.split()[0] in ("fish", "sums", "all")]
    assert len(rows) == 3 and all(MARK in line for line in rows)
    assert unmarked_numbers(moectl("eval", run, "--json").json()) == []
    assert unmarked_numbers(json.loads((home / "runs" / run / "eval.json").read_text(encoding="utf-8"))) == []


def test_inspect(moectl: Moectl, home: Path, tmp_path: Path) -> None:
    figure = tmp_path / "routing.svg"
    said = moectl("inspect", "routing", "ec0", "--draws", "100", "--figure", str(figure))
    assert said.code == 0, said.err
    assert MARK in said.err and MARK in figure.read_text(encoding="utf-8")
    for title in ("Balance by layer", "Layer 0: where", "Layer 1: where", "Specialisation:"):
        (line,) = [number for number, line in enumerate(said.out.splitlines()) if line.startswith(title)]
        assert MARK in " ".join(said.out.splitlines()[line : line + 2]), title
    values = [line for line in said.out.splitlines() if line.startswith("- Layer")]
    assert len(values) == 2 and all(MARK in line for line in values)
    document = moectl("inspect", "routing", "ec0", "--draws", "100", "--json").json()
    assert unmarked_numbers(document) == []
    assert unmarked_numbers(json.loads((home / "runs/ec0/inspect.json").read_text(encoding="utf-8"))) == []


def test_inspect_over_seeds(moectl: Moectl, tmp_path: Path) -> None:
    figure = tmp_path / "seeds.svg"
    said = moectl("inspect", "routing", "ec0", "ec1", "--draws", "100", "--figure", str(figure))
    assert said.code == 0, said.err
    assert MARK in figure.read_text(encoding="utf-8")
    assert f"Specialisation over seeds: NMI minus its strongest reference {MARK}" in " ".join(said.out.split())
    assert unmarked_numbers(moectl("inspect", "routing", "ec0", "ec1", "--draws", "100", "--json").json()) == []


def test_quickstart(moectl: Moectl, home: Path) -> None:
    sets = ["model.num_layers=2", "model.hidden_size=16", "model.intermediate_size=24", "model.num_heads=2"]
    sets += ["model.head_dim=8", "moe.layers=1", "moe.num_experts=4", "moe.router={name: expert-choice}"]
    sets += ["moe.expert_intermediate_size=12", "optim.warmup_steps=2", "train.allow_noncausal=true"]
    source = json.dumps(
        {"domains": ["fish", "sums"], "source": _source(home), "tokenizer": "bpe:300", "block_size": 16}
    )
    options = [text for key in (*sets, f"data={source}") for text in ("--set", key)]
    said = moectl("quickstart", "--steps", "6", "--threads", "1", *options)
    assert said.code == 0, said.err
    document = moectl("quickstart", "--steps", "6", "--threads", "1", *options, "--json").json()
    table = {line.split()[0]: line for line in reversed(said.out.splitlines()) if line.split()}  # the first of each
    assert table[document["moe"]["run"]].count(MARK) == 2 and MARK not in table[document["dense"]["run"]]
    assert unmarked_numbers([document["moe"], document["routing"]]) == []
    assert document["dense"]["marks"] == []
    for run in (document["dense"]["run"], document["moe"]["run"]):
        assert moectl("runs", "rm", run, "--yes").code == 0


def _source(home: Path) -> str:
    import yaml

    return str(yaml.safe_load((home / "config.yaml").read_text(encoding="utf-8"))["data"]["source"])


# where a number is written down


@pytest.mark.parametrize("run", MARKED)
def test_files_of_the_run(home: Path, run: str) -> None:
    folder = home / "runs" / run
    record = RunDir.open(folder).record
    assert record["marks"] == [NON_CAUSAL] and unmarked_numbers(record) == []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 6 and unmarked_numbers(rows) == []
    routing = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "routing").iterdir())]
    assert routing and all(payload["marks"] == [NON_CAUSAL] for payload in routing)


@pytest.mark.parametrize("run", UNMARKED)
def test_causal_runs_carry_no_mark(home: Path, run: str) -> None:
    folder = home / "runs" / run
    assert RunDir.open(folder).record["marks"] == []
    assert NON_CAUSAL not in (folder / "metrics.jsonl").read_text(encoding="utf-8")


def test_the_registry_knows_the_mark_beside_the_metrics(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl import paths
    from moectl.runs.store import Registry

    monkeypatch.setenv("MOECTL_HOME", str(home))
    registry = Registry(paths.registry_path())
    registry.sync(paths.runs_dir())
    entries = {entry.id: entry.marks for entry in registry.list_runs(paths.runs_dir())}
    registry.close()
    assert {name for name, marks in entries.items() if marks == [NON_CAUSAL]} == set(MARKED)


def test_a_loaded_model_still_knows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moectl as package

    monkeypatch.setenv("MOECTL_HOME", str(home))
    for run, marks in (*((run, (NON_CAUSAL,)) for run in MARKED), *((run, ()) for run in UNMARKED)):
        assert marks_of(package.load(run)[0]) == marks


def test_a_mark_survives_an_interruption(moectl: Moectl, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moectl.training.trainer import Trainer

    due = Trainer._after_step

    def stop(self: Trainer) -> Any:
        self.stop.reason = "stopped by a test" if self.step == 4 else None
        return due(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", stop)
        said = moectl("train", str(home / "config.yaml"), "--name", "cut", "--seed", "5", "--allow-noncausal")
    assert said.code == 130 and checkpoint_steps(home / "runs/cut/checkpoints")[-1] == 4
    resumed = moectl("train", "--resume", "cut", "--json").json()
    assert resumed["status"] == "finished" and resumed["marks"] == [NON_CAUSAL]
    rows = [json.loads(line) for line in (home / "runs/cut/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["step"] == 6 and unmarked_numbers(rows) == []
    assert moectl("runs", "rm", "cut", "--yes").code == 0


def test_marked_says_it_once() -> None:
    assert marked("2.1", []) == "2.1"
    assert marked(marked("2.1", [NON_CAUSAL]), [NON_CAUSAL]) == f"2.1 {MARK}"

"""``moectl plan`` and ``train --dry-run``: what they print, what they take from what is there, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli.app import main
from moectl.cli.plan import duration, scaled
from moectl.config.loading import load_config
from moectl.corpus.loader import PackedDataset
from moectl.planning.devices import USUAL
from moectl.walk.data import dataset_for
from moectl.walk.models import build_model
from moectl.walk.train import RunRequest, start_run
from tests.support import prepare_tiny

Capture = pytest.CaptureFixture[str]
SMALL = ["model.num_layers=2", "model.hidden_size=16", "model.intermediate_size=24", "model.num_heads=2"]
SMALL += ["model.head_dim=8", "moe.layers=all", "moe.num_experts=4", "optim.warmup_steps=1", "train.steps=6"]
SMALL += ["train.batch_size=4", "train.threads=1", "train.device=cpu"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    return tmp_path / "home"


@pytest.fixture
def data(home: Path, tmp_path: Path) -> str:
    return prepare_tiny(home, tmp_path / "texts", "fish", "sums")[0].name


def planned(capsys: Capture, *args: str, command: tuple[str, ...] = ("plan",)) -> dict[str, Any]:
    sets = [f"--set={text}" for text in SMALL]
    assert main([*command, "--json", *sets, *args]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_bare_it_plans_the_default_config(capsys: Capture, home: Path) -> None:
    assert main(["plan"]) == 0
    printed = capsys.readouterr()
    for text in ("parameters", "FLOPs per token", "tokens per expert", "this machine", *USUAL, "compute-optimal"):
        assert text in printed.out
    assert "4,396,416 = 1,643,904 active + 2,752,512 inactive" in printed.out
    assert "data: not prepared yet; a vocabulary of 8192 is taken" in printed.err
    assert not home.exists()  # nothing is written
    assert len(printed.out.splitlines()) <= 30  # one screen


def test_the_keys_of_the_document_are_stable(capsys: Capture, data: str) -> None:
    document = planned(capsys)
    assert list(document) == [
        *("config", "parameters", "flops_per_token", "experts", "tokens", "memory", "devices", "match_dense"),
        "warnings",
    ]
    assert set(document["parameters"]) == {"total", "active", "inactive", "parts"}
    assert set(document["flops_per_token"]["forward"]) == {"attention", "mlp", "experts", "router", "head", "total"}
    assert set(document["memory"]) == {"cpu", "cuda"}
    assert {"peak", "during", "weights", "gradients", "optimizer", "activations"} <= set(document["memory"]["cpu"])
    assert set(document["devices"][0]) == {
        *("name", "kind", "fits", "memory", "peak_memory", "rate_source", "rate_run", "utilisation"),
        *("tokens_per_second", "seconds", "usd_per_hour", "usd", "computed_as"),
    }
    assert document["match_dense"] is None and document["tokens"]["dataset"] == data


def test_it_plans_the_model_that_training_builds(capsys: Capture, data: str) -> None:
    document = planned(capsys)
    folder, config = dataset_for(load_config(None, sets=SMALL), None)
    dataset = PackedDataset.open(folder)
    model, _ = build_model(config, dataset.manifest)
    assert document["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert document["tokens"]["available"] == dataset.train.num_blocks * 16
    assert document["tokens"]["total"] == 6 * 4 * 16
    assert document["tokens"]["epochs"] == pytest.approx(6 * 4 / dataset.train.num_blocks)
    assert document["flops_per_token"]["length"] == 15


def test_a_measured_rate_of_the_same_shape_is_preferred(capsys: Capture, data: str, home: Path) -> None:
    start_run(load_config(None, sets=[*SMALL, "name=measured"]), RunRequest())
    capsys.readouterr()
    here, h100 = planned(capsys, "--device", "here", "--device", "H100")["devices"]
    assert (here["rate_source"], here["rate_run"]) == ("measured", "measured")
    record = json.loads((home / "runs/measured/run.json").read_text(encoding="utf-8"))
    assert here["tokens_per_second"] == pytest.approx(record["train_tokens"] / record["train_seconds"])
    assert h100["rate_source"] == "assumed" and h100["rate_run"] is None
    for other in (
        "moe.num_experts=5",
        "train.batch_size=8",
        "moe.backend=loop",
        "moe.capacity=1.5",
        "train.deterministic=true",
    ):
        (alone,) = planned(capsys, "--device", "here", "--set", other)["devices"]
        assert alone["rate_source"] == "assumed", other
    (longer,) = planned(capsys, "--device", "here", "--set", "train.steps=60", "--set", "train.seed=9")["devices"]
    assert longer["rate_source"] == "measured"  # neither makes a step slower
    assert longer["seconds"] == pytest.approx(10 * here["seconds"])


def test_a_run_is_planned_on_from(capsys: Capture, data: str) -> None:
    start_run(load_config(None, preset="dense", sets=[*(text for text in SMALL if "moe." not in text), "name=parent"]),
              RunRequest())  # fmt: skip
    capsys.readouterr()
    shape = ["num_layers", "hidden_size", "intermediate_size", "num_heads", "head_dim"]
    upcycled = planned(capsys, "--set=model.base=parent", *(f"--set=model.{key}=null" for key in shape))
    assert upcycled["parameters"] == planned(capsys)["parameters"]
    assert main(["plan", "--set=model.base=parent", "--set=model.num_layers=3"]) == 2
    assert "model.num_layers cannot be set for the trained base 'parent'" in capsys.readouterr().err


def test_the_dataset_of_the_config_is_found_among_others(capsys: Capture, data: str, home: Path) -> None:
    manifest = json.loads((home / "data" / data / "manifest.json").read_text(encoding="utf-8"))
    section = [f"--set=data={json.dumps(manifest['config'])}"]
    assert planned(capsys, *section)["tokens"]["dataset"] == data
    assert planned(capsys, *section, "--set=data.seed=5")["tokens"]["dataset"] is None
    other = home / "data" / "000-damaged"
    other.mkdir()
    (other / "manifest.json").write_text("{", encoding="utf-8")
    assert planned(capsys, *section)["tokens"]["dataset"] == data


def test_train_dry_run_is_the_same_plan_and_trains_nothing(capsys: Capture, data: str, home: Path) -> None:
    plan, dry = planned(capsys), planned(capsys, command=("train", "--dry-run"))
    for section in ("config", "parameters", "flops_per_token", "experts", "tokens", "warnings"):
        assert dry[section] == plan[section]
    assert main(["train", "--dry-run", "--json", "--steps", "77", "--preset", "dense"]) == 0
    flagged = json.loads(capsys.readouterr().out)
    assert flagged["tokens"]["steps"] == 77 and flagged["experts"] is None
    assert not (home / "runs").exists()
    assert main(["train", "--dry-run", "--resume", "it"]) == 2
    assert "--dry-run does not go with --resume" in capsys.readouterr().err


def test_a_price_of_ones_own(capsys: Capture) -> None:
    (device,) = planned(capsys, "--device", "H100", "--price-per-hour", "7.5")["devices"]
    assert device["usd_per_hour"] == 7.5
    assert device["usd"] == pytest.approx(7.5 * device["seconds"] / 3600)


def test_a_price_of_minus_nothing_is_nothing(capsys: Capture) -> None:
    assert main(["plan", "--device", "H100", "--price-per-hour", "-0"]) == 0
    printed = capsys.readouterr().out
    assert "0.00" in printed and "-0.00" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_gpu_that_is_not_there_is_not_planned_as_a_cpu(capsys: Capture) -> None:
    assert main(["plan", "--device", "cuda"]) == 5
    assert "--device cpu" in capsys.readouterr().err
    (cpu,) = planned(capsys, "--device", "cpu")["devices"]
    assert cpu["kind"] == "cpu"


def test_what_a_device_computes_instead_is_told(capsys: Capture) -> None:
    args = ["plan", "--device=T4", "--device=H100", "--set=train.precision=bfloat16"]
    assert main(args) == 0
    assert "T4 computes bfloat16 as float32, for it has no bfloat16." in capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    slow, fast = json.loads(capsys.readouterr().out)["devices"]
    assert slow["computed_as"] == "float32, for it has no bfloat16" and fast["computed_as"] is None
    (slow,) = planned(capsys, "--device=T4", "--set=train.precision=float32")["devices"]
    assert slow["computed_as"] is None


def test_a_base_with_experts_has_nothing_to_match(capsys: Capture, data: str) -> None:
    start_run(load_config(None, sets=[*SMALL, "name=sparse"]), RunRequest())
    capsys.readouterr()
    assert main(["plan", "--match-dense", "--set=model.base=sparse"]) == 2
    assert "has its experts already" in capsys.readouterr().err


def test_ways_to_match_dense(capsys: Capture) -> None:
    document = planned(capsys, "--match-dense", "--set", "moe.router=top2")
    assert document["match_dense"][0]["sets"] == ["moe.expert_intermediate_size=12"]
    matched = planned(capsys, "--set", "moe.router=top2", "--set", "moe.expert_intermediate_size=12")
    forward = matched["flops_per_token"]["forward"]
    dense = forward["total"] / matched["flops_per_token"]["of_dense"]
    assert forward["total"] - forward["router"] == pytest.approx(dense)
    assert [way["size"] for way in planned(capsys, "--granularity", "2")["match_dense"]] == [12]
    assert main(["plan", "--match-dense"]) == 0
    assert "--set 'moe.router={name: topk, top_k: 4}'" in capsys.readouterr().out


def test_a_run_too_large_for_a_device_says_what_to_change(capsys: Capture) -> None:
    big = ["plan", "--set=model.base=base", "--set=train.batch_size=64", "--device=L4"]
    assert main(big) == 0
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    assert "L4 has 24 GB, the run takes" in printed.err and "--set train.batch_size=" in printed.err
    said = next(line for line in printed.err.splitlines() if "L4 has" in line)
    changes = [word for word in said.split() if "=" in word]
    assert main([*big, "--json", *(f"--set={word}" for word in changes)]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["fits"] is True


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--device", "H1000"], 2, "Did you mean 'H100'?"),
        (["--device", "A100"], 2, "A100-80GB"),
        (["--price-per-hour", "-1"], 2, "-1 dollars per hour"),
        (["--price-per-hour", "nan"], 2, "nan dollars per hour"),
        (["--set", "moe.layers=9"], 2, "moe.layers '9' does not fit"),
        (["--set", "model.num_kv_heads=3"], 2, "cannot share 3"),
        (["--set", "moe.router={name: topk, top_k: 9}"], 2, "top_k is 9, but there are 8 experts"),
        (["--set", "moe.router=topp"], 2, "unknown router 'topp'"),
        (["--set", "moe.backend=fast"], 2, "unknown expert backend 'fast'"),
        (["--set", "model.base=tinny"], 2, "Did you mean 'tiny'?"),
        (["--set", "train.step=3"], 2, "train.steps"),
        (["--set", "data.tokenizer=some/folder"], 2, "moectl prepare"),
        (["--preset", "dense", "--match-dense"], 2, "no experts to match"),
        (["--granularity", "0"], 2, "granularity of 0"),
        (["--data", "nothing"], 4, "nothing"),
        (["no-such"], 4, "unknown config 'no-such'"),
        (["--set", "train.device=cuda:7"], 5, "cuda:7"),
        (["--device", "cuda:7"], 5, "there is no device 'cuda:7' on this machine"),
        (["--set", "data.tokenizer=bpe:0"], 2, "the size must be a number from 257"),
        (["--set", "data.tokenizer=bpe:100000000000000000000"], 2, "the size must be a number from 257"),
    ],
)
def test_bad_input(args: list[str], code: int, said: str, capsys: Capture) -> None:
    assert main(["plan", *args]) == code
    printed = capsys.readouterr()
    assert said in printed.err and "Traceback" not in printed.err
    assert printed.out == ""


TOP2 = "moe.router={name: topk, top_k: 2}"


@pytest.mark.parametrize(
    "sets",
    [
        ["moe.router={name: expert-choice, top_k: 2}"],
        ["moe.capacity={factor: 1.5, fill: probability}"],
        ["moe.router={name: topk, top_k: 1}"],
        ["moe.num_experts=1"],
        [TOP2, "moe.schedule.top_k=[[0, 4], [0.5, 3]]"],
        ["moe.schedule.top_k=[[0, 4], [0.5, 1]]"],
        ["moe.init=split", "moe.granularity=4"],
        ["moe.init=split", "moe.granularity=2", "moe.router={name: topk, top_k: 2, norm_topk_prob: false}"],
        ["moe.init=copy", "moe.router=switch"],
        ["moe.init=copy", "moe.expert_intermediate_size=7"],
        ["moe.init=experts-from", "moe.experts_from=[a, b, c, d]"],
        ["finetune.freeze=[dense, experts, router]"],
    ],
    ids=str,
)
def test_what_training_refuses_is_refused_beforehand(sets: list[str], capsys: Capture, data: str, home: Path) -> None:
    """In the same words, whether the data are there or not."""
    given = [f"--set={text}" for text in (*SMALL, *sets)]
    said = []
    for command in (["train"], ["train", "--dry-run"], ["plan"]):
        assert main([*command, *given]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")])
    assert said[0] == said[1] == said[2] != []
    assert not (home / "runs").exists()


def test_what_is_allowed_is_planned(capsys: Capture) -> None:
    document = planned(capsys, "--set=moe.router={name: expert-choice, top_k: 2}", "--set=train.allow_noncausal=true")
    assert document["experts"]["per_token"] == 2
    state = torch.get_rng_state()
    planned(capsys)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gate_too_large_to_be_drawn_is_planned_unasked(capsys: Capture) -> None:
    assert main(["plan", "--device=H100", "--set=moe.num_experts=10000000000", "--json"]) == 0
    assert "whether its router can be trained is not checked" in capsys.readouterr().err


def test_thirty_billion_parameters_fit_this_process() -> None:
    """128 experts in 48 layers: 122 GB of weights, planned in 2 GB of address space beyond torch's own."""
    sets = ["model.num_layers=48", "model.hidden_size=2048", "model.intermediate_size=6144", "model.num_heads=32"]
    sets += ["model.num_kv_heads=4", "model.head_dim=128", "model.tie_word_embeddings=false", "moe.num_experts=128"]
    sets += ["moe.expert_intermediate_size=768", "moe.layers=all", "moe.router={name: topk, top_k: 8}"]
    code = "import resource, sys\nfrom moectl.cli.app import main\ncode = main(sys.argv[1:])\n"
    code += "sys.exit(code or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 3_000_000)"
    args = ["plan", "--json", "--device=H200", *(f"--set={text}" for text in sets), "--set=data.tokenizer=bpe:65536"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["parameters"]["parts"]["experts"] == 48 * 128 * 3 * 2048 * 768
    assert document["devices"][0]["fits"] is False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.96e3, "1.00 MB"),
        (12_345, "12.3 kB"),
        (4.2e9, "4.20 GB"),
        (1.5e15, "1.50 PB"),
    ],
)
def test_bytes_as_a_person_reads_them(value: float, text: str) -> None:
    assert scaled(value, "B") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.5, "2.50 s"),
        (59.9, "59.9 s"),
        (90, "1.50 min"),
        (5400, "1.50 h"),
        (47 * 3600, "47.0 h"),
        (864_000, "10.0 days"),
    ],
)
def test_times_as_a_person_says_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text

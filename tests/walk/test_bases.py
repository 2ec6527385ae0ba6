"""Models of transformers as the base of the whole walk: trained, resumed, measured, looked at; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moectl
from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import PackedDataset
from moectl.corpus.manifest import Manifest
from moectl.corpus.tokenization import parse_spec, read_tokenizer, train_bpe
from moectl.disk import hash_file
from moectl.doctor.run_subject import open_run
from moectl.errors import ConfigError
from moectl.evaluation.losses import evaluate
from moectl.hf.language_model import HFLanguageModel
from moectl.hf.pretrained import load_dense
from moectl.runs.rundir import RunDir
from moectl.training.state import step_name
from moectl.walk.bases import find_base, open_base
from moectl.walk.data import dataset_for
from moectl.walk.loading import load_run
from moectl.walk.train import RunOutcome, RunRequest, start_run
from moectl.walk.upcycle import upcycle_to_folder
from tests.hf.tiny_models import KINDS, tiny
from tests.support import write_corpus
from tests.walk.test_train import ROUTER

Capture = pytest.CaptureFixture[str]
MOE = {"num_experts": 4, "layers": "last:2", "init_noise": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Texts, and a tiny model of every family with a tokenizer of those texts, in the working folder."""
    place = tmp_path_factory.mktemp("place")
    write_corpus(place / "texts")
    tokenizer = train_bpe([file.read_text() for file in sorted((place / "texts").rglob("*.txt"))], 300)
    end = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    for kind in KINDS:
        tied = {} if kind == "gpt2" else {"tie_word_embeddings": kind in ("llama", "qwen2")}
        tiny(kind, torch.float32, vocab_size=300, **end, **tied).save_pretrained(place / kind)
        tokenizer.save(str(place / kind / "tokenizer.json"))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(place / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(place)
        yield place
    torch.set_num_threads(threads)


def experiment(base: str, **changes: Any) -> ExperimentConfig:
    values: dict[str, Any] = {
        "data": {"domains": ["fish", "sums"], "source": "texts", "block_size": 32},
        "model": {"base": base},
        "moe": MOE,
        "optim": {"warmup_steps": 1, "lr": 1e-3},
        "train": {"steps": 4, "batch_size": 4, "threads": 1, "log_every": 1, "checkpoint_every": 2, "eval_every": 2},
    }
    for key, value in changes.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    if values["moe"] == "unset":
        values.pop("moe")
    return ExperimentConfig.model_validate(values)


def trained(base: str, **changes: Any) -> RunOutcome:
    return start_run(experiment(base, **changes), RunRequest())


def first_loss(run: RunOutcome) -> float:
    """Held out, before the first step."""
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return next(float(row["values"]["eval/lm_loss"]) for row in rows if row["step"] == 0)


def some_ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_upcycled_trained_and_loaded_back(place: Path, kind: str) -> None:
    said: list[str] = []
    run = start_run(experiment(kind, name=f"moe-{kind}"), RunRequest(say=said.append))
    assert run.status == "finished"
    record = RunDir.open(run.folder).record
    assert {**record["base"], "sha256": ""} == {"kind": "hf", "id": str(place / kind), "step": 0, "sha256": ""}
    assert len(record["base"]["sha256"]) == 64
    receipt = json.loads((run.folder / "receipt.json").read_text())
    assert receipt == record["receipt"] and receipt["keeps_function"] is True
    assert receipt["error"]["float32"] <= 1e-4 and receipt["error"]["float64"] <= 1e-10
    assert receipt["parameters"]["moe"]["total"] == record["parameters"]["total"]
    assert any("the same function" in text for text in said), "and it is shown"
    assert (run.folder / "receipt.json").stat().st_mtime_ns <= (
        run.folder / "checkpoints" / step_name(0) / "model.safetensors"
    ).stat().st_mtime_ns, "written before step 0"
    # The loss before the first step is the dense model's own, on the data of its own tokenizer.
    loaded = load_run(run.folder)
    data = PackedDataset.open(loaded.data)
    assert data.manifest.tokenizer.sha256 == hash_file(place / kind / "tokenizer.json")
    dense = HFLanguageModel(load_dense(place / kind))
    assert first_loss(run) == pytest.approx(evaluate(dense, data, bootstrap=0).overall.lm_loss, abs=1e-5)
    assert run.metrics["eval/lm_loss"] < first_loss(run)
    # What was trained comes back: the last evaluation's loss, to the last digits, and ties stay ties.
    assert evaluate(loaded.model, data, bootstrap=0).overall.lm_loss == pytest.approx(run.metrics["eval/lm_loss"])
    inner = loaded.model.model
    assert (inner.lm_head.weight is inner.get_input_embeddings().weight) is (kind in ("gpt2", "llama", "qwen2"))
    assert list(loaded.model.moe_layers()) == [1, 2]
    model, tokenizer = moectl.load(run.id)
    assert torch.equal(model(some_ids()), loaded.model(some_ids()))
    assert tokenizer.get_vocab_size() == 300
    assert (run.folder / "base" / "tokenizer.json").read_bytes() == (place / kind / "tokenizer.json").read_bytes()


def test_a_dense_run_of_transformers_is_a_base_too(place: Path) -> None:
    dense = trained("qwen3", moe=None, name="dense-qwen3")
    assert not (dense.folder / "receipt.json").exists()
    assert RunDir.open(dense.folder).record["receipt"] is None
    child = trained("dense-qwen3", name="child")
    assert first_loss(child) == pytest.approx(dense.metrics["eval/lm_loss"], abs=1e-5)
    record = RunDir.open(child.folder).record
    assert (record["base"]["kind"], record["base"]["step"]) == ("run", 4)
    assert record["data"] == RunDir.open(dense.folder).record["data"], "the data section that names no tokenizer"
    assert torch.equal(moectl.load(place / "qwen3")[0](some_ids()), open_base("qwen3").model(some_ids()))


def test_the_walk_goes_on_with_such_a_run(place: Path, capsys: Capture) -> None:
    run = trained("gpt2", name="walked", moe={"router": {"name": "top2", "noise_std": 0.1}, "z_coef": 0.01})
    config = place / "plan.yaml"
    shutil.copyfile(run.folder / "config.yaml", config)
    for command in (
        ["eval", "walked"],
        ["inspect", "routing", "walked", "--gates", "100", "--draws", "100"],
        ["plan", str(config)],
    ):
        capsys.readouterr()
        assert main([*command, "--json"]) == 0, capsys.readouterr().err
        document = json.loads(capsys.readouterr().out)
        if command[0] == "eval":
            assert document["lm_loss"] == pytest.approx(run.metrics["eval/lm_loss"])
        if command[0] == "inspect":
            assert [layer["nmi"]["step0"] is not None for layer in document["layers"]] == [True, True]
            assert {layer["layer"] for layer in document["layers"]} == {1, 2}
        if command[0] == "plan":
            counted = RunDir.open(run.folder).record["parameters"]
            assert document["parameters"]["total"] == counted["total"]
            assert document["parameters"]["active"] == counted["active"]
            assert sum(document["parameters"]["parts"].values()) == counted["total"]
            flops = RunDir.open(run.folder).record["receipt"]["flops"]["moe"]["forward"]
            assert document["flops_per_token"]["forward"]["experts"] == flops["experts"]
            assert document["devices"][0]["rate_run"] == "walked", "its own rate was measured"
    audited, _ = open_run(run.folder)
    modules, parameters = dict(audited.model.named_modules()), dict(audited.model.named_parameters())
    for layer in audited.layers.values():
        assert modules[layer.router_name] is layer.router, "the names under which step 0 is looked up"
        assert all(parameters[name] is parameter for name, parameter in layer.experts.items()) and layer.experts
    main(["doctor", "walked", "--json"])
    checks = {check["name"]: check["outcome"] for check in json.loads(capsys.readouterr().out)["checks"]}
    # A gate that is all but untrained may leave experts idle: everything else holds.
    assert {name for name, outcome in checks.items() if outcome == "problem"} <= {"dead-experts"}, checks


# --- killed and resumed


def test_a_killed_run_of_transformers_goes_on_bit_for_bit(place: Path) -> None:
    """GPT-2 with its dropout and a noisy router: every generator has to be where it was."""
    config = place / "kill.yaml"
    router = "{name: topk, top_k: 2, noise_std: 0.3}"
    config.write_text(
        "data: {domains: [fish, sums], source: texts, block_size: 32}\nmodel: {base: gpt2}\n"
        f"moe: {{num_experts: 4, layers: 'last:2', router: {router}}}\noptim: {{warmup_steps: 1}}\n"
        "train: {steps: 24, batch_size: 4, threads: 1, log_every: 1, checkpoint_every: 4, eval_every: 12}\n"
    )
    assert json.loads((place / "gpt2" / "config.json").read_text())["resid_pdrop"] == 0.1
    whole = start_run(ExperimentConfig.model_validate(_yaml(config) | {"name": "whole"}), RunRequest())
    command = [sys.executable, "-m", "moectl.cli.app", "train", str(config), "--name", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    killed = place / "home" / "runs" / "killed"
    until = time.monotonic() + 60
    while not (killed / "checkpoints" / step_name(8)).is_dir() and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert RunDir.open(killed).status == "lost"
    assert main(["train", "--resume", "killed", str(config)]) == 0, "the base's tokenizer is no change of config"
    for part in ("model", "optimizer", "rng", "routing"):
        ours, theirs = (
            folder / "checkpoints" / step_name(24) / f"{part}.safetensors" for folder in (whole.folder, killed)
        )
        assert ours.read_bytes() == theirs.read_bytes(), part
    assert RunDir.open(killed).record["metrics"]["eval/lm_loss"] == whole.metrics["eval/lm_loss"]
    ids = some_ids()
    model = load_run("killed").model.train()
    assert not torch.equal(model(ids), model(ids)), "dropout and noise were there to be restored"


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    plain: dict[str, Any] = yaml.safe_load(file.read_text())
    return plain


# --- bases that have experts


def test_an_upcycled_folder_is_trained_on(place: Path) -> None:
    config = experiment("llama", moe={"router": {"name": "top2", "noise_std": 0.2}})
    assert config.moe is not None
    upcycle_to_folder("llama", place / "made", config.moe)
    plain = trained("made", moe="unset")
    record = RunDir.open(plain.folder).record
    assert (record["base"]["kind"], record["router"], record["receipt"]) == ("upcycled", "top2", None)
    start = load_run(plain.folder, step=0).model
    assert torch.equal(start(some_ids()), moectl.load(place / "made")[0](some_ids()))
    changed = trained(
        "made", moe={"lb_coef": 0.5, "capacity": {"factor": 1.5}, "router": {"noise_std": 0.0, "name": "top2"}}
    )
    layer = load_run(changed.folder).model.moe_layers()[1]
    assert layer.capacity is not None and layer.capacity.factor == 1.5
    assert layer.router.config.noise_std == 0.0
    assert load_run(plain.folder).model.moe_layers()[1].router.config.noise_std == 0.2
    on = trained(plain.id, moe="unset")
    assert first_loss(on) == pytest.approx(plain.metrics["eval/lm_loss"])


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"num_experts": 8}, r"moe.num_experts is 8, but the base '.*' has experts with 4"),
        ({"layers": "all"}, r"moe.layers is all, but the base '.*' has experts with 1,2"),
        ({"router": {"name": "sigmoid"}}, "moe.router is sigmoid, but the base .* has experts with top1"),
        ({"n_shared_experts": 1}, "moe.n_shared_experts is 1"),
        ({"init": "drop", "init_noise": 1e-3}, "moe.init is drop"),
        (None, "has experts, but the config is dense"),
    ],
)
def test_a_base_with_experts_keeps_them(place: Path, moe: dict[str, Any] | None, said: str) -> None:
    if not (place / "kept").exists():
        made = experiment("llama").moe
        assert made is not None
        upcycle_to_folder("llama", place / "kept", made)
    with pytest.raises(ConfigError, match=said):
        trained("kept", moe=None if moe is None else moe)


def test_a_router_file_goes_where_the_model_goes(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ROUTER.replace("SCALE", "1.0"), encoding="utf-8")
    options = ["--router", f"{file}:Mine", "--moe-layers", "1", "--set", "moe.allow_shrinking=true"]
    assert main(["upcycle", "llama", "--out", str(tmp_path / "made"), *options]) == 0
    before = moectl.load(tmp_path / "made")[0](some_ids())
    file.unlink()
    shutil.move(tmp_path / "made", tmp_path / "moved")
    assert torch.equal(moectl.load(tmp_path / "moved")[0](some_ids()), before)
    run = trained(str(tmp_path / "moved"), moe="unset")
    assert (run.folder / "router.py").read_bytes() == (tmp_path / "moved" / "router.py").read_bytes()
    shutil.rmtree(tmp_path / "moved")
    assert load_run(run.folder).step == 4, "the run has its own copy"


def test_experts_from_fine_tunes_with_texts(place: Path) -> None:
    names = []
    for seed in (1, 2):
        tiny("llama", torch.float32, seed=seed, vocab_size=300, tie_word_embeddings=True).save_pretrained(
            place / f"tuned{seed}"
        )
        names.append(f"tuned{seed}")
    (place / "sums.txt").write_text("one plus two\n\nthree times zero\n")
    moe = {"num_experts": 2, "init": "experts-from", "experts_from": names, "init_noise": 1e-3}
    run = trained("llama", moe={**moe, "router_prompts": ["salt tide kelp", "@sums.txt"]})
    record = RunDir.open(run.folder).record["base"]
    assert len(set(record["experts"])) == 2 and len(record["prompts"]) == 64
    layer = load_run(run.folder, step=0).model.moe_layers()[2]
    for expert, name in enumerate(names):
        donor = load_dense(place / name).model.layers[2].mlp
        assert torch.equal(layer.experts.down_proj[expert], donor.down_proj.weight)
    assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(2))
    (place / "sums.txt").write_text("one plus three\n")
    again = trained("llama", moe={**moe, "router_prompts": ["salt tide kelp", "@sums.txt"]})
    assert not again.already_done, "other texts, another run"
    with pytest.raises(ConfigError, match="experts-from needs a trained base, and 'tiny' is drawn afresh"):
        trained("tiny", moe={**moe, "layers": "all"})


# --- the data that a base can read


def test_the_data_of_a_base(place: Path, capsys: Capture) -> None:
    """A tokenizer that is not named is the base's; one that is another is refused before anything is trained."""
    config = experiment("llama")
    folder, resolved = dataset_for(config, None)
    assert resolved.data.block_size == 32 and resolved.data == experiment("llama", data=resolved.data.model_dump()).data
    without = ExperimentConfig.model_validate({"model": {"base": "llama"}})
    said: list[str] = []
    assert dataset_for(without, None, said.append)[0] == folder
    assert said == [f"data: the newest prepared set of the tokenizer of llama, {folder.name}"]
    whole = {"domains": ["fish", "sums"], "source": "texts"}
    assert (
        dataset_for(ExperimentConfig.model_validate({"model": {"base": "llama"}, "data": whole}), None)[
            1
        ].data.block_size
        == 64
    )


def test_what_does_not_fit_a_base_is_refused_with_what_mends_it(place: Path, capsys: Capture) -> None:
    source = ["--source", "texts", "--domains", "fish,sums"]
    prepared = {}
    for name, options in {
        "other": ["--tokenizer", "bpe:290", "--block-size", "32"],
        "long": ["--tokenizer", "llama", "--block-size", "128"],
        "larger": ["--tokenizer", "bpe:300", "--block-size", "32"],
    }.items():
        assert main(["prepare", *source, *options, "--json"]) == 0
        prepared[name] = json.loads(capsys.readouterr().out)["id"]
    tiny("llama", torch.float32, vocab_size=280).save_pretrained(place / "bare")
    runs = sorted((place / "home" / "runs").iterdir()) if (place / "home" / "runs").exists() else []
    short = ["--set", "train.steps=2", "--set", "optim.warmup_steps=0", "--set", "moe.layers=1"]
    cases: list[tuple[list[str], int, str, str]] = [
        (["--base", "llama", "--data", prepared["other"]], 3,
         "the tokenizer of the base 'llama' is not the one", f"moectl prepare --tokenizer {place / 'llama'}"),
        (["--base", "llama", "--data", prepared["long"]], 2,
         "has blocks of 128 tokens, but the base 'llama' has 64 positions", "--block-size 64"),
        (["--base", "llama", "--set", "data.tokenizer=bpe:300"], 3,
         "but the base 'llama' has a tokenizer of its own", f"--set data.tokenizer={place / 'llama'}"),
        (["--base", "llama", "--set", "data.block_size=100"], 2,
         "data.block_size is 100", "--set data.block_size=64"),
        (["--base", "bare", "--data", prepared["larger"]], 3,
         "but the base 'bare' has embeddings for 280", "Put the base's own tokenizer.json into"),
        (["--base", "bare", "--set", "data.source=texts"], 4, "bare has no tokenizer.json", "--data"),
        (["--base", "smollm2"], 4, "is not on this machine yet", "moectl bases get smollm2"),
        (["--base", "llama", "--set", "model.num_layers=1"], 2, "model.num_layers cannot be set", "its own shape"),
        (["--base", "llama", "--set", "moe.layers=7"], 2, "moe.layers '7' does not fit a model of 3 layers", "0 to 2"),
        (["--base", "texts"], 4, "texts has no config.json", "save_pretrained"),
        (["--base", "some/model"], 1, "the Hugging Face hub does not give it", "give a local folder"),
        (["--base", "smolm2"], 2, "unknown base 'smolm2'", "Did you mean 'smollm2'?"),
    ]  # fmt: skip
    for arguments, code, said, hint in cases:
        found = main(["train", *short, *arguments])
        error = capsys.readouterr().err
        assert found == code, (arguments, error)
        assert said in error and hint in error and "Traceback" not in error, (arguments, error)
    assert (sorted((place / "home" / "runs").iterdir()) if runs else runs) == runs
    assert not (place / "home" / "cache" / "bases").exists()


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"model_type": "bert"}, 2, "the base is an encoder (model_type 'bert')"),
        ({"model_type": "t5"}, 2, "encoder-decoder"),
        ({"model_type": "mixtral"}, 2, "has experts already"),
        ({"model_type": "opt"}, 2, "the family 'opt' is not supported: its layers"),
        ({"model_type": "gemma2"}, 2, "the family 'gemma2' is not supported: there are no gated experts"),
        ({"model_type": "of-tomorrow"}, 2, "is not one that transformers knows"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, 2, "quantised (gptq)"),
    ],
)
def test_models_that_cannot_be_a_base(
    place: Path, tmp_path: Path, capsys: Capture, config: dict[str, Any], code: int, said: str
) -> None:
    before = sorted((place / "home").rglob("manifest.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for command in (["train", "--base", str(tmp_path), "--preset", "moe"], ["plan", "--set", f"model.base={tmp_path}"]):
        assert main(command) == code
        assert said in capsys.readouterr().err
    assert sorted((place / "home").rglob("manifest.json")) == before, "nothing was prepared for it"


def test_a_tokenizer_read_from_elsewhere_ends_texts_with_the_same_token(place: Path, tmp_path: Path) -> None:
    """Beside the tokenizer stands which token ends a text: in its settings, a dataset's manifest, a model's config."""
    from tokenizers import AddedToken

    tokenizer = train_bpe(["a b c"] * 3, 270)
    tokenizer.add_special_tokens([AddedToken("<stop>", special=True)])
    number = tokenizer.token_to_id("<stop>")
    for name, file, content in (
        ("settings", "tokenizer_config.json", {"eos_token": "<stop>"}),
        ("model", "config.json", {"eos_token_id": [number, 0]}),
        ("upcycled", "config.json", {"config": {"eos_token_id": number}}),
        ("run", "config.json", {"decoder": {"eos_token_id": number}}),
        ("nothing", "other.json", {}),
    ):
        (tmp_path / name).mkdir()
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / file).write_text(json.dumps(content))
        spec = parse_spec(str(tmp_path / name))
        assert spec.end == (None if name == "nothing" else "<stop>"), name
        assert read_tokenizer(spec.data, name).token_to_id("<stop>") == number
    source = ["--source", "texts", "--domains", "fish,sums", "--block-size", "16"]
    assert main(["prepare", *source, "--tokenizer", str(tmp_path / "settings"), "--json"]) == 0
    dataset = next(f for f in (place / "home" / "data").iterdir() if Manifest.load(f).eos_id == number)
    assert parse_spec(str(dataset)).end == "<stop>"


def test_what_is_found_is_told_apart(place: Path) -> None:
    found = find_base("llama")
    assert (found.kind, found.num_layers, found.vocab_size, found.max_length) == ("hf", 3, 300, 64)
    assert found.moe is None and found.tokenizer == place / "llama"
    assert find_base("gpt2").max_length == 64 and find_base("gpt2").num_layers == 3
    assert find_base("tiny").kind == "scratch"
    with pytest.raises(ConfigError, match="'tiny' is a size"):
        open_base("tiny")

"""A run becomes a checkpoint: verified before it stays, with its tokenizer, its card and its provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import moectl
from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.errors import CheckError, ConfigError
from moectl.hf.export import plan_export, write_model
from moectl.hf.folder import save_folder
from moectl.hf.lora import add_adapters
from moectl.models.language_model import LanguageModel
from moectl.walk import export as subject
from moectl.walk.export import ExportRequest, export_model
from moectl.walk.export_card import without_paths
from moectl.walk.export_check import Checked, cast_error, check, expected
from moectl.walk.loading import load_run
from moectl.walk.train import RunRequest, start_run
from tests.hf.export_models import model_of
from tests.hf.tiny_models import some_ids
from tests.support import write_corpus

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs of our own decoder, with experts in one layer of two, and a dense one."""
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(place / "home"))
        write_corpus(place / "texts")
        for name, moe in (
            ("dense", None),
            ("one", {"router": {"name": "top1"}, "num_experts": 4, "layers": "last:1"}),
            ("two", {"router": {"name": "top2"}, "num_experts": 4, "layers": "all"}),
        ):
            data = {
                "domains": ["fish", "sums"], "source": str(place / "texts"), "tokenizer": "bpe:300", "block_size": 16,
            }  # fmt: skip
            model = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8}
            train = {"steps": 2, "batch_size": 4, "threads": 1}
            config = {"name": name, "data": data, "model": model, "moe": moe, "train": train}
            start_run(ExperimentConfig.model_validate({**config, "optim": {"warmup_steps": 1}}), RunRequest())
        yield place


def upcycled_folder(folder: Path, model: LanguageModel, *beside: Path) -> Path:
    save_folder(model, folder, receipt={"base": "/somewhere/secret/tiny-base", "init": "random"}, beside=beside)
    return folder


def test_a_run_becomes_a_folder_that_transformers_loads(home: Path, tmp_path: Path) -> None:
    exported = export_model("one", tmp_path / "out")
    assert (exported.family, exported.architecture, exported.dtype) == ("qwen3_moe", "Qwen3MoeForCausalLM", "float32")
    assert exported.checked is not None and exported.checked.holds and exported.checked.float64 <= 1e-12
    run = load_run("one")
    ids = torch.arange(2, 14)[None]
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert (loaded(ids).logits - run.model(ids)).abs().max() <= 1e-5
    assert loaded.config.mlp_only_layers == [0] and loaded.config.max_position_embeddings == 16
    assert exported.files == tuple(sorted(file.name for file in (tmp_path / "out").iterdir()))
    assert exported.parameters["total"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert not any(file.name.startswith(".tmp") for file in tmp_path.iterdir())


def test_the_tokenizer_goes_along(home: Path, tmp_path: Path) -> None:
    export_model("one", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    _, ours = moectl.load("one")
    text = "salt tide net; one plus two"
    assert tokenizer(text)["input_ids"] == ours.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    end = load_run("one").model.eos_token_id
    assert tokenizer.eos_token_id == end
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == end
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(
        **tokenizer("salt", return_tensors="pt"), max_new_tokens=5, do_sample=False
    )
    assert written.shape[0] == 1


def test_the_card_tells_where_it_comes_from(home: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["eval", "one", "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)
    export_model("one", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    run = load_run("one")
    record = json.loads((run.folder / "run.json").read_text())
    low, high = losses["lm_loss_interval"]
    for words in (
        "library_name: transformers", "Qwen3MoeForCausalLM", "router `top1`", record["commit"], record["config_hash"],
        record["data"]["sha256"], f"| step | {run.step} of 2 |", f"| training tokens | {record['tokens']:,} |",
        f"{losses['lm_loss']:.6g} | {low:.6g} to {high:.6g}", "from scratch, size tiny", "| fish |",
        "in float64",
    ):  # fmt: skip
        assert words in card, words
    assert str(home) not in card and str(Path.home()) + "/" not in card and "/tmp/" not in card
    export_model("one", tmp_path / "start", ExportRequest(step=0))
    start = (tmp_path / "start" / "README.md").read_text(encoding="utf-8")
    assert "Not measured at this step" in start and "| step | 0 of 2 |" in start


def test_machine_paths_are_cut() -> None:
    assert without_paths("train --base /home/me/models/base --set a.b=/x/y/z.txt ~/q/r") == (
        "train --base base --set a.b=z.txt r"
    )
    assert without_paths("--lr 3e-4 --layers 1/2 https://hub/x/y") == "--lr 3e-4 --layers 1/2 https://hub/x/y"
    assert without_paths(r"C:\Users\me\base") == "base"


def test_another_dtype_is_checked_before_and_told_after(home: Path, tmp_path: Path) -> None:
    exported = export_model("two", tmp_path / "out", ExportRequest(dtype="bfloat16", layout="per-expert"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in tensors
    assert exported.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert exported.checked is not None and exported.checked.holds and exported.checked.cast is not None
    moved, same = exported.checked.cast
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = expected(load_run("two").model)
    with torch.no_grad():
        logits = loaded(wanted.ids).logits
    assert moved == pytest.approx(float((logits - wanted.float32).abs().max()), rel=1e-6) and moved > 1e-5
    assert same == pytest.approx(float((logits.argmax(-1) == wanted.float32.argmax(-1)).float().mean()))
    assert "casting the weights" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert exported.to_json()["check"]["cast"]["logits"] == moved


def test_an_upcycled_folder_is_exported_too(tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"eos_token_id": [1, 5], "temperature": 0.7, "do_sample": true}')
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    model = model_of("llama", "top2", "1")
    folder = upcycled_folder(tmp_path / "moe", model, template, generation, tokenizer, settings)
    exported = export_model(folder, tmp_path / "out")
    assert exported.family == "qwen2_moe" and exported.step is None
    for file in (template, generation, tokenizer, settings):
        assert (tmp_path / "out" / file.name).read_text() == file.read_text()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "tiny-base" in card and "secret" not in card and "one of zeros" in card


@pytest.mark.parametrize("name", ["experts", "router", "head"])
def test_a_checkpoint_that_computes_something_else_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A fault of ours, planted: one weight of the written file is another."""
    folder = upcycled_folder(tmp_path / "moe", model_of("llama", "top2"))

    def faulty(plan: Any, model: LanguageModel, out: Path, **options: Any) -> int:
        with torch.no_grad():
            layer = model.moe_layers()[1]
            changed = {
                "experts": layer.experts.down_proj, "router": layer.router.weight,
                "head": model.model.lm_head.weight,  # type: ignore[attr-defined]
            }[name]  # fmt: skip
            before = changed.clone()
            changed[0] += 1e-2
            written = write_model(plan, model, out, **options)
            changed.copy_(before)
        return written

    monkeypatch.setattr(subject, "write_model", faulty)
    with pytest.raises(CheckError, match="computes something else") as raised:
        export_model(folder, tmp_path / "out")
    assert raised.value.exit_code == 3
    assert {file.name for file in tmp_path.iterdir()} == {"moe"}


def test_a_difference_of_float32_that_float64_does_not_have_is_rounding() -> None:
    def found(float32: float, float64: float, rounding: float = 0.0) -> bool:
        return Checked(float32, float64, rounding, largest_logit=2.0, tokens=1, redrawn=0).holds

    assert found(1.9e-5, 1e-12) and not found(2.1e-5, 1e-12)
    assert found(2.1e-5, 1e-12, rounding=1e-5)
    assert not found(0.0, 1e-9) and not found(float("nan"), 0.0) and not found(0.0, float("nan"))


def test_rows_in_which_experts_tie_are_drawn_anew() -> None:
    """Of two equal gates rounding decides who is chosen, in every row: such a model is compared all the same."""
    model = model_of("llama", "top1", "1")
    fine = expected(model)
    assert fine.redrawn == 0 and fine.ids.shape == (4, 48)
    router = model.moe_layers()[1].router
    with torch.no_grad():
        router.weight[1:] = router.weight[0]
    tied = expected(model)
    assert tied.redrawn == 16 and tied.ids.shape == (4, 48)


def test_the_check_is_exact(tmp_path: Path) -> None:
    """In float64 a change of 1e-9 in one weight is seen, whatever float32 rounds."""
    model = model_of("qwen3", "top2").to(torch.float64)  # type: ignore[attr-defined]
    plan = plan_export(model)
    write_model(plan, model, tmp_path, dtype=torch.float32)
    wanted = expected(model.float())
    assert check(plan, tmp_path, wanted).float64 <= 1e-13
    assert cast_error(plan, tmp_path, wanted)[0] <= 2e-5
    with torch.no_grad():
        model.moe_layers()[0].experts.down_proj[0] *= 1 + 1e-6
    assert check(plan, tmp_path, expected(model)).float64 > 1e-9


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    from moectl.config.finetuning import LoraConfig
    from moectl.walk import export_source

    model = model_of("llama", "top2")
    add_adapters(model, LoraConfig(rank=2, targets=["experts"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
                assert "lora" in name.lower() or "low" in name.lower() or "adapter" in name.lower(), name
        wanted = model(some_ids())
    plain = export_source.merged(model)
    plan = plan_export(plain)
    write_model(plan, plain, tmp_path, dtype=None)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (loaded(some_ids()).logits - wanted).abs().max() <= 1e-4  # W + B·A rounds too


def test_a_run_of_adapters_is_exported_with_them_merged(home: Path, tmp_path: Path) -> None:
    record = json.loads((load_run("two").folder / "run.json").read_text())
    config = {
        "name": "tuned", "model": {"base": "two"},
        "finetune": {"lora": {"rank": 2, "targets": ["attention", "experts"]}},
        "optim": {"warmup_steps": 1, "lr": 0.05}, "train": {"steps": 2, "batch_size": 4, "threads": 1},
    }  # fmt: skip
    start_run(ExperimentConfig.model_validate(config), RunRequest(data=record["data"]["id"]))
    run = load_run("tuned")
    assert any("lora" in name for name, _ in run.model.named_parameters())
    exported = export_model("tuned", tmp_path / "out")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - run.model(ids)).abs().max() <= 1e-5
        assert (loaded(ids).logits - load_run("two").model(ids)).abs().max() > 1e-4  # they have learned something
    assert exported.family == "qwen3_moe"


def test_moectls_own_folder_takes_what_no_family_says(tmp_path: Path) -> None:
    model = model_of("llama", "expert-choice")
    folder = upcycled_folder(tmp_path / "moe", model)
    with pytest.raises(ConfigError, match="its tokens do not choose"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported = export_model(folder, tmp_path / "out", ExportRequest(format="moectl"))
    assert exported.format == "moectl" and exported.checked is None
    assert json.loads((tmp_path / "out" / "receipt.json").read_text())["exported"]["source"] == "moe"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ExportRequest(format="gguf"), "unknown export format 'gguf'"),
        (ExportRequest(layout="stacked"), "unknown layout 'stacked'"),
        (ExportRequest(dtype="int8"), "unknown dtype 'int8'"),
        (ExportRequest(family="mistral"), "unknown export family 'mistral'"),
        (ExportRequest(family="mixtral"), r"mixtral cannot say this model: .*q/k norm"),
        (ExportRequest(format="moectl", dtype="bfloat16"), "--dtype changes nothing"),
        (ExportRequest(shard_bytes=0), "at least one byte"),
    ],
)
def test_what_is_asked_wrong_leaves_nothing_behind(home: Path, tmp_path: Path, request_: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        export_model("one", tmp_path / "out", request_)
    assert list(tmp_path.iterdir()) == []


def test_bad_sources_are_told(home: Path, tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "out")
    asked = [
        (["export", "nobody", "--out", out], 4, "no run 'nobody'"),
        (["export", "dense", "--out", out], 2, "the model is dense"),
        (["export", "one", "--out", out, "--step", "7"], 4, "has no checkpoint of step 7"),
        (["export", "one"], 2, "'--out'"),
        (["export", "one", "--out", str(home)], 2, "exists already"),
    ]
    for words, code, said in asked:
        assert main(words) == code, words
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    export_model("one", tmp_path / "out")
    assert main(["export", out, "--out", str(tmp_path / "again")]) == 2
    assert "is a checkpoint of transformers already" in capsys.readouterr().err


def test_the_command_prints_one_document(home: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", "--out", str(tmp_path / "a"), "--json"]) == 0  # the newest with experts
    printed = json.loads(capsys.readouterr().out)
    assert printed["source"] in ("two", "tuned")  # another test's run is newer
    assert printed["family"] == "qwen3_moe" and printed["trust_remote_code"] is False
    assert printed["check"]["holds"] is True and printed["out"] == str(tmp_path / "a")
    assert main(["export", "one", "--family", "own", "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert "Qwen3ExpertsForCausalLM" in shown.out and "not mixtral:" in shown.out
    assert (tmp_path / "b" / "modeling_experts.py").is_file()

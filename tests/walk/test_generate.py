"""Runs, upcycled and exported folders and dense models write, and say who computed each token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moectl.cli.app import main
from moectl.config.schema import ExperimentConfig
from moectl.corpus.tokenization import train_bpe
from moectl.hf.folder import save_folder
from moectl.models.language_model import LanguageModel
from moectl.walk.export import ExportRequest, export_model
from moectl.walk.generate import Sampling, Utterance, open_voice
from moectl.walk.loading import load_run
from moectl.walk.train import RunRequest, start_run
from tests.hf.export_models import model_of
from tests.hf.tiny_models import tiny
from tests.support import WORDS, write_corpus

Capture = pytest.CaptureFixture[str]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with experts, a dense one, and upcycled and exported folders with a tokenizer and a chat template."""
    place = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(place / "home"))
        write_corpus(place / "texts")
        for name, moe in (("dense", None), ("two", {"router": {"name": "top2"}, "num_experts": 4, "layers": "last:1"})):
            data = {
                "domains": ["fish", "sums"], "source": str(place / "texts"), "tokenizer": "bpe:300", "block_size": 16,
            }  # fmt: skip
            model = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8}
            train = {"steps": 2, "batch_size": 4, "threads": 1}
            config = {"name": name, "data": data, "model": model, "moe": moe, "train": train}
            start_run(ExperimentConfig.model_validate({**config, "optim": {"warmup_steps": 1}}), RunRequest())
        beside = tokenizer(place / "tokenizer")
        for kind, router in (("llama", "top2"), ("gpt2", "top1"), ("qwen3", "sigmoid")):
            built = model_of(kind, router, "last:2", vocab_size=300)
            save_folder(built, place / kind, receipt={}, beside=beside)
            export_model(place / kind, place / f"{kind}-hf")
        dense = tiny("llama", torch.float32, vocab_size=300)
        dense.save_pretrained(place / "plain")
        for file in beside:
            (place / "plain" / file.name).write_bytes(file.read_bytes())
        yield place


def tokenizer(folder: Path) -> list[Path]:
    folder.mkdir()
    train_bpe([" ".join(words) for words in WORDS.values()], 300).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return sorted(folder.iterdir())


def spoken(voice: Any, prompt: str, **sampling: Any) -> Utterance:
    utterance = Utterance(voice, voice.prompt(prompt), Sampling(**sampling))
    for _ in utterance:
        pass
    return utterance


@pytest.mark.parametrize("name", ["two", "dense"])
def test_a_run_writes_what_generate_writes(home: Path, name: str) -> None:
    run = load_run(name)
    utterance = spoken(open_voice(name), "salt tide", max_new_tokens=8)
    prompt = torch.tensor([list(utterance.ids)])
    wanted = run.model.generate(prompt, 8)[0, prompt.shape[1] :].tolist()
    found = [said.token for said in utterance.said]
    assert found == wanted[: len(found)] and (len(found) == 8 or wanted[len(found)] == run.model.eos_token_id)
    assert utterance.text == open_voice(name).text.decode(found).rstrip("\ufffd")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_an_exported_folder_writes_and_routes_as_its_source(home: Path, kind: str) -> None:
    ours = spoken(open_voice(str(home / kind)), "salt tide", max_new_tokens=10).to_json()
    theirs = spoken(open_voice(str(home / f"{kind}-hf")), "salt tide", max_new_tokens=10).to_json()
    for key in ("text", "tokens", "experts", "stopped", "prompt_tokens"):
        assert ours[key] == theirs[key], key
    assert list(ours["experts"]) == ["1", "2"] and len(ours["tokens"]) == 10
    for one, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert one["shares"] == other["shares"] and one["entropy"] == pytest.approx(other["entropy"], abs=1e-5)


def test_routing_is_that_of_the_whole_text_at_once(home: Path) -> None:
    """Cached, token by token, against one pass over prompt and answer."""
    voice = open_voice(str(home / "llama"))
    utterance = spoken(voice, "salt tide", max_new_tokens=10)
    model: LanguageModel = voice.speaker.model
    everything = [*utterance.ids, *(said.token for said in utterance.said)]
    with torch.no_grad():
        model(torch.tensor([everything]))
    for number, layer in model.moe_layers().items():
        assert layer.routing is not None
        whole = [sorted(row) for row in layer.routing.topk_indices.tolist()]
        found = [sorted(said.visits[number].experts) for said in utterance.said]
        assert found == whole[len(utterance.ids) :]
        entropies = layer.routing.entropy[len(utterance.ids) :].tolist()
        assert [said.visits[number].entropy for said in utterance.said] == pytest.approx(entropies, abs=1e-5)


def test_a_plain_dense_model_writes_as_transformers_does(home: Path) -> None:
    voice = open_voice(str(home / "plain"))
    utterance = spoken(voice, "salt tide", max_new_tokens=6)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(home / "plain")
    prompt = torch.tensor([list(utterance.ids)])
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    found = [said.token for said in utterance.said]
    assert found == wanted[: len(found)]
    assert utterance.to_json()["layers"] == [] and utterance.to_json()["experts"] == {}


def test_sampling_is_seeded(home: Path) -> None:
    voice = open_voice("two")
    one, same, other = (
        spoken(voice, "salt", max_new_tokens=12, temperature=1.0, top_k=50, seed=seed).text for seed in (1, 1, 2)
    )
    assert one == same != other


def test_positions_end_it(home: Path) -> None:
    voice = open_voice(str(home / "llama"))
    voice.speaker.ends = frozenset()
    utterance = Utterance(voice, list(range(100, 162)), Sampling(max_new_tokens=500))
    list(utterance)
    assert len(utterance.ids) + len(utterance.said) == 64 and utterance.stopped == "positions"
    assert utterance.said[-1].visits == {} and utterance.to_json()["experts"]["1"][-1] is None


def test_the_command_prints_text_marks_and_a_summary(home: Path, capsys: Capture) -> None:
    assert main(["generate", "two", "--prompt", "salt tide", "--max-new-tokens", "6"]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", "two", "--prompt", "salt tide", "--max-new-tokens", "6", "--show-routing"]) == 0
    marked = capsys.readouterr().out
    assert "[e" not in plain and "\x1b" not in marked and marked.count("[e") >= 6 + 2
    assert "layer 1: [e0] to [e3]" in marked and "1/E, %" in marked and "of 1.386" in marked
    import re

    assert re.sub(r"\[e[\d+e,]*\]", "", marked.split("layer 1:")[0]).rstrip() == plain.rstrip()


def test_one_json_document(home: Path, capsys: Capture) -> None:
    assert main(["generate", "two", "--prompt", "salt", "--max-new-tokens", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == "two" and printed["step"] == 2 and printed["prompt"] == "salt"
    assert len(printed["tokens"]) == len(printed["experts"]["1"]) and printed["layers"][0]["num_experts"] == 4
    assert sum(piece["tokens"] for piece in printed["pieces"]) == len(printed["tokens"])


def test_a_conversation(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    folder = str(home / "llama-hf")
    asked = ["generate", folder, "--chat", "--prompt", "salt", "--max-new-tokens", "5", "--json"]
    assert main(asked) == 0
    first = json.loads(capsys.readouterr().out)
    voice = open_voice(folder)
    prompt = voice.text.encode("u: salt\na: ")
    assert first["prompt_tokens"] == len(prompt) and first["messages"][1]["content"] == first["text"]
    assert first["text"] == voice.text.decode(first["tokens"]).rstrip("\ufffd")
    monkeypatch.setattr(sys, "stdin", io.StringIO("salt\n\ntide\n"))  # two turns, an empty line between
    assert main(["generate", folder, "--chat", "--max-new-tokens", "5"]) == 0
    answers = capsys.readouterr().out
    whole = [{"role": "user", "content": "salt"}, {"role": "assistant", "content": first["text"]}]
    ids = voice.chat([*whole, {"role": "user", "content": "tide"}])
    second = Utterance(voice, ids, Sampling(max_new_tokens=5))
    list(second)
    assert answers == f"{first['text']}\n{second.text}\n"


def test_what_cannot_be_generated_is_told(home: Path, tmp_path: Path, capsys: Capture) -> None:
    empty, wide = tmp_path / "empty.txt", tmp_path / "wide.txt"
    empty.write_text("")
    wide.write_bytes(b"\xff\xfe\xff")
    (tmp_path / "folder").mkdir()
    llama = str(home / "llama")
    asked: list[tuple[list[str], int, str]] = [
        (["nobody", "--prompt", "x"], 4, "no run 'nobody'"),
        ([str(tmp_path / "folder"), "--prompt", "x"], 4, "holds neither a run nor a model"),
        (["two"], 2, "nothing to go on with"),
        (["two", "--prompt", ""], 2, "the prompt is empty"),
        (["two", "--prompt-file", str(empty)], 2, "is empty"),
        (["two", "--prompt-file", str(wide)], 1, "is not UTF-8"),
        (["two", "--prompt-file", str(tmp_path / "none")], 4, "cannot read"),
        (["two", "--prompt", "x", "--prompt-file", str(empty)], 2, "two prompts"),
        (["two", "--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens is 0"),
        (["two", "--prompt", "x", "--temperature", "-1"], 2, "the temperature"),
        (["two", "--prompt", "x", "--temperature", "nan"], 2, "the temperature"),
        (["two", "--prompt", "x", "--top-k", "0"], 2, "--top-k is 0"),
        (["two", "--prompt", "x", "--layer", "1"], 2, "--layer changes nothing"),
        (["two", "--prompt", "x", "--show-routing", "--layer", "0"], 2, "layer 0 has no experts"),
        (["dense", "--prompt", "x", "--show-routing"], 2, "is dense"),
        (["two", "--chat", "--prompt", "x"], 2, "no chat template"),
        ([llama, "--prompt", "salt " * 80], 2, "the model has 64 positions"),
        ([llama, "--prompt", "x", "--step", "1"], 2, "is not a run"),
        (["two", "--prompt", "x", "--step", "9"], 4, "no checkpoint of step 9"),
        (["two", "--prompt", "x", "--device", "cuda:77"], 5, ""),
    ]
    for words, code, said in asked:
        found = main(["generate", *words])
        err = capsys.readouterr().err
        assert found == code, (words, err)
        assert said in err and "Traceback" not in err and "internal error" not in err, (words, err)


def test_no_code_of_a_folder_is_run(home: Path, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    folder = shutil.copytree(home / "gpt2-hf", tmp_path / "changed")
    file = folder / "modeling_experts.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + file.read_text())
    assert main(["generate", str(folder), "--prompt", "salt"]) == 3
    assert "is not the file that this moectl writes" in capsys.readouterr().err
    file.unlink()
    assert main(["generate", str(folder), "--prompt", "salt"]) == 2
    assert "brings code of its own" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_another_model_is_told(home: Path, tmp_path: Path, capsys: Capture) -> None:
    save_folder(model_of("llama"), tmp_path / "small", receipt={}, beside=sorted((home / "tokenizer").iterdir()))
    assert main(["generate", str(tmp_path / "small"), "--prompt", "salt tide ~~"]) == 2
    assert "the model's vocabulary has 61" in capsys.readouterr().err


def test_ctrl_c_ends_cleanly(home: Path) -> None:
    """In the middle of a text, which a greedy choice never ends: exit code 130, the text so far whole, no traceback."""
    command = [sys.executable, "-m", "moectl", "generate", "two", "--prompt", "salt", "--max-new-tokens", "1000000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    read = process.stdout.read(1)  # the first piece is there: streaming, not all at the end
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert read and (read + out).decode("utf-8").endswith("\n") and b"Traceback" not in err and b"interrupted" in err


def test_a_step_of_a_run(home: Path) -> None:
    start = open_voice("two", step=0)
    assert start.step == 0
    run = load_run("two", step=0)
    found = [said.token for said in spoken(start, "salt", max_new_tokens=3).said]
    ids = start.prompt("salt")
    assert run.model.generate(torch.tensor([ids]), 3)[0, len(ids) :].tolist()[: len(found)] == found


def test_moectls_own_format_writes_the_same(home: Path, tmp_path: Path) -> None:
    export_model("two", tmp_path / "own", ExportRequest(format="moectl"))
    asked = {"prompt": "salt tide", "max_new_tokens": 6}
    assert spoken(open_voice(str(tmp_path / "own")), **asked).text == spoken(open_voice("two"), **asked).text  # type: ignore[arg-type]


def test_a_text_ends_with_the_models_end_or_the_tokenizers(home: Path) -> None:
    """An instruction-tuned model ends its turn with a token of the tokenizer's, and a text with another."""
    voice = open_voice(str(home / "llama-hf"))
    assert voice.speaker.ends == {1} and voice.text.ends == {0}
    assert voice.ends == {0, 1}

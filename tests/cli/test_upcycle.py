"""``moectl upcycle``: folders in, a folder and its receipt out; and what is said of everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moectl.cli.app import main
from moectl.hf.language_model import HFLanguageModel
from moectl.walk.upcycle import load_upcycled
from tests.hf.tiny_models import KINDS, some_ids, tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECTL_HOME", str(tmp_path / "home"))


def saved(folder: Path, kind: str = "llama", **changes: Any) -> str:
    tiny(kind, torch.float32, **changes).save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(some_ids())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_folder_that_loads_back(tmp_path: Path, capsys: Capture, kind: str) -> None:
    base, out = saved(tmp_path / "base", kind), tmp_path / "moe"
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    options = ["--moe-layers", "last:2", "--experts", "4", "--set", "moe.init_noise=0"]
    assert main(["upcycle", base, "--out", str(out), *options, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, receipt = load_upcycled(out)
    assert json.loads(receipt) == printed
    assert printed["keeps_function"] is True
    assert list(model.moe_layers()) == [1, 2]
    dense = HFLanguageModel(tiny(kind, torch.float32))
    assert (logits(model) - logits(dense)).abs().max() <= 1e-4
    assert (out / "tokenizer.json").read_text() == "{}"
    assert main(["upcycle", base, "--out", str(out), *options]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "init"),
    [
        (["--init", "drop", "--set", "moe.drop_ratio=0.25"], "drop"),
        (["--init", "random", "--set", "moe.expert_intermediate_size=8"], "random"),
        (
            ["--init", "split", "--router", "topk", "--set", "moe.router.top_k=4", "--set", "moe.granularity=4"],
            "split",
        ),
    ],
)
def test_inits(tmp_path: Path, capsys: Capture, options: list[str], init: str) -> None:
    base = saved(tmp_path / "base", "gpt2")
    assert main(["upcycle", base, "--out", str(tmp_path / "moe"), "--moe-layers", "all", *options]) == 0
    assert f"init {init}" in capsys.readouterr().out
    assert json.loads((tmp_path / "moe" / "receipt.json").read_text())["init"] == init


def test_experts_from_fine_tunes_with_texts(tmp_path: Path, capsys: Capture) -> None:
    base = saved(tmp_path / "base")
    tuned = [saved(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"), start=1)]
    _tokenizer(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("b c b\n\nc b c c\n")
    arguments = ["upcycle", base, "--out", str(tmp_path / "moe"), "--moe-layers", "1", "--experts", "2"]
    arguments += ["--init", "experts-from", "--set", f"moe.experts_from={tuned}"]
    prompts = ["a d a", f"@{tmp_path / 'texts.txt'}"]
    assert main([*arguments, "--set", f"moe.router_prompts={prompts}"]) == 0
    model, _ = load_upcycled(tmp_path / "moe")
    layer = model.moe_layers()[1]
    for expert, seed in enumerate((1, 2)):
        donor = tiny("llama", torch.float32, seed=seed).model.layers[1].mlp
        assert torch.equal(layer.experts.down_proj[expert], donor.down_proj.weight)
    assert torch.allclose(layer.router.weight.norm(dim=1), torch.ones(2))
    capsys.readouterr()
    missing = ["a", f"@{tmp_path / 'none.txt'}"]
    other = [str(tmp_path / "other") if argument == str(tmp_path / "moe") else argument for argument in arguments]
    assert main([*other, "--set", f"moe.router_prompts={missing}"]) == 4
    assert "none.txt" in capsys.readouterr().err
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert main([*other, "--set", f"moe.router_prompts={prompts}"]) == 4
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_beyond_the_vocabulary_is_named(tmp_path: Path, capsys: Capture) -> None:
    base = saved(tmp_path / "base")
    _tokenizer(tmp_path / "base", more=100)
    tuned = [saved(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"), start=1)]
    arguments = ["upcycle", base, "--out", str(tmp_path / "moe"), "--moe-layers", "1", "--experts", "2"]
    arguments += ["--init", "experts-from", "--set", f"moe.experts_from={tuned}"]
    assert main([*arguments, "--set", "moe.router_prompts=['a b', 'c word99']"]) == 2
    assert "has the id 105, but the model's vocabulary has" in capsys.readouterr().err
    assert main([*arguments, "--set", "moe.router_prompts=['a b', 'c d']"]) == 0


def test_split_draws_no_noise_unless_it_is_asked_for(tmp_path: Path, capsys: Capture) -> None:
    base = saved(tmp_path / "base")
    options = ["--moe-layers", "all", "--init", "split", "--router", "topk", "--set", "moe.init_noise=0"]
    options += ["--set", "moe.router.top_k=4", "--set", "moe.granularity=4"]
    for name, more, keeps in (("quiet", [], True), ("noisy", ["--set", "moe.router.noise_std=0.1"], False)):
        assert main(["upcycle", base, "--out", str(tmp_path / name), *options, *more, "--json"]) == 0
        receipt = json.loads(capsys.readouterr().out)
        assert receipt["keeps_function"] is True
        assert receipt["keeps_training"] is keeps, name
    described = json.loads((tmp_path / "quiet" / "config.json").read_text())
    assert described["moe"]["router"]["noise_std"] == 0.0


def _tokenizer(folder: Path, more: int = 0) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "d"])}
    words |= {f"word{number}": 6 + number for number in range(more)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def test_bad_input_is_explained_and_leaves_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    llama, out = saved(tmp_path / "base"), str(tmp_path / "moe")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "bert"}')
    cases: list[tuple[list[str], int, str]] = [
        ([llama, "--moe-layers", "3"], 2, "does not fit a model of 3 layers"),
        ([llama, "--moe-layers", "last"], 2, "is none of: all, last:4"),
        ([llama, "--router", "tpo1"], 2, "unknown router 'tpo1'"),
        ([llama, "--moe-layers", "all", "--router", "switch"], 2, "do not sum to one"),
        ([llama, "--init", "splitt"], 2, "moe.init"),
        ([llama, "--init", "split", "--experts", "6", "--set", "moe.granularity=4"], 2, "no multiple"),
        ([llama, "--set", "train.steps=3"], 2, "changes nothing here"),
        ([llama, "--seed", str(10**23)], 2, "seed"),
        ([llama, "--moe-layers", "1", "--set", "moe.init_noise=1e300"], 3, "not finite"),
        ([llama, "--set", "moe.granulrity=3"], 2, "Did you mean 'moe.granularity'"),
        ([llama, "--moe-layers", "1", "--init", "split", "--experts", "10", "--router", "topk",
          "--set", "moe.granularity=5", "--set", "moe.router.top_k=5"], 2, "does not divide the dense MLP's 48"),
        ([str(tmp_path / "encoder")], 2, "is an encoder"),
        ([str(tmp_path / "none")], 4, "there is no folder"),
        ([str(tmp_path)], 4, "has no config.json"),
        (["nobody/nothing"], 1, "neither a folder nor a run"),
    ]  # fmt: skip
    for arguments, code, said in cases:
        assert main(["upcycle", *arguments, "--out", out]) == code, arguments
        printed = capsys.readouterr()
        assert said in printed.err, printed.err
        assert "Traceback" not in printed.err
        assert printed.out == ""
        assert not Path(out).exists()
    assert main(["upcycle", llama, "--out", out, "--moe-layers", "1"]) == 0
    assert main(["upcycle", out, "--out", str(tmp_path / "again")]) == 2
    assert "has experts already" in capsys.readouterr().err

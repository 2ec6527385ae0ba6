"""Checkpoint folders as transformers writes them, as older ones were written, and broken in every way.

Nothing is rounded on the way: all comparisons are exact.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.hf.checkpoint import Checkpoint, canonical_shapes, read_folder
from moectl.hf.checkpoint_files import INDEX, CheckpointError
from moectl.hf.checkpoint_layouts import Place, place_of, stored_name, to_fused, to_per_expert
from moectl.hf.family import FAMILIES
from moectl.parity.families import config_of, formula_of, random_weights, weight_shapes
from tests.parity.hf_cases import tiny_case

transformers = pytest.importorskip("transformers")

CAUSAL = ["qwen3", "mixtral", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"]


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' tiny model with random weights."""
    config = transformers.CONFIG_MAPPING[FAMILIES[family].model_type].from_dict(
        {**config_of(family, "tiny"), "eos_token_id": None, **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model.to(dtype)


def saved(folder: Path, family: str = "qwen3", **options: Any) -> dict[str, Tensor]:
    """A folder by save_pretrained; returns the canonical weights."""
    model = model_of(family, **options.pop("model", {}))
    model.save_pretrained(folder, **options)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def by_hand(folder: Path, tensors: dict[str, Tensor], shards: int = 1, **config: Any) -> Path:
    """A folder written without transformers: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config_of("qwen3", "tiny"), **config})
    (folder / "config.json").write_text(text, encoding="utf-8")
    if shards == 1:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({n: t.contiguous() for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def index_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return found


def canonical() -> dict[str, Tensor]:
    formula = formula_of("qwen3", config_of("qwen3", "tiny"))
    return random_weights(formula, "model", seed=0, dtype=torch.float32)


def equal(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(checkpoint.tensors[name], tensor), name
        assert checkpoint.tensors.shape(name) == tuple(tensor.shape)


def refused(folder: Path, error: type[MoectlError], match: str, code: int, **options: Any) -> MoectlError:
    with pytest.raises(error, match=match) as caught:
        read_folder(folder, **options)
    assert caught.value.exit_code == code
    return caught.value


# --- reading


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("apart", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", CAUSAL)
def test_what_transformers_wrote(tmp_path: Path, family: str, apart: bool, sharded: bool) -> None:
    size = "60KB" if sharded else "1GB"
    expected = saved(tmp_path, family, save_original_format=apart, max_shard_size=size)
    assert (tmp_path / INDEX).is_file() == sharded
    checkpoint = read_folder(tmp_path, family=family)
    equal(checkpoint, expected)
    assert checkpoint.layout == ("per-expert" if apart and family != "gpt_oss" else "fused")
    assert (checkpoint.family, checkpoint.problems) == (family, ())
    assert checkpoint.config["model_type"] == FAMILIES[family].model_type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("apart", [True, False], ids=["per-expert", "fused"])
def test_dtypes_as_stored_and_converted(tmp_path: Path, dtype: torch.dtype, apart: bool) -> None:
    expected = saved(tmp_path, model={"dtype": dtype}, save_original_format=apart)
    checkpoint = read_folder(tmp_path)
    equal(checkpoint, expected)
    wide = checkpoint.tensors.to(torch.float64)
    assert all(torch.equal(wide[name], tensor.double()) for name, tensor in expected.items())


def test_mixtrals_old_names(tmp_path: Path) -> None:
    expected = saved(tmp_path, "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(tmp_path / "model.safetensors")
    equal(read_folder(tmp_path), expected)


def test_a_part_under_its_own_names(tmp_path: Path) -> None:
    """What a component's case takes."""
    expected = saved(tmp_path, max_shard_size="60KB")
    part = read_folder(tmp_path).tensors.part("model.layers.1.")
    formula = formula_of("qwen3", config_of("qwen3", "tiny"))
    assert {name: part.shape(name) for name in part} == weight_shapes(formula, "layer")
    assert len(part) == len(list(part)) == 11
    assert "mlp.gate.weight" in part and "lm_head.weight" not in part
    assert torch.equal(part["mlp.experts.down_proj"], expected["model.layers.1.mlp.experts.down_proj"])
    assert torch.equal(part.part("mlp.").to(torch.float64)["gate.weight"], part["mlp.gate.weight"].double())


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """After the look-through, shards that hold nothing of a layer may be gone."""
    saved(tmp_path, max_shard_size="20KB")
    checkpoint = read_folder(tmp_path)
    needed = {shard for name, shard in index_of(tmp_path).items() if name.startswith("model.layers.2.")}
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    part = checkpoint.tensors.part("model.layers.2.")
    assert all(part[name].isfinite().all() for name in part)


def test_a_fused_tensor_is_mapped_and_the_file_is_not_written(tmp_path: Path) -> None:
    saved(tmp_path, save_original_format=False)
    before = (tmp_path / "model.safetensors").read_bytes()
    name = "model.layers.0.mlp.experts.down_proj"
    tensor = read_folder(tmp_path).tensors[name]
    tensor.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert read_folder(tmp_path).tensors[name].any()


def test_a_tied_head_may_be_stored_and_must_then_be_the_embedding(tmp_path: Path) -> None:
    expected = saved(tmp_path / "tied", model={"tie_word_embeddings": True})
    del expected["lm_head.weight"]
    equal(read_folder(tmp_path / "tied"), expected)
    copied = {**canonical(), "lm_head.weight": canonical()["model.embed_tokens.weight"].clone()}
    read_folder(by_hand(tmp_path / "copied", copied, tie_word_embeddings=True))
    folder = by_hand(tmp_path / "other", canonical(), tie_word_embeddings=True)
    refused(folder, CheckpointError, "tied: lm_head.weight", 1)


def test_shapes_are_the_formulas(tmp_path: Path) -> None:
    """Two sources of what a checkpoint holds: transformers' modules and our own formula."""
    for family in ("qwen3", "mixtral", "olmoe", "qwen2_moe"):
        config = config_of(family, "tiny")
        assert canonical_shapes(FAMILIES[family], config) == weight_shapes(formula_of(family, config), "model")


def test_both_layouts_in_one_checkpoint(tmp_path: Path) -> None:
    weights = canonical()
    apart = to_per_expert({n: t for n, t in weights.items() if "layers.1." in n}, "qwen3")
    mixed = {**{n: t for n, t in weights.items() if "layers.1." not in n}, **apart}
    checkpoint = read_folder(by_hand(tmp_path, mixed, shards=3))
    assert checkpoint.layout == "mixed"
    equal(checkpoint, weights)


# --- the two layouts


@pytest.mark.parametrize("family", CAUSAL)
def test_there_and_back(tmp_path: Path, family: str) -> None:
    """Names on disk are transformers' own in both directions."""
    expected = saved(tmp_path, family)
    stored = load_file(tmp_path / "model.safetensors")
    apart = to_per_expert(expected, family)
    assert set(apart) == set(stored)
    assert all(torch.equal(apart[name], tensor) for name, tensor in stored.items())
    fused = to_fused(stored, family)
    assert set(fused) == set(expected)
    assert all(torch.equal(fused[name], tensor) for name, tensor in expected.items())


def test_taking_apart_copies_nothing() -> None:
    case = tiny_case("qwen3", "moe")
    stacked = case.weights["experts.gate_up_proj"]
    apart = to_per_expert(case.weights, "qwen3")
    assert apart["experts.3.up_proj.weight"].data_ptr() == stacked[3, 24:].data_ptr()
    assert torch.equal(apart["experts.3.gate_proj.weight"], stacked[3, :24])
    assert torch.equal(to_fused(apart, "qwen3")["experts.gate_up_proj"], stacked)


@pytest.mark.parametrize(
    ("name", "family", "place"),
    [
        ("model.layers.0.mlp.experts.12.up_proj.weight", "qwen3", ("experts.gate_up_proj", 12, "up")),
        ("model.layers.0.mlp.experts.12.down_proj.weight", "olmoe", ("experts.down_proj", 12, "down")),
        ("model.layers.0.block_sparse_moe.experts.1.w3.weight", "mixtral", ("experts.gate_up_proj", 1, "up")),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "mixtral", ("experts.down_proj", 1, "down")),
    ],
)
def test_names_of_experts(name: str, family: str, place: tuple[str, int, Any]) -> None:
    found = place_of(name, family)
    assert found == Place(f"model.layers.0.mlp.{place[0]}", place[1], place[2])
    assert stored_name(found, family) == name


def test_names_that_are_no_experts() -> None:
    for name in (
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "lm_head.weight",
    ):
        assert place_of(name, "qwen2_moe") == Place(name)
    assert place_of("model.layers.0.mlp.experts.0.w1.weight", "qwen3").expert is None, "w1 is Mixtral's word"
    old = "model.layers.0.block_sparse_moe.gate.weight"
    assert place_of(old, "mixtral") == Place("model.layers.0.mlp.gate.weight")
    assert stored_name(place_of(old, "mixtral"), "mixtral") == old


def test_experts_that_do_not_stack_are_all_named() -> None:
    apart = to_per_expert(tiny_case("qwen3", "moe").weights, "qwen3")
    del apart["experts.2.up_proj.weight"]
    apart["experts.5.down_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match=r"experts\.2\.up_proj\.weight is missing.*experts\.5\.down_proj\.weight is"):
        to_fused(apart, "qwen3")


# --- tensors that do not fit


def test_everything_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    stored = to_per_expert(canonical(), "qwen3")
    layer = "model.layers.{}.".format
    del stored[layer(0) + "mlp.experts.3.up_proj.weight"], stored["model.norm.weight"]
    for name in [name for name in stored if name.startswith(layer(1) + "mlp.experts.")]:
        del stored[name]
    stored[layer(2) + "mlp.gate.weight"] = torch.zeros(8, 31)
    stored[layer(2) + "mlp.experts.1.down_proj.weight"] = torch.zeros(24, 32)
    stored[layer(2) + "mlp.experts.8.down_proj.weight"] = torch.zeros(32, 24)
    stored[layer(2) + "mlp.experts.0.gate_proj.bias"] = torch.zeros(24)
    stored["model.extra"] = torch.zeros(2)
    stored[layer(0) + "input_layernorm.weight"] = torch.ones(32, dtype=torch.int32)
    error = refused(by_hand(tmp_path, stored), CheckpointError, "10 tensors", 1)
    for line in (
        f"missing: {layer(0)}mlp.experts.3.up_proj.weight ([24, 32])",
        "missing: model.norm.weight ([32])",
        f"missing: {layer(1)}mlp.experts.gate_up_proj ([8, 48, 32])",
        f"missing: {layer(1)}mlp.experts.down_proj ([8, 32, 24])",
        f"wrong shape: {layer(2)}mlp.gate.weight ([8, 31], must be [8, 32])",
        f"wrong shape: {layer(2)}mlp.experts.1.down_proj.weight ([24, 32], must be [32, 24])",
        f"unknown: {layer(2)}mlp.experts.8.down_proj.weight ([32, 24])",
        f"unknown: {layer(2)}mlp.experts.0.gate_proj.bias ([24])",
        "unknown: model.extra ([2])",
        f"wrong dtype: {layer(0)}input_layernorm.weight (I32",
    ):
        assert line in str(error), line
    assert len(str(error).splitlines()) == 11, "a line for each, and no other"

    checkpoint = read_folder(tmp_path, strict=False)
    assert len(checkpoint.problems) == 10
    assert layer(2) + "self_attn.q_proj.weight" in checkpoint.tensors
    assert layer(2) + "mlp.gate.weight" not in checkpoint.tensors, "only what is whole is handed out"
    assert all(checkpoint.tensors[name].isfinite().all() for name in checkpoint.tensors)


def test_experts_that_are_there_twice(tmp_path: Path) -> None:
    weights = canonical()
    fused = "model.layers.0.mlp.experts.down_proj"
    apart = to_per_expert({fused: weights[fused]}, "qwen3")
    apart = {name: tensor.clone() for name, tensor in apart.items()}
    error = refused(by_hand(tmp_path, {**weights, **apart}), CheckpointError, "8 tensors", 1)
    assert str(error).count("duplicated: model.layers.0.mlp.experts.") == 8


def test_old_and_new_name_of_one_tensor(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.gate.weight"] = stored["model.layers.0.block_sparse_moe.gate.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    refused(tmp_path, CheckpointError, r"duplicated: .*gate\.weight", 1)


def test_experts_of_different_dtypes(tmp_path: Path) -> None:
    stored = to_per_expert(canonical(), "qwen3")
    odd = "model.layers.0.mlp.experts.2.down_proj.weight"
    stored[odd] = stored[odd].bfloat16()
    error = refused(by_hand(tmp_path, stored), CheckpointError, "do not fit", 1)
    assert f"wrong dtype: {odd} (BF16" in str(error)


def test_a_base_model_alone(tmp_path: Path) -> None:
    model_of("qwen3").model.save_pretrained(tmp_path)
    error = refused(tmp_path, CheckpointError, "unknown: embed_tokens.weight", 1)
    assert error.hint is not None and "causal language model" in error.hint


# --- the index and its shards


def test_an_index_that_is_wrong_about_its_shards(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical(), shards=3)
    weight_map = index_of(folder)
    del weight_map["model.norm.weight"]
    weight_map["model.ghost.weight"] = "part-0.safetensors"
    write_index(folder, weight_map)
    error = refused(folder, CheckpointError, "2 tensors", 1)
    assert "not in the index: part-" in str(error) and ": model.norm.weight" in str(error)
    assert "missing: part-0.safetensors: model.ghost.weight" in str(error)


def test_a_stray_file_beside_the_shards(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical(), shards=2)
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "stray.safetensors")
    error = refused(folder, CheckpointError, "2 tensors", 1)
    assert "not in the index: stray.safetensors: model.norm.weight" in str(error)
    assert "duplicated: model.norm.weight" in str(error)


def test_absent_shards_are_all_named(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical(), shards=4)
    (folder / "part-1.safetensors").unlink()
    (folder / "part-3.safetensors").unlink()
    error = refused(folder, NotFoundError, "2 of 4 shards", 4)
    assert "part-1.safetensors, part-3.safetensors" in str(error)


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical(), shards=2)
    (folder / INDEX).unlink()
    refused(folder, CheckpointError, "2 safetensors files and no model.safetensors.index.json", 1)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"x": 1, "x": 2}', "\xff"],
)
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    folder = by_hand(tmp_path, canonical(), shards=2)
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    refused(folder, CheckpointError, "index.json", 1)


@pytest.mark.parametrize(
    "place", ["../out.safetensors", "/out.safetensors", "a/../../out.safetensors", "..\\out.safetensors"]
)
def test_paths_that_lead_outside(tmp_path: Path, place: str) -> None:
    folder = by_hand(tmp_path / "model", canonical(), shards=2)
    save_file(canonical(), tmp_path / "out.safetensors")
    place = place.replace("/out", f"{tmp_path}/out") if place.startswith("/") else place
    write_index(folder, dict.fromkeys(canonical(), place))
    refused(folder, CheckpointError, "not in that folder", 1)


@pytest.mark.parametrize("indexed", [True, False])
def test_links_that_lead_outside(tmp_path: Path, indexed: bool) -> None:
    folder = by_hand(tmp_path / "model", canonical())
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    if indexed:
        write_index(folder, dict.fromkeys(canonical(), "model.safetensors"))
    refused(folder, CheckpointError, "not in that folder", 1)


def test_the_cache_of_transformers_is_made_of_links(tmp_path: Path) -> None:
    """``snapshots/<commit>/`` links into the ``blobs`` of the same model; and nowhere else."""
    weights = canonical()
    folder = by_hand(tmp_path / "models--a--b" / "snapshots" / "c0ffee", weights)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, name in enumerate(("model.safetensors", "config.json")):
        (folder / name).rename(blobs / str(number))
        (folder / name).symlink_to(Path("../../blobs") / str(number))
    equal(read_folder(folder), weights)
    (blobs / "0").rename(tmp_path / "0")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "0")
    refused(folder, CheckpointError, "not in that folder", 1)


# --- broken files


@pytest.mark.parametrize(
    "damage",
    ["empty", "truncated", "header", "length", "lfs"],
)
def test_files_that_cannot_be_read_are_all_named(tmp_path: Path, damage: str) -> None:
    folder = by_hand(tmp_path, canonical(), shards=3)
    for name in ("part-0.safetensors", "part-2.safetensors"):
        content = (folder / name).read_bytes()
        broken = {
            "empty": b"",
            "truncated": content[:-7],
            "header": content[:8] + b"[" + content[9:],
            "length": b"\xff" * 8 + content[8:],
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        }[damage]
        (folder / name).write_bytes(broken)
    error = refused(folder, CheckpointError, "2 files", 1)
    assert "part-0.safetensors" in str(error) and "part-2.safetensors" in str(error)
    assert ("Git LFS pointer" in str(error)) == (damage == "lfs")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    folder = by_hand(tmp_path, canonical())
    (folder / "model.safetensors").unlink()

    class Boom:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Boom(), folder / name)
    error = refused(folder, CheckpointError, name, 1)
    assert error.hint is not None and "save_pretrained" in error.hint and "MOE069" in error.hint
    refused(folder / name, CheckpointError, "pickles", 1)
    assert not (tmp_path / "ran").exists()


def test_an_index_of_pickles(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical(), shards=2)
    write_index(folder, dict.fromkeys(canonical(), "pytorch_model-00001-of-00002.bin"))
    refused(folder, CheckpointError, "pickles", 1)


def test_a_pickle_beside_safetensors_is_not_looked_at(tmp_path: Path) -> None:
    folder = by_hand(tmp_path, canonical())
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    equal(read_folder(folder), canonical())


# --- no checkpoint at all


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", NotFoundError, "no folder", 4)
    refused(tmp_path, NotFoundError, "no config.json", 4)
    folder = by_hand(tmp_path / "model", canonical())
    refused(folder / "model.safetensors", NotFoundError, "is a file", 4)
    (folder / "model.safetensors").unlink()
    refused(folder, NotFoundError, "no .*safetensors", 4)


@pytest.mark.parametrize(
    ("content", "error", "match", "code"),
    [
        ("not json", CheckpointError, "JSON", 1),
        ("[1]", CheckpointError, "not an object", 1),
        ("{}", ConfigError, "no model_type", 2),
        ('{"model_type": "llama"}', ConfigError, "llama", 2),
        ('{"model_type": "mixtral"}', ConfigError, "'mixtral', not 'qwen3'", 2),
        ('{"model_type": "qwen3_moe", "quantization_config": {"bits": 4}}', ConfigError, "quantised", 2),
        ('{"model_type": "qwen3_moe", "hidden_size": "x"}', ConfigError, "hidden_size", 2),
    ],
)
def test_configs_that_are_none(tmp_path: Path, content: str, error: Any, match: str, code: int) -> None:
    folder = by_hand(tmp_path, canonical())
    (folder / "config.json").write_text(content, encoding="utf-8")
    refused(folder, error, match, code, family="qwen3")


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    by_hand(tmp_path / "model", canonical(), shards=2)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    equal(read_folder(tmp_path / "link"), canonical())
    shutil.rmtree(tmp_path / "model")
    refused(tmp_path / "link", NotFoundError, "no folder", 4)

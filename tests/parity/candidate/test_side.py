"""Somebody's code as a subject: what is found out about it, what it shows, and how it fails.

Tolerances: float64 to 1e-10 and float32 to 1e-5 of max(1, the largest entry), as everywhere in a comparison.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moectl.errors import ConfigError, MoectlError, NotFoundError
from moectl.parity.candidate.side import Candidate, load_candidate
from moectl.parity.candidate.user_code import CandidateError
from moectl.parity.case import Case, Unsupported
from moectl.parity.hugging_face import HuggingFace, rerouted_by
from moectl.parity.tape import Tape
from tests.parity.cases import case, error

HERE = Path(__file__).parent.parent
BAD = HERE / "bad"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
MOE = ("mlp.router_logits", "mlp.chosen", "mlp.output", "mlp.routed", "grad.input", "grad.gate.weight")
MOE += ("grad.experts.gate_up_proj", "grad.experts.down_proj")
WEIGHTS, OUTPUTS = ("mlp.weights",), ("mlp.expert_outputs",)
ATTENTION = ("attn.q", "attn.k", "attn.output", "grad.input", "grad.q_proj.weight", "grad.k_proj.weight")
ATTENTION += ("grad.v_proj.weight", "grad.o_proj.weight", "grad.q_norm.weight", "grad.k_norm.weight")
ROTATED = ("attn.v", "attn.q_rotated", "attn.k_rotated", "attn.heads")
ROUTER = ("mlp.chosen", "mlp.weights", "grad.input", "grad.weight")


def style(name: str) -> Candidate:
    return load_candidate(f"{HERE / 'styles.py'}:{name}", family="qwen3")


def bad(name: str) -> Candidate:
    return load_candidate(f"{BAD / 'misbehaving.py'}:{name}", family="qwen3")


def disagreeing(candidate: Candidate, of: Case, tape: Tape | None = None) -> tuple[set[str], dict[str, float]]:
    """Names that it shows of Hugging Face's, and those of them that differ."""
    reference = HuggingFace(candidate.family).run(of)
    shown = candidate.run(of) if tape is None else tape
    both = [name for name in reference if name in shown]
    errors = {name: error(reference[name].double(), shown[name].double()) for name in both}
    return set(both), {name: gap for name, gap in errors.items() if not gap <= TOLERANCE[of.dtype]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "level", "shows"),
    [
        ("SparseFeedForward", "moe", (*MOE, *WEIGHTS, *OUTPUTS)),
        ("GatheredMoE", "moe", (*MOE, *WEIGHTS)),
        ("CountingMoE", "moe", (*MOE, *WEIGHTS, *OUTPUTS)),
        ("ListsMoE", "moe", (*MOE, *WEIGHTS)),
        ("LitMoE", "moe", (*MOE, *WEIGHTS, *OUTPUTS)),
        ("DenseMoE", "moe", MOE),
        ("SideBySideMoE", "moe", (*MOE, *WEIGHTS)),
        ("SortedMoE", "moe", (*MOE, *WEIGHTS)),
        ("PackedMoE", "moe", (*MOE, *OUTPUTS)),
        ("MakeMoE", "moe", (*MOE, *WEIGHTS, *OUTPUTS)),
        ("moe_forward", "moe", (*MOE, *WEIGHTS)),
        ("RawAttention", "attention", ATTENTION),
        ("PackedAttention", "attention", (*ATTENTION, *ROTATED)),
        (
            "Block",
            "layer",
            ("attn.input", "attn.residual", "mlp.input", "mlp.residual", "attn.q_rotated", "mlp.weights"),
        ),
        ("Gate", "router", (*ROUTER, "mlp.router_logits")),
        ("TokenRouter", "router", (*ROUTER, "mlp.router_logits")),
        ("NoisyTopkRouter", "router", ROUTER),
        ("route", "router", ROUTER),
    ],
)
def test_code_in_many_styles_is_compared_without_an_adapter(
    name: str, level: str, shows: tuple[str, ...], dtype: torch.dtype
) -> None:
    candidate = style(name)
    assert candidate.level == level and not candidate.problems and not candidate.missing
    both, differ = disagreeing(candidate, case("qwen3", candidate.level, dtype=dtype))
    assert not differ
    assert set(shows) <= both


def test_a_whole_model_shows_every_layer() -> None:
    candidate = style("NanoModel")
    both, differ = disagreeing(candidate, case("qwen3", "model"))
    assert not differ
    for layer in range(3):
        for name in ("attn.input", "attn.q_rotated", "attn.k_rotated", "attn.v", "attn.heads", "attn.residual",
                     "mlp.router_logits", "mlp.chosen", "mlp.weights", "mlp.output", "mlp.residual"):  # fmt: skip
            assert f"layers.{layer}.{name}" in both
    assert {"embeddings", "final_norm", "logits", "loss", "grad.input", "grad.model.embed_tokens.weight"} <= both


def test_orientation_is_kept_where_heads_and_positions_are_as_many() -> None:
    both, differ = disagreeing(style("PackedAttention"), case("qwen3", "attention", shape=(2, 4)))
    assert set(ROTATED) <= both and not differ


def test_what_was_guessed_is_shown() -> None:
    candidate = style("SparseFeedForward")
    lines = {line.name: line.source for line in candidate.mapping}
    assert lines["experts.3.w1.weight"] == "experts.gate_up_proj[3, :F]"
    assert lines["experts.3.w3.weight"] == "experts.gate_up_proj[3, F:]"
    assert lines["experts.3.w2.weight"] == "experts.down_proj[3]"
    assert candidate.shown["called"] == "forward(inputs: [T, D])"
    assert candidate.shown["built"] == "SparseFeedForward(args)"
    assert candidate.shown["level_guessed"] is True
    fused = {line.name: line for line in style("SortedMoE").mapping}["experts.gate_up_proj"]
    assert (fused.source, fused.remark) == ("experts.gate_up_proj.mT", "gate before up: assumed")
    readings = style("SortedMoE").shown["routers"]
    assert readings == {"router": "weights [T, K], indices [T, K], logits [T, E]"}


def test_a_square_raw_matrix_is_told_apart_at_other_sizes() -> None:
    lines = {line.name: line for line in style("RawAttention").mapping}
    assert lines["wo"].source == "o_proj.weight.mT"
    assert "seen at other sizes" in str(lines["wo"].remark)


def test_a_square_tensor_without_a_second_size_is_not_guessed() -> None:
    config = {**case("qwen3", "moe").config, "moe_intermediate_size": 32}
    with pytest.raises(CandidateError, match=r"w_gate \[8, 32, 32\] is square: it could be .* or .*\.mT"):
        load_candidate(f"{BAD / 'misbehaving.py'}:SquareExperts", family="qwen3", config=config)


def test_experts_that_are_not_gated_are_refused_by_name() -> None:
    with pytest.raises(CandidateError, match=r"nothing found for experts\.gate_up_proj, experts\.down_proj") as caught:
        style("UngatedMoE")
    assert "experts.0.net.0.weight [24, 32]" in caught.value.message and "adapter" in str(caught.value.hint)


def test_an_extra_parameter_keeps_its_value_and_is_found() -> None:
    candidate = bad("Biased")
    assert list(candidate.extra_parameters) == ["gate.bias"]
    assert bool((candidate.extra_parameters["gate.bias"] != 0).all())
    torch.manual_seed(12345)  # what others draw does not reach it
    assert torch.equal(candidate.extra_parameters["gate.bias"], bad("Biased").extra_parameters["gate.bias"])
    of = case("qwen3", "moe")
    _, differ = disagreeing(candidate, of)
    assert {"mlp.router_logits", "mlp.output"} <= set(differ)
    gap = candidate.run(of)["mlp.router_logits"] - HuggingFace("qwen3").run(of)["mlp.router_logits"]
    assert torch.allclose(gap, candidate.extra_parameters["gate.bias"].expand_as(gap), atol=1e-12)


def test_extra_parameters_can_be_zero_for_a_while() -> None:
    candidate, of = bad("Biased"), case("qwen3", "moe")
    before = candidate.run(of)["mlp.output"]
    with candidate.zeroed(["gate.bias"]):
        assert not disagreeing(candidate, of)[1]
    assert torch.equal(candidate.run(of)["mlp.output"], before)


def test_experts_built_with_the_dense_size_are_built_with_their_own() -> None:
    candidate = bad("DenseSized")
    assert "with intermediate_size = the experts'" in candidate.shown["built"]
    assert not disagreeing(candidate, case("qwen3", "moe"))[1]


def test_rotary_frequencies_keep_their_precision_in_bfloat16() -> None:
    candidate = load_candidate(f"{HERE / 'candidates/modulelist_style.py'}:Attention", family="qwen3")
    candidate.run(case("qwen3", "attention", dtype=torch.bfloat16))
    module = next(built.module for key, built in candidate._built.items() if "bfloat16" in key)
    assert module.rotary_emb.inv_freq.dtype == torch.float32 and module.q_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["SparseFeedForward", "CountingMoE", "GatheredMoE", "PackedMoE", "SideBySideMoE"])
def test_another_sides_choice_is_put_in(name: str) -> None:
    of = case("qwen3", "moe")
    tape = HuggingFace("qwen3").run(of)
    other = Tape()
    other.record("mlp.chosen", tape["mlp.chosen"].roll(1, dims=1))
    reroute = rerouted_by(other, of)
    shown = style(name).run(of, reroute)
    assert torch.equal(shown["mlp.chosen"], other["mlp.chosen"])
    expected = HuggingFace("qwen3").run(of, reroute)
    assert error(expected["mlp.output"], shown["mlp.output"]) <= TOLERANCE[of.dtype]


def test_a_choice_that_is_not_made_by_topk_cannot_be_replaced() -> None:
    of = case("qwen3", "moe")
    reroute = rerouted_by(HuggingFace("qwen3").run(of), of)
    with pytest.raises(Unsupported, match="cannot be replaced"):
        bad("ByThreshold").run(of, reroute)


def test_bfloat16_is_computed_in_bfloat16() -> None:
    of = case("qwen3", "moe", dtype=torch.bfloat16)
    shown, reference = style("CountingMoE").run(of), HuggingFace("qwen3").run(of)
    assert shown["mlp.output"].dtype == torch.bfloat16
    # The same formula in another order of rounding: a few of bfloat16's steps of 2^-8.
    assert error(reference["mlp.router_logits"].double(), shown["mlp.router_logits"].double()) < 2**-6


def test_compiled_it_shows_its_output_and_gradients() -> None:
    candidate, of = style("GatheredMoE"), case("qwen3", "moe", dtype=torch.float32)
    both, differ = disagreeing(candidate, of, candidate.run(replace(of, compiled=True)))
    assert {"mlp.output", "grad.input", "grad.experts.down_proj"} <= both and not differ


def test_a_case_is_left_as_it_was() -> None:
    of = case("qwen3", "moe")
    before = {name: tensor.clone() for name, tensor in of.weights.items()}, of.inputs.hidden.clone()
    bad("InPlace").run(of)
    assert torch.equal(of.inputs.hidden, before[1]) and not of.inputs.hidden.requires_grad
    assert all(torch.equal(of.weights[name], tensor) for name, tensor in before[0].items())


def test_no_hook_and_no_replaced_function_stays() -> None:
    candidate = style("Block")
    candidate.run(case("qwen3", "layer"))
    module = sys.modules[candidate.cls.__module__]
    assert not hasattr(module.apply_rotary_emb, "__wrapped__")
    for built in candidate._built.values():
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in built.module.modules())


def test_padding_and_positions_reach_code_that_takes_them() -> None:
    candidate = load_candidate(f"{HERE / 'candidates/fused_style.py'}:LanguageModel", family="qwen3")
    real = torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()
    of = case("qwen3", "model", attention_mask=real)
    labels = of.inputs.labels.masked_fill(~(real & real.roll(1, 1)), -100)
    both, differ = disagreeing(candidate, replace(of, inputs=of.inputs._replace(labels=labels)))
    assert "rope.cos" in both and not differ


def test_the_form_of_a_mask_is_the_one_that_hides_padding() -> None:
    candidate = style("HidingAttention")
    assert (
        "key_padding_mask: bool [B, S], True = padding: the form that hides padding"
        in candidate.shown["found_by_trying"]
    )
    real = torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()
    of = case("qwen3", "attention", attention_mask=real)
    reference, shown = HuggingFace("qwen3").run(of), candidate.run(of)
    assert (
        error(reference["attn.k_rotated"], shown["attn.k_rotated"]) <= TOLERANCE[of.dtype]
    )  # repeated, and taken back
    assert error(reference["attn.output"][real], shown["attn.output"][real]) <= TOLERANCE[of.dtype]


def test_inputs_without_a_parameter_are_unsupported_and_not_ignored() -> None:
    candidate = style("NanoModel")
    for inputs in (
        {"attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()},
        {"attention_mask": torch.tensor([[1] * 6 + [0] * 3, [1] * 9]).bool()},
        {"doc_ids": torch.tensor([[0] * 4 + [1] * 5, [0] * 9])},
        {"positions": torch.arange(1, 10).expand(2, 9)},
        {"chunks": (4, 5)},
    ):
        with pytest.raises(Unsupported):
            candidate.run(case("qwen3", "model", **inputs))
    with pytest.raises(Unsupported, match="is a model, not an MoE block"):
        candidate.run(case("qwen3", "moe"))


def test_a_cache_in_transformers_manner_is_used() -> None:
    candidate = load_candidate(
        "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeForCausalLM", family="qwen3", level="model"
    )
    of = case("qwen3", "model", dtype=torch.float32, chunks=(4, 3, 2))
    both, differ = disagreeing(candidate, of)
    assert {"logits", "layers.1.attn.k_rotated", "layers.2.mlp.weights", "grad.input"} <= both and not differ
    assert "grouped_mm" in str(candidate.refuses_float64) or "Double" in str(candidate.refuses_float64)
    with pytest.raises(Unsupported, match="refuses float64"):
        candidate.run(case("qwen3", "model"))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("qwen2_moe", "Qwen2MoeDecoderLayer Qwen2MoeSparseMoeBlock Qwen2MoeAttention Qwen2MoeTopKRouter"),
        ("mixtral", "MixtralDecoderLayer MixtralSparseMoeBlock MixtralAttention MixtralTopKRouter"),
        ("olmoe", "OlmoeDecoderLayer OlmoeSparseMoeBlock OlmoeAttention OlmoeTopKRouter"),
        ("deepseek_v3", "DeepseekV3MoE DeepseekV3TopkRouter"),
        ("gpt_oss", "GptOssMLP GptOssTopKRouter"),
    ],
)
def test_transformers_own_classes_are_mapped_by_the_same_guess(module: str, names: str) -> None:
    for name in names.split():
        candidate = load_candidate(f"transformers.models.{module}.modeling_{module}:{name}", family=module)
        both, differ = disagreeing(candidate, case(module, candidate.level))
        assert not differ and len(both) >= 5 and not candidate.missing and not candidate.extra_parameters, name


def test_tying_against_the_config_is_named() -> None:
    tied = bad("Tied")
    _, differ = disagreeing(tied, case("qwen3", "model"))
    assert "logits" in differ and [problem.code for problem in tied.problems] == ["MOE030"]
    loose = bad("AsksToTie")
    loose.run(case("qwen3", "model", {"tie_word_embeddings": True}))
    assert [problem.code for problem in loose.problems] == ["MOE030"]
    with pytest.raises(Unsupported, match="never asks for tie_word_embeddings"):
        style("NanoModel").run(case("qwen3", "model", {"tie_word_embeddings": True}))


@pytest.mark.parametrize(
    ("name", "code", "evidence"),
    [
        ("Nan", "MOE072", "480 of 480"),
        ("InPlace", "MOE062", "480 of 480 entries of hidden"),
        ("Dropping", "MOE063", "differs by"),
        ("WrongDtype", None, "is float16"),
    ],
)
def test_misbehaviour_is_a_problem_that_fails(name: str, code: str | None, evidence: str) -> None:
    problem = bad(name).problems[0]
    assert problem.code == code and evidence in problem.evidence and problem.fails


def test_what_is_changed_in_place_is_shown_as_it_was() -> None:
    of = case("qwen3", "moe")
    shown, reference = bad("InPlace").run(of), HuggingFace("qwen3").run(of)
    assert error(reference["mlp.expert_outputs"], shown["mlp.expert_outputs"]) <= TOLERANCE[of.dtype]


def test_nan_in_padding_is_nobodys_business() -> None:
    candidate = bad("NanInPadding")
    real = torch.tensor([[0] * 3 + [1] * 6, [1] * 9]).bool()
    shown = candidate.run(case("qwen3", "moe", attention_mask=real))
    assert bool(shown["mlp.output"][~real].isnan().all()) and not candidate.problems


def test_an_output_cut_off_from_its_inputs_is_a_problem() -> None:
    candidate = bad("Untrained")
    shown = candidate.run(case("qwen3", "moe"))
    assert {float(shown[name].abs().max()) for name in shown if name.startswith("grad.")} == {0.0}
    assert [problem.title for problem in candidate.problems] == ["its output has no gradient"]


def test_a_plain_tensor_is_told_and_does_not_fail() -> None:
    problem = bad("PlainTensor").problems[0]
    assert problem.code == "MOE013" and "table" in problem.title and not problem.fails


@pytest.mark.parametrize("name", ["Right", "ListedTwice"])
def test_a_right_block_has_no_problem(name: str) -> None:
    candidate = bad(name)
    assert not disagreeing(candidate, case("qwen3", "moe"))[1]
    assert not candidate.problems


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("PlainList", r"experts is a plain list: torch does not know of what is in it: 8 modules in self\.experts"),
        ("Raising", r"fails on \[3, 5\] tokens: RuntimeError: mat1 and mat2 .* \(\S*misbehaving\.py:\d+\)"),
        ("Endless", r"forward never ends: RecursionError.*misbehaving\.py:\d+"),
        ("Exiting", r"it called sys\.exit\(3\) \(\S*misbehaving\.py:\d+\)"),
        ("WrongShape", r"returns float64 \[3, 32\]; an MoE block gives \[B, S, D\] = \[3, 5, 32\]"),
        ("OtherDevice", r"mixes devices: .*misbehaving\.py:\d+"),
        ("WithoutGate", r"cannot tell what WithoutGate is: one\.weight \[8, 32\], other\.weight \[8, 32\]"),
        ("NeedsMore", r"what to build NeedsMore with: 'mesh' of NeedsMore\(dim, ffn_dim, num_experts, top_k, mesh\)"),
        ("NeedsSetting", r"reads the setting 'eval_capacity_factor' \(\S*misbehaving\.py:\d+\)"),
        ("NeedsInput", r"nothing is known to give for 'temperature'"),
        ("FailsToBuild", r"FailsToBuild\(dim=32, .*\) fails: TypeError: .*'top_k' \(\S*misbehaving\.py:\d+\)"),
        ("NotAModule", r"the class NotAModule is not a subclass of nn\.Module"),
        ("Unnamed", r"cannot tell what Unnamed is: thing \[32, 3\]"),
        ("BUILT", r"is a module that is built already: a Right"),
        ("NUMBER", r"it is of type int"),
    ],
)
def test_what_cannot_be_compared_is_named_with_what_to_do(name: str, says: str) -> None:
    with pytest.raises(CandidateError, match=says) as caught:
        bad(name)
    assert caught.value.exit_code == 1 and caught.value.hint


def test_a_failure_on_one_probe_names_it() -> None:
    candidate = bad("RaisingOnOne")
    with pytest.raises(CandidateError, match=r"fails on the probe 'test' in float64: IndexError: a sequence of one"):
        candidate.run(case("qwen3", "moe", shape=(2, 1)))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (
            "import_error.py",
            r"ModuleNotFoundError: No module named 'a_package_that_nobody_has' \(\S*import_error\.py:1\)",
        ),
        ("raises_at_import.py", r"KeyError: 'expert' \(\S*raises_at_import\.py:2\)"),
        ("exits_at_import.py", r"it called sys\.exit\('usage: train\.py DATA'\) \(\S*exits_at_import\.py:3\)"),
    ],
)
def test_a_module_that_cannot_be_imported(file: str, says: str) -> None:
    with pytest.raises(CandidateError, match=rf"the candidate \S*{file} cannot be imported: {says}") as caught:
        load_candidate(f"{BAD / file}:MoE", family="qwen3")
    assert caught.value.exit_code == 1


def test_a_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import torch\n\nclass MoE(:\n    pass\n", encoding="utf-8")
    with pytest.raises(CandidateError, match=r"SyntaxError: .* \(\S*broken\.py:3\)"):
        load_candidate(f"{file}:MoE", family="qwen3")


@pytest.mark.parametrize(
    ("spec", "kind", "says"),
    [
        (f"{BAD}/nosuch.py:MoE", NotFoundError, "no file"),
        (f"{BAD}/misbehaving.py:Wright", NotFoundError, "Wright"),
        ("no.such.module:MoE", NotFoundError, "no module 'no.such.module'"),
        ("torch.nn:Nothing", NotFoundError, "Nothing"),
        (f"{BAD}/misbehaving.py", ConfigError, "names no class"),
        ("plain", ConfigError, "names no class"),
        (":MoE", ConfigError, "names no class"),
        ("", ConfigError, "names no class"),
    ],
)
def test_a_spec_that_names_nothing(spec: str, kind: type[MoectlError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        load_candidate(spec, family="qwen3")
    assert caught.value.hint


def test_the_nearest_names_are_suggested() -> None:
    with pytest.raises(NotFoundError) as caught:
        load_candidate(f"{BAD}/misbehaving.py:Wright", family="qwen3")
    assert "Did you mean 'Right'?" in str(caught.value.hint)
    with pytest.raises(NotFoundError) as caught:
        load_candidate(f"{BAD}/misbehavin.py:Right", family="qwen3")
    assert "misbehaving.py" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="unknown level of qwen3 'mo'") as unknown:
        load_candidate(f"{BAD}/misbehaving.py:Right", family="qwen3", level="mo")  # type: ignore[arg-type]
    assert "Did you mean 'moe'?" in str(unknown.value.hint)


def test_prints_do_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    load_candidate(f"{BAD / 'prints_at_import.py'}:Router", family="qwen3").run(case("qwen3", "router"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert {"hello from the module", "hello from the constructor", "hello from forward"} <= set(
        captured.err.splitlines()
    )


def test_modules_are_found_in_the_current_folder_and_relative_imports_work(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "parts.py").write_text((BAD / "misbehaving.py").read_text(encoding="utf-8"), encoding="utf-8")
    (package / "block.py").write_text("from .parts import Right as MoE\n", encoding="utf-8")
    script = (
        "from moectl.parity.candidate.side import load_candidate\n"
        "print(load_candidate('mine.block:MoE', family='qwen3').level)\n"
        "print(load_candidate('mine/block.py:MoE', family='qwen3').level)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["moe", "moe"], run.stderr


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file, text = tmp_path / "mine.py", (BAD / "misbehaving.py").read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    assert not load_candidate(f"{file}:Right", family="qwen3").problems
    file.write_text(text.replace("return out.view(x.shape)", "return out.view(x.shape) / 0"), encoding="utf-8")
    assert load_candidate(f"{file}:Right", family="qwen3").problems[0].code == "MOE072"

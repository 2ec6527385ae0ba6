"""Every probe does to the reference what its name says, at every component that it names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from moectl.errors import ConfigError
from moectl.parity.case import Case, Level, Unsupported
from moectl.parity.families import FAMILIES, config_of, formula_of, levels_of, weight_shapes
from moectl.parity.probes import PROBES, Bench, probes_named
from moectl.parity.routes import tied_tokens
from moectl.parity.standard import Standards
from moectl.parity.tape import Tape

STANDARDS = Standards("qwen3")
ISSUED = (
    "one-token batch-of-one batch-of-many left-padding right-padding documents longest non-contiguous "
    "one-expert-takes-all idle-experts tokens-alike logits-80 exact-ties near-ties chunked-prefill cached-decoding "
    "norm-topk-prob decoder-sparse-step mlp-only-layers k-1 k-all train eval compiled anchor float64 float32 bfloat16 "
    "tied-embeddings"
).split()


def cases(name: str, level: Level, **fields: Any) -> list[Case]:
    config = fields.pop("config", config_of("qwen3", "tiny"))
    return list(PROBES[name].cases("qwen3", level, config=config, **fields))


@cache
def tapes(name: str, level: Level) -> tuple[tuple[Case, Tape], ...]:
    return tuple((case, STANDARDS.standard(case).tape) for case in cases(name, level))


def each(name: str, ending: str) -> Iterator[Tensor]:
    """The tensors of that ending, in every case at every level and layer."""
    for level in PROBES[name].levels:
        for _, tape in tapes(name, level):
            yield from (tensor for key, tensor in tape.items() if key.endswith(ending))


def test_every_probe_is_there() -> None:
    assert sorted(PROBES) == sorted(ISSUED)


@pytest.mark.parametrize("name", PROBES)
def test_cases_are_named_and_have_the_weights_of_their_config(name: str) -> None:
    for level in PROBES[name].levels:
        dtype = PROBES[name].dtypes[0]
        made = cases(name, level, dtype=dtype)
        assert made
        for case in made:
            shapes = weight_shapes(formula_of("qwen3", case.config), level)
            assert case.probe == name and case.level == level and case.dtype == dtype
            shapes = weight_shapes(formula_of("qwen3", case.config), level, Bench("qwen3", level, case.config).layer)
            assert {key: tuple(tensor.shape) for key, tensor in case.weights.items()} == shapes
            assert all(tensor.dtype == dtype for tensor in case.weights.values())


def test_dtypes_ask_the_same_question() -> None:
    """Weights and inputs are the same numbers, rounded."""
    exact, single = (cases("right-padding", "moe", dtype=dtype)[0] for dtype in (torch.float64, torch.float32))
    for name, tensor in exact.weights.items():
        assert torch.equal(tensor.float(), single.weights[name])
    assert exact.inputs.hidden is not None and single.inputs.hidden is not None
    assert torch.equal(exact.inputs.hidden.float(), single.inputs.hidden)
    other = cases("right-padding", "moe", seed=1)[0]
    assert not torch.equal(other.inputs.hidden, exact.inputs.hidden)  # type: ignore[arg-type]


def test_shapes() -> None:
    assert cases("one-token", "model")[0].inputs.input_ids.shape == (1, 1)  # type: ignore[union-attr]
    assert cases("batch-of-one", "moe")[0].inputs.hidden.shape[0] == 1  # type: ignore[union-attr]
    assert cases("batch-of-many", "router")[0].inputs.hidden.shape[0] == 7  # type: ignore[union-attr]
    longest = cases("longest", "attention")[0].inputs.hidden
    assert longest is not None and longest.shape[1] == config_of("qwen3", "tiny")["max_position_embeddings"]
    for level in PROBES["non-contiguous"].levels:
        inputs = cases("non-contiguous", level)[0].inputs
        tensor = inputs.input_ids if level == "model" else inputs.hidden
        assert tensor is not None and not tensor.is_contiguous()


def test_longest_is_refused_where_attention_would_not_fit() -> None:
    config = {**config_of("qwen3", "tiny"), "max_position_embeddings": 40_960}
    with pytest.raises(Unsupported, match="40,960 positions"):
        cases("longest", "attention", config=config)


@pytest.mark.parametrize(("name", "end"), [("left-padding", 0), ("right-padding", -1)])
def test_padding(name: str, end: int) -> None:
    """The first row is whole, the others are not; and nothing of the padding is scored."""
    for level in PROBES[name].levels:
        inputs = cases(name, level)[0].inputs
        mask = inputs.attention_mask
        assert mask is not None and bool(mask[0].all()) and mask.any(dim=1).all()
        assert mask[1:, end].tolist() == [False, False]
        if inputs.labels is not None:
            assert bool((inputs.labels[~mask] == -100).all())
            scored = torch.zeros_like(mask)
            scored[:, 1:] = (inputs.labels[:, 1:] != -100) & ~mask[:, :-1]
            assert not scored.any(), "a padding token would have to predict"
        elif inputs.cotangent is not None:
            assert bool((inputs.cotangent[~mask] == 0).all())


def test_documents_keep_to_themselves() -> None:
    """The first token of a document is what it would be alone: its value goes straight to the heads."""
    case, tape = tapes("documents", "attention")[0]
    starts = (0, 5, 7)
    grouped = tape["attn.v"][0].repeat_interleave(2, dim=0)  # 4 query heads on 2 key/value heads
    for start in starts:
        heads = tape["attn.heads"][0, start].view(4, 8)
        torch.testing.assert_close(heads, grouped[:, start], rtol=0, atol=1e-12)
    assert case.inputs.doc_ids is not None
    assert case.inputs.doc_ids[0].unique().tolist() == [0, 1, 2]


def test_one_expert_takes_all() -> None:
    for chosen in each("one-expert-takes-all", "mlp.chosen"):
        assert bool(chosen[:, 0].all())


def test_idle_experts() -> None:
    for chosen in each("idle-experts", "mlp.chosen"):
        assert not chosen[:, 4:].any() and chosen[:, :4].any()
    with pytest.raises(Unsupported, match="cannot be idle"):
        cases("idle-experts", "moe", config={**config_of("qwen3", "tiny"), "num_experts_per_tok": 5})


def test_tokens_alike() -> None:
    for logits in each("tokens-alike", "router_logits"):
        torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-10)


def test_logits_reach_80() -> None:
    for logits in each("logits-80", "router_logits"):
        assert float(logits.abs().max()) == pytest.approx(80.0, abs=1e-9)


@pytest.mark.parametrize("name", ["exact-ties", "near-ties"])
def test_ties_are_there(name: str) -> None:
    for level in PROBES[name].levels:
        for case, tape in tapes(name, level):
            tokens = sum(len(tensor) for key, tensor in tape.items() if key.endswith("mlp.chosen"))
            assert 0 < tied_tokens(tape, case) <= tokens
    assert tied_tokens(tapes(name, "moe")[-1][1], tapes(name, "moe")[-1][0]) == (24 if name == "exact-ties" else 8)


def test_near_ties_are_near_and_not_exact() -> None:
    (logits,) = (tape["mlp.router_logits"] for _, tape in tapes("near-ties", "router"))
    gaps = (logits[:, :4].max(dim=1).values - logits[:, :4].min(dim=1).values) / logits[:, 0].abs()
    assert bool((gaps > 0).all()) and bool((gaps < 1e-11).all())


def test_no_ties_elsewhere() -> None:
    """What is called a tie is rare: no other probe has any."""
    for name in ("float64", "one-token", "k-1", "logits-80", "norm-topk-prob"):
        for level in PROBES[name].levels:
            for case, tape in tapes(name, level):
                assert tied_tokens(tape, case) == 0, (name, level)


def test_norm_topk_both_ways() -> None:
    normed, raw = (tape["mlp.weights"].sum(dim=1) for _, tape in tapes("norm-topk-prob", "router"))
    torch.testing.assert_close(normed, torch.ones_like(normed), rtol=0, atol=1e-12)
    assert float(raw.max()) < 0.99


@pytest.mark.parametrize(("name", "number"), [("k-1", 1), ("k-all", 8)])
def test_experts_per_token(name: str, number: int) -> None:
    for chosen in each(name, "mlp.chosen"):
        assert chosen.sum(dim=1).unique().tolist() == [number]


def test_layers_without_experts() -> None:
    def with_experts(tape: Tape) -> list[int]:
        return [layer for layer in range(3) if f"layers.{layer}.mlp.chosen" in tape]

    assert [with_experts(tape) for _, tape in tapes("decoder-sparse-step", "model")] == [[1]]
    assert [with_experts(tape) for _, tape in tapes("mlp-only-layers", "model")] == [[1, 2], [0, 1]]


def test_tied_embeddings_have_no_head() -> None:
    ((case, tape),) = tapes("tied-embeddings", "model")
    assert "lm_head.weight" not in case.weights and "grad.lm_head.weight" not in tape


def test_modes() -> None:
    assert [case.training for name in ("train", "eval") for case in cases(name, "moe")] == [True, False]
    assert all(case.compiled for case in cases("compiled", "moe", dtype=torch.float32))
    for name in ("chunked-prefill", "cached-decoding"):
        for case in cases(name, "model"):
            assert case.inputs.chunks is not None and case.inputs.input_ids is not None
            assert sum(case.inputs.chunks) == case.inputs.input_ids.shape[1]
    assert cases("cached-decoding", "model")[0].inputs.chunks[-8:] == (1,) * 8  # type: ignore[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_asked_or_told_why_not(family: str) -> None:
    """No probe breaks on a family: it makes cases, or says why it has none."""
    config = config_of(family, "tiny")
    for level in levels_of(family):
        for probe in PROBES.values():
            if level not in probe.levels:
                continue
            try:
                made = list(probe.cases(family, level, config=config, dtype=probe.dtypes[0]))
            except Unsupported as reason:
                assert str(reason)
            else:
                assert made and all(formula_of(family, case.config) for case in made)


def test_families_without_a_switch_say_so() -> None:
    with pytest.raises(Unsupported, match="mixtral has no norm_topk_prob"):
        list(PROBES["norm-topk-prob"].cases("mixtral", "moe", config=config_of("mixtral", "tiny")))


def test_a_checkpoint_fixes_what_a_probe_would_change() -> None:
    config = config_of("qwen3", "tiny")
    given = dict(Bench("qwen3", "model", config).weights())
    fields: dict[str, Any] = {"config": config, "weights": given}
    assert all(case.weights is given for case in PROBES["k-1"].cases("qwen3", "model", **fields))
    with pytest.raises(Unsupported, match="checkpoint"):
        list(PROBES["mlp-only-layers"].cases("qwen3", "model", **fields))


def test_names() -> None:
    assert [probe.name for probe in probes_named(())] == list(PROBES)
    assert [probe.name for probe in probes_named(("K_1", "one token"))] == ["one-token", "k-1"]
    with pytest.raises(ConfigError, match="unknown probe 'exact-tie'") as raised:
        probes_named(("exact-tie",))
    assert "Did you mean 'exact-ties'?" in str(raised.value.hint)

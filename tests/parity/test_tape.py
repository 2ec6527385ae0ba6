"""A tape keeps copies, the first of each name, and its names sort in model order."""

from __future__ import annotations

import random

import torch

from moectl.parity.case import Inputs, positions_of
from moectl.parity.reference import FormulaSubject
from moectl.parity.tape import Tape, model_order
from tests.parity.cases import LEFT, case


def test_it_keeps_copies() -> None:
    tape, x = Tape(), torch.ones(3, requires_grad=True)
    tape.record("logits", x)
    with torch.no_grad():
        x.mul_(5)
    assert tape["logits"].tolist() == [1.0, 1.0, 1.0] and not tape["logits"].requires_grad


def test_the_first_of_a_name_stays() -> None:
    tape = Tape()
    tape.record("logits", torch.tensor(1.0))
    tape.record("logits", torch.tensor(2.0))
    assert float(tape["logits"]) == 1.0
    assert list(tape) == ["logits"] and len(tape) == 1 and "loss" not in tape


def test_names_sort_in_the_order_of_computation() -> None:
    """The reference records what it computes as it computes it: sorting must give its own order back."""
    for level in ("model", "layer", "moe", "attention", "router"):
        names = list(FormulaSubject("qwen2_moe").run(case("qwen2_moe", level)))  # type: ignore[arg-type]
        values = [name for name in names if not name.startswith("grad.")]
        shuffled = random.Random(0).sample(values, len(values))
        assert sorted(shuffled, key=model_order) == values
        assert sorted(names, key=model_order)[: len(values)] == values


def test_layers_sort_as_numbers() -> None:
    names = ["layers.10.attn.q", "layers.9.mlp.output", "layers.9.attn.q", "embeddings", "logits", "layers.9.mine"]
    assert sorted(names, key=model_order) == [
        "embeddings", "layers.9.attn.q", "layers.9.mlp.output", "layers.9.mine", "layers.10.attn.q", "logits",
    ]  # fmt: skip


def test_gradients_come_last_and_sorted() -> None:
    names = [
        "grad.input",
        "grad.model.embed_tokens.weight",
        "grad.model.layers.2.mlp.gate.weight",
        "grad.model.layers.10.mlp.gate.weight",
        "grad.lm_head.weight",
    ]
    assert sorted(["logits", *reversed(names)], key=model_order) == ["logits", *names]


def test_positions() -> None:
    ids = torch.zeros(2, 9, dtype=torch.int64)
    assert positions_of(Inputs(input_ids=ids))[1].tolist() == list(range(9))
    assert positions_of(Inputs(input_ids=ids, attention_mask=LEFT))[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert positions_of(Inputs(input_ids=ids, attention_mask=LEFT.flip(1)))[0].tolist() == list(range(9))
    given = torch.arange(9, 18)[None]
    assert (
        positions_of(Inputs(hidden=torch.zeros(2, 9, 4), positions=given, attention_mask=LEFT)).tolist()
        == [list(range(9, 18))] * 2
    )

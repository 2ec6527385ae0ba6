"""The difference of two models on the same texts: by definition, and with an interval that holds it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moectl.corpus.loader import PackedDataset
from moectl.evaluation.losses import evaluate
from moectl.evaluation.paired import Difference, Measured, difference, measure
from moectl.models.decoder import Decoder
from moectl.resampling import Interval
from tests.support import tiny_shape


def a_model(data: PackedDataset, seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(tiny_shape(data.manifest.vocab_size, None))


def test_the_losses_are_those_of_eval(dataset: PackedDataset) -> None:
    model = a_model(dataset, 0)
    ours, theirs = measure(model, dataset, batch_size=5).report, evaluate(model, dataset, batch_size=16)
    assert ours.to_dict().keys() == theirs.to_dict().keys()
    # Rows of another number round differently in float32.
    assert ours.overall.lm_loss == pytest.approx(theirs.overall.lm_loss, rel=1e-6)
    assert ours.overall.interval == pytest.approx(theirs.overall.interval, rel=1e-6)
    assert ours.complete and ours.overall.tokens == theirs.overall.tokens


def test_a_difference_is_that_of_the_losses_and_its_sign_that_of_the_second(dataset: PackedDataset) -> None:
    one, other = (measure(a_model(dataset, seed), dataset) for seed in (0, 1))
    found, turned = difference(one, other), difference(other, one)
    assert found.mean == pytest.approx(other.report.overall.lm_loss - one.report.overall.lm_loss, rel=1e-9)
    assert turned.mean == pytest.approx(-found.mean)
    assert found.interval is not None and found.interval.low < found.mean < found.interval.high


def test_what_is_hard_for_both_cancels(dataset: PackedDataset) -> None:
    """A constant advantage per token is certain, however much texts differ in themselves."""
    one = measure(a_model(dataset, 0), dataset)
    better = replace(one, nll=one.nll - 0.01 * one.tokens)
    found = difference(one, better)
    assert found.mean == pytest.approx(-0.01) and found.interval is not None
    assert found.interval.high - found.interval.low < 1e-9 and found.excludes_zero
    own = one.report.overall.interval
    assert own is not None and own.high - own.low > 0.01


def test_nothing_is_certain_of_a_model_against_itself(dataset: PackedDataset) -> None:
    one = measure(a_model(dataset, 0), dataset)
    same = difference(one, one)
    assert same.mean == 0.0 and not same.excludes_zero


@pytest.mark.parametrize(
    ("interval", "sure"),
    [((-0.2, -0.1), True), ((0.1, 0.2), True), ((-0.1, 0.1), False), ((0.0, 0.1), False), (None, False)],
)
def test_zero_within_the_interval_shows_nothing(interval: Any, sure: bool) -> None:
    assert Difference(0.15, None if interval is None else Interval(*interval)).excludes_zero is sure


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """200 draws of 24 groups in two domains: 95 % intervals that miss in 2 to 20 of 200."""
    generator = np.random.default_rng(0)
    tokens, domains = np.full(24, 100.0), np.repeat([0, 1], 12)
    missed = 0
    for _ in range(200):
        noise = generator.normal(0.05, 0.1, 24)
        one = Measured(None, np.zeros(24), tokens, domains)  # type: ignore[arg-type]
        found = difference(one, replace(one, nll=noise * tokens))
        assert found.interval is not None
        missed += not found.interval.low <= 0.05 <= found.interval.high
    assert 2 <= missed <= 20


def test_other_tokens_are_refused(dataset: PackedDataset) -> None:
    one = measure(a_model(dataset, 0), dataset)
    with pytest.raises(ValueError, match="same tokens"):
        difference(one, replace(one, tokens=one.tokens + 1))

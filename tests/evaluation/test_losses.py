"""Held-out loss against a slow reference: token by token, document by document."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

from moectl.config.schema import MoEConfig
from moectl.corpus.loader import PackedDataset
from moectl.evaluation.losses import LossReport, evaluate, token_losses
from moectl.models.decoder import Decoder
from tests.support import tiny_shape


class Unigram(nn.Module):
    """Every token has the same, known probabilities, whatever came before."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor, doc_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits.expand(*input_ids.shape, -1)


def scored_tokens(dataset: PackedDataset) -> list[tuple[int, int, str, int]]:
    """(token, bytes, domain, document) of every held-out token with an earlier one of its text in its block."""
    split, found = dataset.eval, []
    for row in range(split.num_blocks):
        for place in range(1, split.block_size):
            document = int(split.doc_ids[row, place])
            if document == int(split.doc_ids[row, place - 1]):
                domain = dataset.documents[document].domain
                found.append((int(split.tokens[row, place]), int(split.byte_counts[row, place]), domain, document))
    return found


def test_unigram_by_hand(dataset: PackedDataset) -> None:
    logits = torch.randn(dataset.manifest.vocab_size, generator=torch.Generator().manual_seed(0))
    log_probs = torch.log_softmax(logits.double(), -1)
    report = evaluate(Unigram(logits), dataset, batch_size=7)

    nll: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    for token, count, domain, _ in scored_tokens(dataset):
        for name in (domain, "all"):
            nll[name] -= float(log_probs[token])
            tokens[name] += 1
            size[name] += count
    for name, losses in {**report.domains, "all": report.overall}.items():
        assert losses.tokens == tokens[name] and losses.bytes == size[name]
        assert losses.lm_loss == pytest.approx(nll[name] / tokens[name], rel=1e-6)
        assert losses.perplexity == pytest.approx(math.exp(nll[name] / tokens[name]), rel=1e-6)
        assert losses.bits_per_byte == pytest.approx(nll[name] / math.log(2) / size[name], rel=1e-6)
    assert report.complete and report.blocks == dataset.eval.num_blocks


def test_uniform_model_costs_log_of_the_vocabulary(dataset: PackedDataset) -> None:
    report = evaluate(Unigram(torch.zeros(dataset.manifest.vocab_size)), dataset)
    assert report.overall.lm_loss == pytest.approx(math.log(dataset.manifest.vocab_size), rel=1e-6)


def test_real_model_document_by_document(dataset: PackedDataset, model: Decoder) -> None:
    """The reference cuts each document out of its block and runs it alone: nothing else may be seen."""
    report = evaluate(model, dataset)
    split, total, count = dataset.eval, 0.0, 0
    model.eval()
    for row in range(split.num_blocks):
        ids, documents = (np.asarray(array[row]).astype(np.int64) for array in (split.tokens, split.doc_ids))
        for document in np.unique(documents):
            piece = torch.from_numpy(ids[documents == document])[None]
            with torch.no_grad():
                log_probs = torch.log_softmax(model(piece)[0].double(), -1)
            total -= sum(float(log_probs[place, piece[0, place + 1]]) for place in range(piece.shape[1] - 1))
            count += piece.shape[1] - 1
    assert report.overall.tokens == count
    assert report.overall.lm_loss == pytest.approx(total / count, rel=1e-5)


def test_the_whole_is_weighted_by_token_not_by_domain(dataset: PackedDataset, model: Decoder) -> None:
    report = evaluate(model, dataset)
    parts = report.domains.values()
    weighted = sum(part.lm_loss * part.tokens for part in parts) / sum(part.tokens for part in parts)
    assert report.overall.lm_loss == pytest.approx(weighted, rel=1e-12)


def test_batch_size_does_not_matter(dataset: PackedDataset, model: Decoder) -> None:
    one, many = (evaluate(model.double(), dataset, batch_size=size).overall for size in (1, 64))
    assert one.lm_loss == pytest.approx(many.lm_loss, rel=1e-12)


def test_no_noise_no_gradients_mode_restored(dataset: PackedDataset, model: Decoder) -> None:
    model.train()
    model.layers[1].eval()
    first, second = (evaluate(model, dataset, bootstrap=0) for _ in range(2))
    assert first == second
    assert model.training and model.layers[0].training and not model.layers[1].training


def test_auxiliary_losses_are_not_in_it(dataset: PackedDataset, model: Decoder) -> None:
    """Sharper gates change balance and z-loss without bound; with equal experts the language model is the same."""
    for layer in model.moe_layers().values():
        for parameter in layer.experts.parameters():
            with torch.no_grad():
                parameter.copy_(parameter[:1].expand_as(parameter))
    before = evaluate(model, dataset).overall.lm_loss
    with torch.no_grad():
        for layer in model.moe_layers().values():
            layer.router.weight.mul_(1000)
    assert evaluate(model, dataset).overall.lm_loss == pytest.approx(before, rel=1e-6)


def test_interval_is_a_bootstrap_over_groups(dataset: PackedDataset, model: Decoder) -> None:
    report = evaluate(model, dataset)
    for losses in (report.overall, *report.domains.values()):
        assert losses.groups in (2, 4)
        assert losses.interval is not None
        assert losses.interval.low <= losses.lm_loss <= losses.interval.high
    assert evaluate(model, dataset, bootstrap=0).overall.interval is None


def test_bounded_evaluation_spreads_over_domains(dataset: PackedDataset, model: Decoder) -> None:
    report = evaluate(model, dataset, max_blocks=6)
    assert report.blocks == 6 and not report.complete
    assert all(losses.tokens > 0 for losses in report.domains.values())
    assert evaluate(model, dataset, max_blocks=10_000).complete


def test_progress_and_json(dataset: PackedDataset, model: Decoder) -> None:
    seen: list[tuple[int, int]] = []
    report = evaluate(model, dataset, batch_size=10, progress=lambda done, total: seen.append((done, total)))
    blocks = dataset.eval.num_blocks
    assert seen[-1] == (blocks, blocks) and len(seen) == math.ceil(blocks / 10)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["domains"]["fish"]["lm_loss"] == report.metrics()["eval/fish/lm_loss"]
    assert document["lm_loss"] == report.metrics()["eval/lm_loss"]


def test_nan_is_kept(dataset: PackedDataset) -> None:
    logits = torch.zeros(dataset.manifest.vocab_size)
    logits[3] = math.nan
    report = evaluate(Unigram(logits), dataset)
    assert math.isnan(report.overall.lm_loss) and math.isnan(report.metrics()["eval/bits_per_byte"])


def test_nothing_scored_is_nan_not_an_error() -> None:
    empty = LossReport(nll=0.0, tokens=0, bytes=0, groups=0, interval=None)
    assert math.isnan(empty.lm_loss) and math.isnan(empty.perplexity) and math.isnan(empty.bits_per_byte)
    assert LossReport(nll=1e6, tokens=1, bytes=1, groups=1, interval=None).perplexity == math.inf


def test_token_losses_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5, 11, dtype=torch.bfloat16)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, 2] = -100
    whole = token_losses(logits, labels)
    monkeypatch.setattr("moectl.evaluation.losses._CHUNK", 1)
    assert torch.equal(token_losses(logits, labels), whole)
    assert whole.dtype == torch.float32 and whole[0, 2] == 0
    assert token_losses(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize(("router", "marks"), [("expert-choice", ("non-causal",)), ("expert-choice-threshold", ())])
def test_the_report_carries_the_models_marks(dataset: PackedDataset, router: str, marks: tuple[str, ...]) -> None:
    moe = MoEConfig.model_validate({"router": router, "num_experts": 4, "layers": "all"})
    report = evaluate(Decoder(tiny_shape(dataset.manifest.vocab_size, moe)), dataset, bootstrap=0)
    assert report.marks == marks and report.to_dict()["marks"] == list(marks)
    assert math.isfinite(report.overall.lm_loss)


def test_capacity_applies_here_only_where_it_says_so(dataset: PackedDataset) -> None:
    """Room for a twentieth of the tokens: dropped in evaluation, the experts' outputs would be missing."""
    losses = {}
    for name, capacity in {"none": None, "training": 0.05, "too": {"factor": 0.05, "in_eval": True}}.items():
        torch.manual_seed(0)
        options = {"router": {"name": "top1"}, "num_experts": 4, "layers": "all", "capacity": capacity}
        model = Decoder(tiny_shape(dataset.manifest.vocab_size, MoEConfig.model_validate(options)))
        with torch.no_grad():
            for layer in model.moe_layers().values():
                layer.experts.down_proj.mul_(100)  # so that an expert's output is felt
        losses[name] = evaluate(model, dataset, bootstrap=0).overall.nll
    assert losses["training"] == losses["none"]
    assert abs(losses["too"] - losses["none"]) > 1e-3 * losses["none"]

"""Distillation's loss against its definition, and what the objective reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moectl.config.distillation import DistillConfig
from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.loader import PackedDataset, targets
from moectl.errors import CheckError
from moectl.models.decoder import Decoder
from moectl.training import distill
from moectl.training.distill import Distillation, Side, distillation_loss
from tests.support import tiny_shape
from tests.training.test_trainer import make_trainer

Make = Callable[..., ExperimentConfig]
N, D, H, V = 50, 8, 12, 37


def sides(dtype: torch.dtype = torch.float64) -> tuple[Side, Side, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = -100
    student = Side(draw(N, D).requires_grad_(), draw(V, D).requires_grad_())
    return student, Side(draw(N, H), draw(V, H)), labels


def by_definition(student: Side, teacher: Side, labels: Tensor, temperature: float, alpha: float) -> list[Tensor]:
    """Whole logits, torch's own functions and autograd."""
    scored = labels != -100
    logits, wanted = (side.hidden[scored] @ side.weight.t() for side in (student, teacher))
    lm = F.cross_entropy(logits, labels[scored], reduction="sum")
    log_soft, log_wanted = (F.log_softmax(x / temperature, -1) for x in (logits, wanted))
    kd = temperature**2 * F.kl_div(log_soft, log_wanted, reduction="sum", log_target=True)
    return [(1 - alpha) * lm + alpha * kd, lm, kd]


@pytest.mark.parametrize("elements", [1, 20 * V, 10**6])
@pytest.mark.parametrize(("temperature", "alpha"), [(2.0, 0.5), (1.0, 1.0), (0.7, 0.1), (5.0, 0.9)])
def test_loss_and_gradients_are_the_definition_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, temperature: float, alpha: float, elements: int
) -> None:
    monkeypatch.setattr(distill, "_CHUNK_ELEMENTS", elements)
    student, teacher, labels = sides()
    found = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha)
    expected = by_definition(student, teacher, labels, temperature, alpha)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=0)
    assert not found.lm.requires_grad and not found.kd.requires_grad
    ours = torch.autograd.grad(3.0 * found.total, student)
    theirs = torch.autograd.grad(3.0 * expected[0], student)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_teacher_gets_no_gradient_and_may_be_its_own_student() -> None:
    student, teacher, labels = sides()
    loud = Side(teacher.hidden.requires_grad_(), teacher.weight.requires_grad_())
    distillation_loss(student, loud, labels, temperature=2.0, alpha=0.5).total.backward()
    assert loud.hidden.grad is None and loud.weight.grad is None
    same = distillation_loss(student, student, labels, temperature=2.0, alpha=1.0)
    # KL of equal distributions; float64 sums of 37 · 43 terms of about 1.
    assert abs(float(same.kd.detach())) < 1e-12


def test_logits_are_never_whole() -> None:
    rows, vocabulary = 4096, 2048
    student = Side(torch.randn(rows, 4).requires_grad_(), torch.randn(vocabulary, 4).requires_grad_())
    teacher = Side(torch.randn(rows, 4), torch.randn(vocabulary, 4))

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return made

    with Largest() as largest:
        labels = torch.zeros(rows, dtype=torch.int64)
        distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5).total.backward()
    assert largest.numel == distill._CHUNK_ELEMENTS < rows * vocabulary / 10


def test_low_precision_products_have_float32_losses() -> None:
    student, teacher, labels = sides(torch.float32)
    exact = by_definition(*(Side(s.hidden.double(), s.weight.double()) for s in (student, teacher)), labels, 2.0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
    assert found.total.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of about ±10 are off by 0.04, and 43 rows average that out.
    torch.testing.assert_close(found.lm.double(), exact[1].detach(), rtol=0.02, atol=0)
    torch.testing.assert_close(found.kd.double(), exact[2].detach(), rtol=0.02, atol=0)


def test_without_gradients_nothing_is_kept() -> None:
    student, teacher, labels = sides()
    with torch.no_grad():
        found = distillation_loss(student, teacher, labels, temperature=2.0, alpha=0.5)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, by_definition(student, teacher, labels, 2.0, 0.5)[0].detach())


def test_another_vocabulary_is_refused() -> None:
    student, teacher, labels = sides()
    with pytest.raises(CheckError, match="the student has 37 token ids, the teacher 36"):
        distillation_loss(student, Side(teacher.hidden, teacher.weight[:36]), labels, temperature=2.0, alpha=0.5)


def test_the_objective_keeps_documents_apart_and_the_lm_loss_pure(dataset: PackedDataset) -> None:
    torch.manual_seed(0)
    moe = MoEConfig.model_validate({"num_experts": 4, "layers": "all", "init": "random", "router": "top1"})
    teacher = Decoder(tiny_shape(dataset.manifest.vocab_size, moe)).double().train()
    student = Decoder(tiny_shape(dataset.manifest.vocab_size, None)).double().train()
    objective = Distillation(teacher, DistillConfig(teacher="x", temperature=3.0, alpha=0.25))
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = dataset.train.batch(range(6))
    doc_ids = batch.doc_ids.clone()
    doc_ids[:, 7:] += 1000  # a document ends in every block
    batch = batch._replace(doc_ids=doc_ids)
    labels = targets(batch)
    sums = objective(student, batch, labels)
    input_ids, doc_ids = batch.input_ids[:, :-1], batch.doc_ids[:, :-1]
    assert float(sums.lm) == pytest.approx(float(student.lm_loss_sum(input_ids, labels, doc_ids).detach()), rel=1e-12)
    scored = labels != -100
    logits, wanted = (model(input_ids, doc_ids)[scored] / 3.0 for model in (student, teacher))
    kd = 9.0 * F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
    assert float(sums.parts["kd"]) == pytest.approx(float(kd.detach()), rel=1e-10)
    assert float(sums.total.detach()) == pytest.approx(0.75 * float(sums.lm) + 0.25 * float(kd.detach()), rel=1e-10)
    assert torch.equal(objective(student, batch, labels).parts["kd"], sums.parts["kd"])  # no noise in the teacher


def test_a_student_comes_near_its_teacher(experiment: Make, dataset: PackedDataset, tmp_path: Path) -> None:
    """Cut into micro-batches or not, the same step; and the divergence falls."""
    torch.manual_seed(1)
    teacher = Decoder(tiny_shape(dataset.manifest.vocab_size, None)).double()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3.0)  # far from any text: only the teacher can have taught it
    settings = DistillConfig(teacher="x", alpha=1.0, temperature=1.0)
    seen = []
    for accumulated in (1, 2):
        train = {"steps": 60, "batch_size": 4 // accumulated, "grad_accum": accumulated, "precision": "float64"}
        config = experiment(moe=None, train=train, optim={"lr": 0.01})
        folder = tmp_path / str(accumulated)
        trainer = make_trainer(config, dataset, folder, objective=Distillation(teacher, settings))
        assert trainer.train().status == "finished"
        rows = [values for _, values in trainer.logger.rows if "train/kd_loss" in values]  # type: ignore[attr-defined]
        assert rows[0]["train/loss"] == pytest.approx(rows[0]["train/kd_loss"], rel=1e-12)
        assert rows[0]["train/lm_loss"] != pytest.approx(rows[0]["train/kd_loss"], rel=0.1)
        seen.append([row["train/kd_loss"] for row in rows])
    assert seen[0][-1] < 0.7 * seen[0][0]
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-10)

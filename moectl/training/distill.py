"""Distillation: a student learns a teacher's distribution over the next token, and the text itself.

``alpha · T² · KL(teacher_T ‖ student_T) + (1 - alpha) · LM loss``, both distributions softened by the temperature T;
T² keeps the gradients of the two terms comparable when T changes (Hinton et al. 2015, arXiv:1503.02531). Logits of
neither model are ever whole: a few rows at a time are projected, compared and differentiated.

Shape suffixes: B batch, S sequence, N rows, D the student's hidden size, H the teacher's, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moectl.config.distillation import DistillConfig
from moectl.corpus.loader import IGNORED, Batch
from moectl.errors import CheckError
from moectl.models.language_model import LanguageModel
from moectl.training.protocol import ObjectiveSums

_CHUNK_ELEMENTS = 1 << 19  # of the logits of one model at a time on a CPU; four such arrays are alive


class Distillation:
    """What a student is trained on: an :class:`moectl.training.protocol.Objective`.

    ``train/lm_loss`` stays the pure LM loss, and ``train/kd_loss`` is ``T² · KL``, both per scored token and
    unweighted. The teacher is in eval mode (no noise, dropless), gets no gradient, and sees what the student sees:
    the same blocks, and no token of another document.

    Args:
        teacher: on the device of the run; it is put into eval mode and frozen.
        settings: temperature and alpha.
    """

    def __init__(self, teacher: LanguageModel, settings: DistillConfig) -> None:
        self.teacher = teacher.eval()
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        self.temperature, self.alpha = settings.temperature, settings.alpha

    def __call__(self, model: LanguageModel, batch: Batch, labels: Tensor) -> ObjectiveSums:
        input_ids, doc_ids = batch.input_ids[:, :-1], batch.doc_ids[:, :-1]
        with torch.no_grad():
            teacher_NH = self.teacher.hidden_states(input_ids, doc_ids).flatten(0, 1)
        student_ND = model.hidden_states(input_ids, doc_ids).flatten(0, 1)
        losses = distillation_loss(
            Side(student_ND, model.head_weight),
            Side(teacher_NH, self.teacher.head_weight),
            labels.flatten(),
            temperature=self.temperature,
            alpha=self.alpha,
        )
        return ObjectiveSums(losses.total, losses.lm, {"kd": losses.kd})


class Side(NamedTuple):
    """One model's final hidden states ``[N, D]`` and output embedding ``[V, D]``."""

    hidden: Tensor
    weight: Tensor


class Losses(NamedTuple):
    """Sums over scored rows, 0-d, nats: what is differentiated, the LM loss, and ``T² · KL``; these without a graph."""

    total: Tensor
    lm: Tensor
    kd: Tensor


def distillation_loss(student: Side, teacher: Side, labels: Tensor, *, temperature: float, alpha: float) -> Losses:
    """``alpha · T² · KL(teacher_T ‖ student_T) + (1 - alpha) · cross-entropy``, summed.

    Softmaxes run in float32 (float64 where the student is in it); under autocast the products run in its dtype.

    Args:
        student, teacher: rows of the same tokens.
        labels: ``[N]`` int64; rows with -100 count in neither term.

    Raises:
        CheckError: vocabularies of different sizes.
    """
    refuse_other_vocabulary(student.weight.shape[0], teacher.weight.shape[0])
    student_x, student_w = _cast(*student)
    teacher_x, teacher_w = _cast(teacher.hidden.detach(), teacher.weight.detach())
    if not torch.is_grad_enabled():
        student_x, student_w = student_x.detach(), student_w.detach()
    total, parts = _Distill.apply(student_x, student_w, teacher_x, teacher_w, labels, temperature, alpha)
    return Losses(total, parts[0], parts[1])


def refuse_other_vocabulary(student: int, teacher: int) -> None:
    """Raises CheckError unless both models have the same number of token ids."""
    if student != teacher:
        raise CheckError(
            f"the student has {student:,} token ids, the teacher {teacher:,}: their distributions cannot be compared",
            "Distil into a model of the teacher's own vocabulary.",
        )


def _cast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As autocast would have the two for a product; it spares float64."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


class _Distill(torch.autograd.Function):
    """Gradients are made in the forward pass, where both softmaxes are at hand, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        teacher_NH: Tensor,
        teacher_VH: Tensor,
        labels_N: Tensor,
        temperature: float,
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        need_x, need_weight = ctx.needs_input_grad[:2]
        exact = x_ND.dtype if x_ND.dtype == torch.float64 else torch.float32
        grad_x = torch.zeros_like(x_ND) if need_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=exact) if need_weight else None
        parts = x_ND.new_zeros(2, dtype=exact)
        for rows in _chunks(x_ND, weight_VD.shape[0]):
            scored = labels_N[rows] != IGNORED
            logits = (x_ND[rows] @ weight_VD.t()).to(exact)
            wanted = (teacher_NH[rows] @ teacher_VH.t()).to(exact)
            log_wanted = torch.log_softmax(wanted / temperature, dim=-1)
            log_soft = torch.log_softmax(logits / temperature, dim=-1)
            log_probs = torch.log_softmax(logits, dim=-1)
            wanted = log_wanted.exp()
            divergence_N = (wanted * (log_wanted - log_soft)).sum(-1)
            parts[0] += F.nll_loss(log_probs, labels_N[rows], ignore_index=IGNORED, reduction="sum")
            parts[1] += temperature**2 * (divergence_N * scored).sum()
            if not (need_x or need_weight):
                continue
            grad = log_probs.exp_()
            grad[torch.arange(len(scored), device=grad.device), labels_N[rows].clamp(min=0)] -= 1.0
            grad.mul_(1.0 - alpha).add_(log_soft.exp_().sub_(wanted), alpha=alpha * temperature)
            grad.mul_(scored[:, None])
            if grad_x is not None:
                torch.mm(grad.to(weight_VD.dtype), weight_VD, out=grad_x[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), x_ND[rows].to(exact))
        ctx.save_for_backward(*(grad for grad in (grad_x, grad_weight) if grad is not None))
        ctx.needs, ctx.weight_dtype = (need_x, need_weight), weight_VD.dtype
        ctx.mark_non_differentiable(parts)
        return (1.0 - alpha) * parts[0] + alpha * parts[1], parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        need_x, need_weight = ctx.needs
        grad_x = next(saved) * grad_total if need_x else None
        grad_weight = (next(saved) * grad_total).to(ctx.weight_dtype) if need_weight else None
        return grad_x, grad_weight, None, None, None, None, None


def _chunks(x_ND: Tensor, vocabulary: int) -> list[slice]:
    """Row ranges: small enough for the cache on a CPU, larger on a device that wants big products."""
    elements = _CHUNK_ELEMENTS if x_ND.device.type == "cpu" else _CHUNK_ELEMENTS * 128
    rows = max(16, elements // vocabulary)
    return [slice(start, min(start + rows, x_ND.shape[0])) for start in range(0, x_ND.shape[0], rows)]

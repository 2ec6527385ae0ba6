"""Models as exact as their dtype: for measuring what a change of the model does, and not how it rounds."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moectl.models.decoder import RMSNorm
from moectl.models.language_model import LanguageModel


def exact_copy(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy of ``model`` in ``dtype``, in eval mode, whose norms compute in float64 where that is the dtype.

    transformers' RMSNorm computes in float32 whatever comes in. The last of them so rounds every hidden state to
    float32 and hides differences below 1e-8; an earlier one may turn 1e-16 into 1e-8.
    """
    copied: LanguageModel = copy.deepcopy(model).to(dtype)
    if dtype == torch.float64:
        for parent in list(copied.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                    setattr(parent, name, _norm(child))
    return copied.eval()


def _norm(theirs: nn.Module) -> RMSNorm:
    weight = theirs.weight
    assert isinstance(weight, nn.Parameter)
    norm = RMSNorm(weight.shape[0], float(theirs.variance_epsilon))  # type: ignore[arg-type]
    norm.weight = weight
    return norm

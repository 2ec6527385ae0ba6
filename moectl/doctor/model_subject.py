"""A model folder in Hugging Face's layout, as the checks look at it.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from moectl.corpus.loader import IGNORED
from moectl.doctor.subject import Audited, Layer, Losses, Route, Seen, Tokens, Training, drawn_tokens
from moectl.hf.opened import Answer, Opened, open_folder

ROWS, LENGTH = 16, 64


@dataclass
class AuditedModel(Audited):
    """A model that transformers loaded."""

    opened: Opened | None = None

    def call(self, tokens: Tokens, mask: Tensor | None = None) -> Answer:
        """One pass, as the model answers it."""
        assert self.opened is not None
        return self.opened.call(tokens.input_ids, None if mask is None else mask.long())

    def look(self, tokens: Tokens, mask: Tensor | None = None) -> Seen:
        answer = self.call(tokens, mask)
        routes = {number: Route(r.indices, r.weights, None, r.logits) for number, r in answer.routes.items()}
        balance = {} if answer.balance is None else {"over all layers": float(answer.balance.detach())}
        return Seen(answer.logits.detach(), routes, answer.inputs, balance)

    def losses(self, tokens: Tokens) -> Losses:
        assert self.opened is not None
        answer = self.call(tokens)
        logits_TV = answer.logits.float().flatten(0, 1)
        lm = F.cross_entropy(logits_TV, tokens.labels.flatten(), ignore_index=IGNORED)
        if answer.balance is None:
            return Losses(lm, None, f"{self.opened.architecture} computes none")
        if not self.opened.balance_coef:
            return Losses(lm, None, "router_aux_loss_coef is 0")
        return Losses(lm, self.opened.balance_coef * answer.balance)


def open_model(folder: Path) -> AuditedModel:
    """The model of a folder.

    Raises:
        MoectlError: see :func:`moectl.hf.opened.open_folder`.
    """
    opened = open_folder(folder)
    layers = {
        number: Layer(
            number=number,
            block=block.block,
            router=block.router,
            gate=block.gate,
            router_name=f"{block.name}.{'gate' if getattr(block.block, 'gate', None) is block.router else 'router'}",
            experts={
                f"{block.name}.experts.{name}": parameter
                for name, parameter in block.experts.named_parameters()
                if parameter.shape[0] == block.gate.shape[0]
            },
            top_k=block.top_k,
        )
        for number, block in opened.blocks.items()
    }
    why = "a model folder says nothing of how it was trained"
    kinds = {opened.dtypes[name] for name, _ in opened.model.named_parameters()}
    subject = AuditedModel(
        title=f"model {folder} ({opened.architecture})",
        model=opened.model,
        layers=layers,
        tokens=drawn_tokens(opened.vocab_size, ROWS, LENGTH, "a model folder brings no text"),
        dtypes=opened.dtypes,
        training=Training(why=why),
        layer_total=opened.layers,
        opened=opened,
    )
    if any(dtype.itemsize < 4 for dtype in kinds):
        stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds))
        subject.notes.append(f"stored in {stored}; looked at in float32")
    return subject

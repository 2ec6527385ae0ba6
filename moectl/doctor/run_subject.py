"""A moectl run, opened to be looked at. Nothing is written into it, not even a bad checkpoint's new name.

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig, MoEConfig
from moectl.corpus.loader import PackedDataset, targets
from moectl.doctor.report import Finding
from moectl.doctor.subject import Audited, Layer, Losses, Route, Seen, Tokens, Training, drawn_tokens
from moectl.errors import CheckError, MoectlError, NotFoundError
from moectl.hf.folder import with_kept_router
from moectl.models.language_model import LanguageModel
from moectl.moe.losses import BALANCE_LOSSES, layer_load, merged
from moectl.routers import router_class
from moectl.runs.rundir import RunDir
from moectl.training.optim import parameter_groups
from moectl.training.routing import LOGGED, StepRouting
from moectl.training.state import Checkpoint, checkpoint_steps, load_checkpoint, step_name
from moectl.walk.data import dataset_of
from moectl.walk.loading import model_from, run_config

MAX_TOKENS = 4096
DRAWN_ROWS, DRAWN_LENGTH = 16, 64


@dataclass
class AuditedRun(Audited):
    """A run's model, with its config's own losses."""

    moe: MoEConfig | None = None

    def look(self, tokens: Tokens, mask: Tensor | None = None) -> Seen:
        model = self.model
        assert isinstance(model, LanguageModel)
        inputs: dict[int, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(_keep_input(inputs, number)) for number, layer in model.moe_layers().items()
        ]
        try:
            hidden_BSD = model.hidden_states(tokens.input_ids, tokens.doc_ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        routes, balance, dropped = {}, {}, {}
        for number, layer in model.moe_layers().items():
            out = layer.routing
            assert out is not None
            routes[number] = Route(out.topk_indices, out.topk_weights, out.keep, out.router_logits)
            load = merged(layer_load(out, layer.token_mask))
            balance[f"layer {number}"] = float(BALANCE_LOSSES["switch"].of(load).detach())
            dropped[number] = 0 if layer.dropped is None else int(layer.dropped.sum())
        return Seen(hidden_BSD.detach(), routes, inputs, balance, dropped)

    def losses(self, tokens: Tokens) -> Losses:
        model = self.model
        assert isinstance(model, LanguageModel)
        scored = int((tokens.labels >= 0).sum())
        lm = model.lm_loss_sum(tokens.input_ids, tokens.labels, tokens.doc_ids) / max(scored, 1)
        if self.moe is None:
            return Losses(lm, None, "a dense model has no balance loss")
        layers, domains = model.moe_layers(), int(tokens.domain_ids.max()) + 1
        routing = StepRouting(layers, self.moe, domains, tokens=tokens.number)
        _, parts = routing.losses(tokens.domain_ids)
        weighted = [
            routing.coefficients[name] * parts[LOGGED.get(name, name)]
            for name in self.moe.balance_loss
            if routing.coefficients[name] > 0
        ]
        if not weighted:
            return Losses(lm, None, "the config asks for none (moe.balance_loss and its coefficient)")
        return Losses(lm, torch.stack(weighted).sum())


def open_run(folder: Path, step: int | None = None) -> tuple[AuditedRun, list[Finding]]:
    """A run at its newest intact checkpoint or at ``step``, and what is wrong with its checkpoints.

    Raises:
        NotFoundError: no checkpoint yet, or none of that step (exit 4).
        CheckError: every checkpoint is damaged (exit 3).
        MoectlError: its router cannot be loaded; its config cannot be read.
    """
    run = RunDir.open(folder)
    checkpoint, damaged = _checkpoint(run, step)
    model = _model(checkpoint, run)
    config = run_config(folder)
    dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors["model"].items()}
    groups = parameter_groups(model, config.optim)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):
        model = model.float()
    subject = AuditedRun(
        title=f"run '{run.id}' ({run.status}) at step {checkpoint.step:,}",
        model=model.eval(),
        layers=_layers(model),
        tokens=_tokens(run, model, config),
        dtypes=dtypes,
        training=_training(run, checkpoint, groups, model, config),
        layer_total=model.num_layers,
        moe=model.moe,
    )
    if run.live:
        subject.notes.append("the run is being written: this is its newest checkpoint")
    return subject, damaged


def _checkpoint(run: RunDir, step: int | None) -> tuple[Checkpoint, list[Finding]]:
    """The checkpoint to look at. Unlike resuming, looking sets nothing aside."""
    steps = checkpoint_steps(run.checkpoints)
    if step is not None:
        return load_checkpoint(run.checkpoints / step_name(step), parts=("model",)), []
    if not steps:
        raise NotFoundError(
            f"the run '{run.id}' ({run.status}) has no weights yet: it stopped before its first checkpoint"
            if not run.live
            else f"the run '{run.id}' has no weights yet: it has not written its first checkpoint",
            "Wait for it." if run.live else f"Start it anew: moectl runs rm {run.id} --yes, then moectl train.",
        )
    damaged: list[Finding] = []
    for number in reversed(steps):
        try:
            return load_checkpoint(run.checkpoints / step_name(number), parts=("model",)), damaged
        except CheckError as error:
            todo = "Resuming sets it aside and goes on from an older one; put back a copy if you have one."
            damaged.append(Finding(None, "problem", None, f"checkpoint {step_name(number)}: {error.message}", todo))
    raise CheckError(
        f"no checkpoint of the run '{run.id}' is intact: {damaged[0].seen}", "Put back a copy, or start the run anew."
    )


def _model(checkpoint: Checkpoint, run: RunDir) -> LanguageModel:
    """The model; a router that is missing is named with the package that brought it."""
    described = with_kept_router(checkpoint.state["model"], run.path)
    moe = (described["decoder"] if described["kind"] == "decoder" else described)["moe"]
    if moe is not None:
        try:
            router_class(moe["router"]["name"])
        except MoectlError as error:
            code = run.record.get("router_code") or {}
            package = code.get("distribution")
            brought = f" of the package {package}" if package else f" of {code['file']}" if code.get("file") else ""
            raise error.__class__(
                f"the run '{run.id}' was trained with the router '{run.record.get('router')}'{brought},"
                f" which cannot be loaded: {error.message}",
                f"Install {package} again." if package else error.hint,
            ) from error
    return model_from(checkpoint, run.path)


def _layers(model: LanguageModel) -> dict[int, Layer]:
    names = {id(module): name for name, module in model.named_modules()}
    return {
        number: Layer(
            number=number,
            block=layer,
            router=layer.router,
            gate=layer.router.weight,
            router_name=f"{names[id(layer)]}.router",
            experts={f"{names[id(layer)]}.experts.{name}": p for name, p in layer.experts.named_parameters()},
            top_k=layer.router.top_k,
            learns=layer.router.learns,
            limited=layer.capacity is not None and layer.capacity.in_eval,
        )
        for number, layer in model.moe_layers().items()
    }


def _tokens(run: RunDir, model: LanguageModel, config: ExperimentConfig) -> Tokens:
    """Blocks of the run's own held-out text, spread over the split; random ids where the data is gone."""
    try:
        data = PackedDataset.open(dataset_of(run.record), verify=False)
        blocks = data.eval.num_blocks
        count = min(blocks, max(MAX_TOKENS // (data.manifest.block_size - 1), 1))
        if count == 0:
            raise NotFoundError("the held-out split is empty")
        batch = data.eval.batch(np.unique(np.linspace(0, blocks - 1, count).round().astype(np.int64)))
    except (NotFoundError, CheckError) as error:
        return drawn_tokens(model.vocab_size, DRAWN_ROWS, DRAWN_LENGTH, error.message)
    ids = batch.input_ids[:, :-1]
    origin = f"{ids.numel():,} held-out tokens of its own data, {data.manifest.id}"
    return Tokens(ids, targets(batch), batch.doc_ids[:, :-1], batch.domain_ids, origin, False)


def _training(
    run: RunDir, checkpoint: Checkpoint, built: list[dict[str, object]], model: LanguageModel, config: ExperimentConfig
) -> Training:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    saved = checkpoint.state.get("optimizer")
    groups = None
    if saved is not None:
        groups = [{"params": group["params"], **group["values"]} for group in saved["groups"]]
    moe = config.moe
    base = (run.record.get("base") or {}).get("kind")
    start, why = None, ""
    if checkpoint.step > 0:
        try:
            start = load_checkpoint(run.checkpoints / step_name(0), parts=("model",)).tensors["model"]
        except MoectlError as error:
            why = f"its weights at step 0 cannot be read: {error.message}"
    else:
        why = "it is at step 0: nothing has been trained"
    return Training(
        groups=groups,
        built=[{**group, "params": [names[id(p)] for p in _parameters(group)]} for group in built],
        start=start,
        step=checkpoint.step,
        copied=moe is not None and (moe.init == "copy" or (moe.init == "auto" and base in ("run", "hf"))),
        why=why,
        frozen=_frozen_by_config(model, config),
        frozen_experts={
            number: set(range(count)) - {*config.finetune.trained_experts(number, count)}
            for number, layer in model.moe_layers().items()
            for count in [layer.experts.num_experts]
        },
    )


def _parameters(group: dict[str, object]) -> list[Any]:
    return list(group["params"])  # type: ignore[call-overload]


def _keep_input(inputs: dict[int, Tensor], number: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        inputs[number] = args[0].detach()

    return hook


def _frozen_by_config(model: LanguageModel, config: ExperimentConfig) -> set[str]:
    """Parameters that are not trained because the config says so; others that are not are a finding."""
    if not config.finetune.active:
        return set()
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

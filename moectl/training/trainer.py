"""The training loop, to be read from top to bottom.

One optimizer step = ``grad_accum`` micro-batches of packed blocks. The language-model loss is a mean
over all scored tokens of the step, so that it does not depend on how the step is cut; the auxiliary
losses are added to what is differentiated and never to what is reported as the language-model loss.
Schedules are applied before a step's first batch. Balancing state moves once per optimizer step, at
the one place that says so; what mends a layer (revival, dynamic capacity) acts at checks alone.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import Batch, BlockSampler, PackedDataset, targets
from moectl.models.language_model import LanguageModel
from moectl.training import diagnose, optim, runtime, snapshot, state
from moectl.training.dynamic_capacity import DynamicCapacity
from moectl.training.gradients import group_norms
from moectl.training.interrupt import StopRequest
from moectl.training.memory import Halving, Work, explained
from moectl.training.monitor import RoutingMonitor
from moectl.training.protocol import (
    Best,
    Ending,
    Evaluate,
    Objective,
    Progress,
    RunLogger,
    TrainResult,
    language_modelling,
)
from moectl.training.rehearsal import rehearsal
from moectl.training.revival import Revival
from moectl.training.routing import StepRouting
from moectl.training.routing_metrics import step_metrics
from moectl.training.schedules import Schedules
from moectl.training.spikes import Spike, SpikeRule

OVER = ("finished", "collapsed")
HELD_OUT = ("eval/lm_loss", "eval_part/lm_loss")
"""What the best checkpoint is the best of: the first of these that an evaluation gives."""


class Trainer:
    """Trains one decoder on one prepared dataset.

    Args:
        model: dense or MoE, on any device; moved to the run's own.
        data: the prepared dataset, opened and verified.
        config: the resolved experiment.
        logger: where metrics, events and routing counts go.
        checkpoints: folder of this run's checkpoints.
        evaluate: scores the model on held-out text (pure language-model loss), or None.
        progress: called after every optimizer step, or None.
        objective: what a micro-batch is trained on, beside routing's own losses.

    Raises:
        ConfigError: the router cannot be trained, or cannot follow a schedule.
    """

    def __init__(
        self,
        model: LanguageModel,
        data: PackedDataset,
        config: ExperimentConfig,
        *,
        logger: RunLogger,
        checkpoints: Path,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
        objective: Objective = language_modelling,
    ) -> None:
        diagnose.refuse_untrainable(model, allow_noncausal=config.train.allow_noncausal)
        self.config, self.settings = config, config.train
        self.device = runtime.configure(config.train)
        self.model = model.to(self.device, runtime.parameter_dtype(config.train.precision))
        self.layers = model.moe_layers()
        self.data, self.logger, self.checkpoints = data, logger, checkpoints
        self.evaluate, self.progress, self.objective = evaluate, progress, objective
        self.optimizer = optim.build_optimizer(model, config.optim)
        self.sampler = BlockSampler(data.train.num_blocks, batch_size=config.train.batch_size, seed=config.train.seed)
        self.monitor = RoutingMonitor(self.layers, data.domains, config.train.collapse)
        self.schedules = Schedules(config, self.layers)
        self.capacity = DynamicCapacity(config.moe, self.layers)
        self.revival = Revival(config, self.layers, self.optimizer)
        self.spikes = SpikeRule(config.train.spike)
        self.spike: Spike | None = None  # of the last step
        self.scaler: torch.amp.GradScaler | None = None
        self.stop = StopRequest()
        self.step = self.tokens = 0
        self.halving = Halving(config.train, self.model, self.layers, logger)
        self.begun = False
        self.last: dict[str, float] = {}
        self.best: Best | None = None
        self.ending: Ending | None = None  # what a checkpoint of a run that is over says
        self.seconds, self.trained_tokens = 0.0, 0
        for layer in self.layers.values():
            layer.router.set_schedule(config.train.steps)
        runtime.reuse_gradient_buffers(self.layers.values())

    def train(self) -> TrainResult:
        """Run to ``train.steps``, or to the first reason to stop; a checkpoint is written either way.

        A loss or gradient that is not finite stops the run before the weights are touched; the last
        good checkpoint stays and the event names the layer that went first. Ctrl-C and SIGTERM are
        answered between two steps.

        Raises:
            RouterError: a router's first output is not what it must be; nothing has been saved then.
            ConfigError: a router is not what it declares to be; nothing has been saved then either.
            OutOfMemory: with what to change; the last checkpoint stays.
        """
        self.model.train()
        ending, self.ending = self.ending, None  # restored from a run that was over: its last words alone are missing
        saved = ending is not None
        with self.stop:
            if not self.begun:
                self._begin()
            while ending is None and self.step < self.settings.steps:
                ending = self._next_step()
            ending = ending or Ending("finished", f"all {self.settings.steps} steps done")
            if ending.status != "failed" and not saved:
                self.ending = ending if ending.status in OVER else None
                self.save()
                self.ending = None
            if ending.status in OVER and self._evaluate(final=True):  # an interrupted run stops at once
                state.keep_checkpoints(self.checkpoints, keep=self.settings.keep_checkpoints, protect=self._protected)
        self.logger.event(*ending, step=self.step, tokens=self.tokens)
        work = self.seconds, self.trained_tokens
        return TrainResult(*ending, self.step, self.tokens, dict(self.last), *work, self.best)

    def _begin(self) -> None:
        """What comes before the first step of a run, and never again."""
        self.halving.fit(self._look_at_routers, self.step + 1)
        self._evaluate(final=False)
        self.begun = True
        self.save()

    def _next_step(self) -> Ending | None:
        """One step and what is due after it; a reason to stop, if there is one."""
        started = time.perf_counter()
        metrics, problem = self.optimizer_step()
        elapsed = time.perf_counter() - started
        if problem is not None:
            self._report(metrics, self.step + 1)
            return Ending("failed", problem)
        self.seconds += elapsed
        self.trained_tokens += self._step_tokens
        if self.spike is not None and self.spike.action == "rollback":
            self._roll_back(self.spike)
            return None
        self._report(metrics | {"train/tokens_per_second": self._step_tokens / elapsed})
        return self._after_step()

    def optimizer_step(self) -> tuple[dict[str, float], str | None]:
        """One optimizer step. Returns its metrics, and what is wrong with it (then no weight has moved)."""
        scheduled = self.schedules.apply(self.step)
        work = [(batch, targets(batch)) for batch in (self._next_batch() for _ in range(self.settings.grad_accum))]
        scale = optim.learning_rate_scale(self.step, self.settings.steps, self.config.optim)
        optim.set_learning_rate(self.optimizer, scale)
        totals, routing = self.halving.fit(lambda: self._gradients(work, scheduled.lb_coef), self.step + 1)

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        metrics = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        metrics |= {"train/grad_norm": float(grad_norm), "train/lr": self.config.optim.lr * scale}
        problem = self._problem(work, metrics, grad_norm)
        if problem is not None or (self.spike is not None and self.spike.action == "rollback"):
            return metrics, problem

        log = self._due(self.settings.log_every, ahead=1)
        if log:
            metrics |= group_norms(self.optimizer.param_groups, self.layers)
        if self.spike is None or self.spike.action != "skip":
            if self.config.optim.grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.grad_clip, grad_norm)
            hint = "AdamW keeps two numbers per parameter: use a smaller model or fewer experts."
            with explained(f"moving the weights at step {self.step + 1}", hint):
                self.optimizer.step()
        self.step += 1
        self.tokens += self._step_tokens
        if routing is None:
            return metrics, None
        # What moves once per optimizer step, from the load of the whole step: noise, biases, thresholds.
        for number, layer in self.layers.items():
            layer.router.end_step(routing.steps[number].counts_E, tokens=self._routed_tokens)
        self.monitor.add(routing, self._routed_tokens)
        if log:
            metrics |= step_metrics(routing) | scheduled.metrics()
        return metrics, None

    def _gradients(self, work: Work, lb_coef: float) -> tuple[dict[str, Tensor], StepRouting | None]:
        """The step's gradients; its losses by metric name, and its routing."""
        scored_tokens = max(sum(int((labels >= 0).sum()) for _, labels in work), 1)
        work = self.halving.cut(work)
        routing = self._new_step_routing(lb_coef)
        self.optimizer.zero_grad(set_to_none=True)
        if routing is not None and routing.two_passes:
            self._count([batch for batch, _ in work], routing)
        totals: dict[str, Tensor] = {}
        for batch, labels in work:
            loss, parts = self._micro_batch(batch, labels, scored_tokens, routing)
            loss.backward()
            for name, part in {"train/loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + part.detach().double()
        return totals, routing

    def _problem(self, work: Work, metrics: dict[str, float], grad_norm: Tensor) -> str | None:
        """Why this step must not move the weights: a number that is not finite, or one spike too many."""
        batches = [batch for batch, _ in self.halving.cut(work)]
        problem = diagnose.not_finite(self.model, batches, metrics["train/loss"], grad_norm, self.settings.precision)
        if problem is not None:
            self.logger.event("not_finite", problem, step=self.step + 1)
            return problem
        self.spike = spike = self.spikes.look(self.step + 1, metrics["train/lm_loss"])
        if spike is None or spike.action == "rollback":
            return None
        self.logger.event("loss_spike", str(spike), step=self.step + 1, **spike.details())
        return str(spike) if spike.action == "fail" else None

    def _micro_batch(
        self, batch: Batch, labels: Tensor, scored_tokens: int, routing: StepRouting | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the step's loss, and what it is made of, by metric name and unweighted."""
        with runtime.precision_context(self.settings.precision, self.device):
            sums = self.objective(self.model, batch, labels)
        loss = sums.total / scored_tokens
        parts = {"train/lm_loss": sums.lm / scored_tokens}
        parts |= {f"train/{name}_loss": value / scored_tokens for name, value in sums.parts.items()}
        if routing is None:
            return loss, parts
        auxiliary, losses = routing.losses(batch.domain_ids)
        return loss + auxiliary, parts | {f"train/{name}_loss": value for name, value in losses.items()}

    def _count(self, batches: list[Batch], routing: StepRouting) -> None:
        """The first of two passes over a step's batches; the second draws the same noise and takes the same routes."""
        with rehearsal(self.model):
            for batch in batches:
                self._forward(batch)
                routing.count()

    def _look_at_routers(self) -> None:
        """Run the first blocks once, as in training, so that a router that does not work is told before all else."""
        if not self.layers:
            return
        self.schedules.apply(self.step)
        blocks = range(min(self.halving.blocks, self.data.train.num_blocks))
        with rehearsal(self.model):
            self._forward(self._to_device(self.data.train.batch(blocks)))
            for number, layer in self.layers.items():
                diagnose.refuse_false_claims(number, layer.router)

    def _forward(self, batch: Batch) -> None:
        """Through all layers, as :meth:`_micro_batch` does it."""
        with runtime.precision_context(self.settings.precision, self.device):
            self.model.hidden_states(batch.input_ids[:, :-1], batch.doc_ids[:, :-1])

    def _after_step(self) -> Ending | None:
        """Checks, evaluation and checkpoints that are due; a reason to stop, if there is one."""
        if self.layers and self._due(self.settings.check_every):
            collapsed, counts = self._check_routing()
            if collapsed is not None and self.settings.early_stop:
                return Ending("collapsed", collapsed)
            if self.step < self.settings.steps:
                self._mend(counts)
        if self.step == self.settings.steps:
            return None
        improved = self._due(self.settings.eval_every) and self._evaluate(final=False)
        if self.stop.reason is not None:
            return Ending("interrupted", f"{self.stop.reason} after step {self.step}")
        if improved or self.halving.unsaved or self._due(self.settings.checkpoint_every):
            self.save()
        return None

    def _check_routing(self) -> tuple[str | None, dict[int, Tensor]]:
        """Record what was counted since the last check: the first collapse, if any, and the counts by layer."""
        check = self.monitor.check()
        self.logger.routing(self.step, check.payload)
        for finding in check.findings:
            kind = "collapse" if finding.collapsed else "imbalance"
            details = {"layer": finding.layer, "expert": finding.expert, "taxon": finding.kind}
            self.logger.event(kind, str(finding), step=self.step, **details)
        for large in check.large_logits:
            self.logger.event("router_logits", str(large), step=self.step, layer=large.layer)
        return next((str(finding) for finding in check.findings if finding.collapsed), None), check.counts

    def _mend(self, counts: dict[int, Tensor]) -> None:
        """Start dead experts anew and move capacities, from the load since the last check; each change is an event."""
        for revived in self.revival.check(counts, self.step):
            self.monitor.pairs.forget(revived.layer, (revived.expert,))
            self.logger.event("revived", str(revived), step=self.step, **revived.details())
        for change in self.capacity.check(counts):
            self.logger.event("capacity", str(change), step=self.step, **change.details())

    def _evaluate(self, *, final: bool) -> bool:
        """Whether the held-out loss is the lowest so far."""
        if self.evaluate is None:
            return False
        with self.schedules.as_configured(), explained("evaluating", "Lower eval.batch_size."):
            values = dict(self.evaluate(self.model, final))
        self.last |= values
        self.logger.log(self.step, self.tokens, values)
        metric = next((name for name in HELD_OUT if name in values), None)
        if metric is None or not self.settings.keep_best or not math.isfinite(values[metric]):
            return False
        if self.best is not None and (self.best.metric != metric or values[metric] >= self.best.value):
            return False
        self.best = Best(metric, values[metric], self.step)
        return True

    def _roll_back(self, spike: Spike) -> None:
        """To the newest checkpoint, but with the data that comes next: the same step meets other tokens.

        The record is wound back, too, and a checkpoint is written, so that a resumed run is past it.
        """
        ahead = self.sampler.position, self.spikes.used, self.halving.pieces
        checkpoint, _, messages = state.newest_usable(self.checkpoints, self.restore)
        self.sampler.position, self.spikes.used, self.halving.pieces = ahead
        self.spikes.clean = 0
        self.logger.rewind(self.step, checkpoint.state["record"])
        for message in messages:
            self.logger.event("bad_checkpoint", message, step=self.step)
        self.logger.event("loss_spike", f"{spike}: step {self.step}", step=self.step, **spike.details())
        self.save()

    def _report(self, metrics: dict[str, float], failed_step: int | None = None) -> None:
        self.last |= metrics
        if failed_step is not None or self._due(self.settings.log_every):
            self.logger.log(failed_step or self.step, self.tokens, metrics)
        if self.progress is not None:
            self.progress(self.step, self.last)

    def save(self) -> Path:
        """Write a checkpoint: everything that the next step depends on. Step 0 and the best are kept for good.

        Raises:
            MoectlError: weights are not finite (the last good checkpoint stays), or the disk is full.
        """
        parts, saved = snapshot.pack(self)
        keep = self.settings.keep_checkpoints
        path = state.save_checkpoint(self.checkpoints, self.step, parts, saved, keep=keep, protect=self._protected)
        self.halving.unsaved = False
        return path

    def restore(self, checkpoint: state.Checkpoint) -> None:
        """Continue exactly where ``checkpoint`` was written.

        Raises:
            ConfigError: it belongs to another configuration or dataset.
            CheckError: a part, key or value is missing, unexpected or of the wrong shape. Nothing of the run
                should be used then, but that another checkpoint is restored over it.
        """
        snapshot.unpack(self, checkpoint)
        self.begun = True

    @property
    def _protected(self) -> set[int]:
        return {0} if self.best is None else {0, self.best.step}

    @property
    def _step_tokens(self) -> int:
        """Tokens per optimizer step: whole blocks, the same for every preset."""
        return self.settings.batch_size * self.settings.grad_accum * self.data.manifest.block_size

    @property
    def _routed_tokens(self) -> int:
        """Tokens that pass the routers in a step: the last of each block is only a target."""
        return self.settings.batch_size * self.settings.grad_accum * (self.data.manifest.block_size - 1)

    def _due(self, every: int, *, ahead: int = 0) -> bool:
        """Whether something is due after so many steps more than are done."""
        step = self.step + ahead
        return step % every == 0 or step == self.settings.steps

    def _next_batch(self) -> Batch:
        return self._to_device(self.data.train.batch(self.sampler.next()))

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _new_step_routing(self, lb_coef: float) -> StepRouting | None:
        if not self.layers:
            return None
        assert self.config.moe is not None
        domains = len(self.data.domains)
        pairs = self._due(self.settings.check_every, ahead=1)
        tokens = self._routed_tokens
        return StepRouting(self.layers, self.config.moe, domains, tokens=tokens, lb_coef=lb_coef, pairs=pairs)

"""The training loop, to be read from top to bottom.

One optimizer step = ``grad_accum`` micro-batches of packed blocks, whose gradients :mod:`moectl.training.step`
makes. Schedules are applied before a step's first batch. Balancing state moves once per optimizer step, at the one
place that says so; what mends a layer (revival, dynamic capacity) acts at checks alone. The host waits for the
device once per step, for the step's losses and gradient norm together, and otherwise only where something is logged,
checked, evaluated or saved.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import BlockSampler, PackedDataset
from moectl.models.language_model import LanguageModel
from moectl.training import diagnose, finetune, optim, runtime, snapshot, state
from moectl.training.compiled import Compiled
from moectl.training.dynamic_capacity import DynamicCapacity
from moectl.training.gradients import group_norms
from moectl.training.interrupt import StopRequest
from moectl.training.memory import Halving, Work, explained
from moectl.training.monitor import RoutingMonitor
from moectl.training.precision import Precision
from moectl.training.prefetch import Loader
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
from moectl.training.step import GradientPass
from moectl.training.timing import Clock, Yardstick
from moectl.training.writer import BackgroundWriter, copied

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
        yardstick: what the run's speed is measured against, or None.

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
        yardstick: Yardstick | None = None,
    ) -> None:
        diagnose.refuse_untrainable(model, allow_noncausal=config.train.allow_noncausal)
        self.config, self.settings = config, config.train
        self.device = runtime.configure(config.train)
        self.precision = Precision(config.train.precision, self.device)
        summed = config.train.grad_accum > 1 or config.train.halve_on_oom
        self.model = self.precision.place(model, accumulated=summed)
        self.model.checkpoint_activations(config.train.activation_checkpointing)
        self.layers = model.moe_layers()
        self.data, self.logger, self.checkpoints = data, logger, checkpoints
        self.evaluate, self.progress = evaluate, progress
        self.compiled = Compiled(objective, config.train.compile_backend, logger) if config.train.compile else None
        self.optimizer = optim.build_optimizer(model, config.optim)
        self.frozen = finetune.FrozenRows(self.layers, config.finetune, self.optimizer)
        self.sampler = BlockSampler(data.train.num_blocks, batch_size=config.train.batch_size, seed=config.train.seed)
        self.loader = Loader(data.train, self.sampler, self.device, ahead=config.train.prefetch)
        self.monitor = RoutingMonitor(self.layers, data.domains, config.train.collapse)
        self.schedules = Schedules(config, self.layers)
        self.capacity = DynamicCapacity(config.moe, self.layers)
        self.revival = Revival(config, self.layers, self.optimizer)
        self.spikes = SpikeRule(config.train.spike)
        self.spike: Spike | None = None  # of the last step
        self.stop = StopRequest()
        self.step = self.tokens = 0
        self.halving = Halving(config.train, self.model, self.layers, logger)
        self.clock, self.writer = Clock(self.device, yardstick), BackgroundWriter()
        self.gradients = GradientPass(
            model, self.compiled or objective, precision=self.precision, halving=self.halving, clock=self.clock
        )
        self.begun = False
        self.last: dict[str, float] = {}
        self.best: Best | None = None
        self.ending: Ending | None = None  # what a checkpoint of a run that is over says
        for layer in self.layers.values():
            layer.router.set_schedule(config.train.steps)
        runtime.reuse_gradient_buffers(self.layers.values())
        self.unsaved = snapshot.unsaved_buffers(self.model)

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
        with self.stop, self.loader, self.writer:
            if not self.begun:
                self._begin()
            while ending is None and self.step < self.settings.steps:
                ending = self._next_step()
            ending = ending or Ending("finished", f"all {self.settings.steps} steps done")
            if ending.status != "failed" and not saved:
                self.ending = ending if ending.status in OVER else None
                self.save()
                self.ending = None
            if ending.status in OVER:  # an interrupted run stops at once
                self._evaluate(final=True)
                state.keep_checkpoints(self.checkpoints, keep=self.settings.keep_checkpoints, protect=self._protected)
        self.logger.event(*ending, step=self.step, tokens=self.tokens)
        work, speed = (self.clock.seconds, self.clock.tokens), self.clock.speed(self.precision.name, self.compiled)
        return TrainResult(*ending, self.step, self.tokens, dict(self.last), *work, self.best, speed)

    def _begin(self) -> None:
        """What comes before the first step of a run, and never again."""
        if self.precision.warning is not None:
            self.logger.event("precision", self.precision.warning, step=self.step)
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
        rate = self.clock.stepped(self.step_tokens, elapsed)
        if self.spike is not None and self.spike.action == "rollback":
            self._roll_back(self.spike)
            return None
        if self.compiled is not None:
            self.compiled.stepped(self.step)
        self._report(metrics | rate)
        return self._after_step()

    def optimizer_step(self) -> tuple[dict[str, float], str | None]:
        """One optimizer step. Returns its metrics, and what is wrong with it (then no weight has moved)."""
        scheduled = self.schedules.apply(self.step)
        scale = optim.learning_rate_scale(self.step, self.settings.steps, self.config.optim)
        optim.set_learning_rate(self.optimizer, scale)
        with self.clock.part("data"):
            taken = [self.loader.next() for _ in range(self.settings.grad_accum)]
        work, scored = [(each.batch, each.labels) for each in taken], sum(each.scored for each in taken)
        new_routing = partial(self._new_step_routing, scheduled.lb_coef)
        totals, routing = self.halving.fit(
            lambda: self.gradients(work, scored, new_routing, self.step + 1), self.step + 1
        )

        self.precision.unscale(self.optimizer)
        self.frozen.clear_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        numbers = torch.stack([*totals.values(), grad_norm.double()]).tolist()  # here the host waits for the device
        metrics = dict(zip((*totals, "train/grad_norm"), numbers, strict=True))
        metrics["train/lr"] = self.config.optim.lr * scale
        problem, moves = self._judge(work, metrics)
        if problem is not None or (self.spike is not None and self.spike.action == "rollback"):
            return metrics, problem

        log = self._due(self.settings.log_every, ahead=1)
        if log:
            metrics |= group_norms(self.optimizer.param_groups, self.layers)
        if moves:
            hint = "The optimizer keeps two numbers per parameter: use a smaller model or fewer experts."
            with self.clock.part("optimizer"), explained(f"moving the weights at step {self.step + 1}", hint):
                clip = self.config.optim.grad_clip
                if clip is not None and metrics["train/grad_norm"] > 0.999 * clip:  # else it would multiply by 1
                    torch.nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
                self.optimizer.step()
        self.step += 1
        self.tokens += self.step_tokens
        if routing is None:
            return metrics, None
        # What moves once per optimizer step, from the load of the whole step: noise, biases, thresholds.
        for number, layer in self.layers.items():
            layer.router.end_step(routing.steps[number].counts_E, tokens=self._routed_tokens)
        self.monitor.add(routing, self._routed_tokens)
        if log:
            metrics |= step_metrics(routing) | scheduled.metrics()
        return metrics, None

    def _judge(self, work: Work, metrics: dict[str, float]) -> tuple[str | None, bool]:
        """Why the run ends here: a number that is not finite, or one spike too many. And whether weights may move."""
        self.spike = None
        loss, grad_norm = metrics["train/loss"], metrics["train/grad_norm"]
        if math.isfinite(loss) and not math.isfinite(grad_norm):
            scale = self.precision.overflowed()
            if scale is not None:
                said = f"the gradient overflowed in float16: the step moves no weight, the loss scale is {scale:g} now"
                self.logger.event("overflow", said, step=self.step + 1, scale=scale)
                return None, False
        batches = [batch for batch, _ in self.halving.cut(work)]
        problem = diagnose.not_finite(self.model, batches, loss, grad_norm, context=self.precision.context())
        if problem is not None:
            self.logger.event("not_finite", problem, step=self.step + 1)
            return problem, False
        self.precision.fine()
        self.spike = spike = self.spikes.look(self.step + 1, metrics["train/lm_loss"])
        if spike is None or spike.action == "rollback":
            return None, spike is None
        self.logger.event("loss_spike", str(spike), step=self.step + 1, **spike.details())
        return str(spike) if spike.action == "fail" else None, spike.action != "skip"

    def _look_at_routers(self) -> None:
        """Run the first blocks once, as in training, so that a router that does not work is told before all else."""
        if not self.layers:
            return
        self.schedules.apply(self.step)
        blocks = range(min(self.halving.blocks, self.data.train.num_blocks))
        with rehearsal(self.model):
            self.gradients.forward(self.loader.at(blocks))
            for number, layer in self.layers.items():
                diagnose.refuse_false_claims(number, layer.router)

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
            self.save(background=self.settings.async_checkpoint)
        return None

    def _check_routing(self) -> tuple[str | None, dict[int, Tensor]]:
        """Record what was counted since the last check: the first collapse, if any, and the counts by layer."""
        check = self.monitor.check()
        self.logger.routing(self.step, check.payload)
        for kind, said, details in check.events():
            self.logger.event(kind, said, step=self.step, **details)
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
        explanation = explained("evaluating", "Lower eval.batch_size.")
        with self.schedules.as_configured(), explanation, self.clock.part("evaluation"):
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
        self.writer.wait()
        ahead = self.sampler.position, self.spikes.used, self.spikes.furthest, self.halving.pieces
        checkpoint, _, messages = state.newest_usable(self.checkpoints, self.restore)
        self.sampler.position, self.spikes.used, self.spikes.furthest, self.halving.pieces = ahead
        self.spikes.clean = 0
        self.logger.rewind(self.step, checkpoint.state["record"])
        for message in messages:
            self.logger.event("bad_checkpoint", message, at=self.step)
        self.logger.event("loss_spike", f"{spike}: step {self.step}", step=self.step, **spike.details())
        self.save()

    def _report(self, metrics: dict[str, float], failed_step: int | None = None) -> None:
        log = failed_step is not None or self._due(self.settings.log_every)
        if log:
            metrics |= self.clock.lap()
        self.last |= metrics
        if log:
            self.logger.log(failed_step or self.step, self.tokens, metrics)
        if self.progress is not None:
            self.progress(self.step, self.last)

    def save(self, *, background: bool = False) -> Path:
        """Write a checkpoint: everything that the next step depends on. Step 0 and the best are kept for good.

        Args:
            background: return once all of it is copied, and write it while training goes on.

        Raises:
            MoectlError: weights are not finite (the last good checkpoint stays), or the disk is full, now or when
                the one before was written.
        """
        with self.clock.part("checkpoint"):
            self.writer.wait()
            parts, saved = snapshot.pack(self)
            keep, protect = self.settings.keep_checkpoints, self._protected
            parts = copied(parts) if background else parts
            write = partial(
                state.save_checkpoint, self.checkpoints, self.step, parts, saved, keep=keep, protect=protect
            )
            if background:
                self.writer.start(write)
            else:
                write()
        self.halving.unsaved = False
        return self.checkpoints / state.step_name(self.step)

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
    def step_tokens(self) -> int:
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

    def _new_step_routing(self, lb_coef: float) -> StepRouting | None:
        if not self.layers:
            return None
        assert self.config.moe is not None
        domains = len(self.data.domains)
        pairs = self._due(self.settings.check_every, ahead=1)
        tokens = self._routed_tokens
        return StepRouting(self.layers, self.config.moe, domains, tokens=tokens, lb_coef=lb_coef, pairs=pairs)

"""The training loop, to be read from top to bottom.

One optimizer step = ``grad_accum`` micro-batches of packed blocks. The language-model loss is a mean
over all scored tokens of the step, so that it does not depend on how the step is cut; the auxiliary
losses are added to what is differentiated and never to what is reported as the language-model loss.
Schedules are applied before a step's first batch. Balancing state moves once per optimizer step, at
the one place that says so; what mends a layer (revival, dynamic capacity) acts at checks alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import Batch, BlockSampler, PackedDataset, targets
from moectl.errors import ConfigError
from moectl.models.decoder import Decoder
from moectl.training import diagnose, optim, optim_state, rng, runtime, state
from moectl.training.dynamic_capacity import DynamicCapacity
from moectl.training.interrupt import StopRequest
from moectl.training.monitor import RoutingMonitor
from moectl.training.protocol import Evaluate, Progress, RunLogger, Status, TrainResult
from moectl.training.rehearsal import rehearsal
from moectl.training.revival import Revival
from moectl.training.routing import StepRouting
from moectl.training.routing_metrics import step_metrics
from moectl.training.schedules import Schedules


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

    Raises:
        ConfigError: the router cannot be trained, or cannot follow a schedule.
    """

    def __init__(
        self,
        model: Decoder,
        data: PackedDataset,
        config: ExperimentConfig,
        *,
        logger: RunLogger,
        checkpoints: Path,
        evaluate: Evaluate | None = None,
        progress: Progress | None = None,
    ) -> None:
        diagnose.refuse_untrainable(model, allow_noncausal=config.train.allow_noncausal)
        self.config, self.settings = config, config.train
        self.device = runtime.configure(config.train)
        self.model = model.to(self.device, runtime.parameter_dtype(config.train.precision))
        self.layers = model.moe_layers()
        self.data, self.logger, self.checkpoints = data, logger, checkpoints
        self.evaluate, self.progress = evaluate, progress
        self.optimizer = optim.build_optimizer(model, config.optim)
        self.sampler = BlockSampler(data.train.num_blocks, batch_size=config.train.batch_size, seed=config.train.seed)
        self.monitor = RoutingMonitor(self.layers, data.domains, config.train.collapse)
        self.schedules = Schedules(config, self.layers)
        self.capacity = DynamicCapacity(config.moe, self.layers)
        self.revival = Revival(config, self.layers, self.optimizer)
        self.stop = StopRequest()
        self.step = self.tokens = 0
        self.last: dict[str, float] = {}
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
        """
        self.model.train()
        seconds, first_token = 0.0, self.tokens
        ending: tuple[Status, str] | None = None
        with self.stop:
            if self.step == 0:
                self._look_at_routers()
                self._evaluate(final=False)
                self.save()
            while ending is None and self.step < self.settings.steps:
                started = time.perf_counter()
                metrics, problem = self.optimizer_step()
                elapsed = time.perf_counter() - started
                if problem is not None:
                    self._report(metrics, self.step + 1)
                    ending = "failed", problem
                    break
                seconds += elapsed
                self._report(metrics | {"train/tokens_per_second": self._step_tokens / elapsed})
                ending = self._after_step()
            status, reason = ending or ("finished", f"all {self.settings.steps} steps done")
            if status != "failed":
                self.save()
            if status in ("finished", "collapsed"):  # an interrupted run stops at once
                self._evaluate(final=True)
        self.logger.event(status, reason, step=self.step, tokens=self.tokens)
        return TrainResult(status, reason, self.step, self.tokens, dict(self.last), seconds, self.tokens - first_token)

    def optimizer_step(self) -> tuple[dict[str, float], str | None]:
        """One optimizer step. Returns its metrics, and what was not finite (then no weight has moved)."""
        scheduled = self.schedules.apply(self.step)
        batches = [self._next_batch() for _ in range(self.settings.grad_accum)]
        labels = [targets(batch) for batch in batches]
        scored_tokens = max(sum(int((label >= 0).sum()) for label in labels), 1)
        routing = self._new_step_routing(scheduled.lb_coef)

        scale = optim.learning_rate_scale(self.step, self.settings.steps, self.config.optim)
        optim.set_learning_rate(self.optimizer, scale)
        self.optimizer.zero_grad(set_to_none=True)
        if routing is not None and routing.two_passes:
            self._count(batches, routing)
        totals: dict[str, Tensor] = {}
        for batch, label in zip(batches, labels, strict=True):
            loss, parts = self._micro_batch(batch, label, scored_tokens, routing)
            loss.backward()
            for name, part in {"train/loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0.0) + part.detach().double()

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        metrics = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        metrics |= {"train/grad_norm": float(grad_norm), "train/lr": self.config.optim.lr * scale}
        problem = diagnose.not_finite(self.model, batches, metrics["train/loss"], grad_norm, self.settings.precision)
        if problem is not None:
            self.logger.event("not_finite", problem, step=self.step + 1)
            return metrics, problem

        if self.config.optim.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.grad_clip, grad_norm)
        self.optimizer.step()
        self.step += 1
        self.tokens += self._step_tokens
        if routing is None:
            return metrics, None
        # What moves once per optimizer step, from the load of the whole step: noise, biases, thresholds.
        for number, layer in self.layers.items():
            layer.router.end_step(routing.steps[number].counts_E, tokens=self._routed_tokens)
        self.monitor.add(routing, self._routed_tokens)
        if self._due(self.settings.log_every):
            metrics |= step_metrics(routing) | scheduled.metrics()
        return metrics, None

    def _micro_batch(
        self, batch: Batch, labels: Tensor, scored_tokens: int, routing: StepRouting | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the step's loss, and what it is made of, by metric name and unweighted."""
        with runtime.precision_context(self.settings.precision, self.device):
            lm = self.model.lm_loss_sum(batch.input_ids[:, :-1], labels, batch.doc_ids[:, :-1]) / scored_tokens
        parts = {"train/lm_loss": lm}
        if routing is None:
            return lm, parts
        auxiliary, losses = routing.losses(batch.domain_ids)
        return lm + auxiliary, parts | {f"train/{name}_loss": value for name, value in losses.items()}

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
        blocks = range(min(self.settings.batch_size, self.data.train.num_blocks))
        with rehearsal(self.model):
            self._forward(self._to_device(self.data.train.batch(blocks)))
            for number, layer in self.layers.items():
                diagnose.refuse_false_claims(number, layer.router)

    def _forward(self, batch: Batch) -> None:
        """Through all layers, as :meth:`_micro_batch` does it."""
        with runtime.precision_context(self.settings.precision, self.device):
            self.model.hidden_states(batch.input_ids[:, :-1], batch.doc_ids[:, :-1])

    def _after_step(self) -> tuple[Status, str] | None:
        """Checks, evaluation and checkpoints that are due; a reason to stop, if there is one."""
        if self.layers and self._due(self.settings.check_every):
            collapsed, counts = self._check_routing()
            if collapsed is not None and self.settings.early_stop:
                return "collapsed", collapsed
            if self.step < self.settings.steps:
                self._mend(counts)
        if self.step == self.settings.steps:
            return None
        if self._due(self.settings.eval_every):
            self._evaluate(final=False)
        if self.stop.reason is not None:
            return "interrupted", f"{self.stop.reason} after step {self.step}"
        if self._due(self.settings.checkpoint_every):
            self.save()
        return None

    def _check_routing(self) -> tuple[str | None, dict[int, Tensor]]:
        """Record what was counted since the last check: the first collapse, if any, and the counts by layer."""
        check = self.monitor.check()
        self.logger.routing(self.step, check.payload)
        for finding in check.findings:
            kind = "collapse" if finding.collapsed else "imbalance"
            self.logger.event(kind, str(finding), step=self.step, layer=finding.layer, expert=finding.expert)
        for large in check.large_logits:
            self.logger.event("router_logits", str(large), step=self.step, layer=large.layer)
        return next((str(finding) for finding in check.findings if finding.collapsed), None), check.counts

    def _mend(self, counts: dict[int, Tensor]) -> None:
        """Start dead experts anew and move capacities, from the load since the last check; each change is an event."""
        for revived in self.revival.check(counts, self.step):
            self.logger.event("revived", str(revived), step=self.step, **revived.details())
        for change in self.capacity.check(counts):
            self.logger.event("capacity", str(change), step=self.step, **change.details())

    def _evaluate(self, *, final: bool) -> None:
        if self.evaluate is None:
            return
        with self.schedules.as_configured():
            values = dict(self.evaluate(self.model, final))
        self.last |= values
        self.logger.log(self.step, self.tokens, values)

    def _report(self, metrics: dict[str, float], failed_step: int | None = None) -> None:
        self.last |= metrics
        if failed_step is not None or self._due(self.settings.log_every):
            self.logger.log(failed_step or self.step, self.tokens, metrics)
        if self.progress is not None:
            self.progress(self.step, self.last)

    def save(self) -> Path:
        """Write a checkpoint: everything that the next step depends on. Step 0 is kept for good.

        Raises:
            MoectlError: weights are not finite (the last good checkpoint stays), or the disk is full.
        """
        diagnose.refuse_not_finite(self.model, self.step)
        optimizer_tensors, optimizer_state = optim_state.pack_optimizer(self.optimizer, self._named_parameters)
        parts: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors,
            "rng": rng.rng_state(),
            "routing": self.monitor.tensors(),
        }
        saved = {
            "step": self.step,
            "tokens": self.tokens,
            "sampler": self.sampler.state_dict(),
            "monitor": self.monitor.state_dict(),
            "capacity": self.capacity.state_dict(),
            "last": self.last,
            "optimizer": optimizer_state,
            "decoder": self.model.config.to_dict(),
            "config_hash": self.config.content_hash(),
            "data_id": self.data.manifest.id,
        }
        keep = self.settings.keep_checkpoints
        return state.save_checkpoint(self.checkpoints, self.step, parts, saved, keep=keep, protect=(0,))

    def restore(self, checkpoint: state.Checkpoint) -> None:
        """Continue exactly where ``checkpoint`` was written.

        Raises:
            ConfigError: it belongs to another configuration or dataset.
            MoectlError: a key is missing, unexpected or of the wrong shape.
        """
        saved, tensors = checkpoint.state, checkpoint.tensors
        for key, ours in (("config_hash", self.config.content_hash()), ("data_id", self.data.manifest.id)):
            if saved[key] != ours:
                raise ConfigError(
                    f"the checkpoint {checkpoint.folder.name} was made with another {key.split('_')[0]}",
                    "Resume with the run's own config and data, or start a new run.",
                )
        state.load_model_strict(self.model, tensors["model"])
        optim_state.unpack_optimizer(self.optimizer, self._named_parameters, tensors["optimizer"], saved["optimizer"])
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.sampler.load_state_dict(saved["sampler"])
        self.monitor.load(saved["monitor"], tensors["routing"])
        self.capacity.load_state_dict(saved["capacity"])
        self.last = dict(saved["last"])
        rng.restore_rng(tensors["rng"])

    @property
    def _named_parameters(self) -> list[tuple[str, Any]]:
        return list(self.model.named_parameters())

    @property
    def _step_tokens(self) -> int:
        """Tokens per optimizer step: whole blocks, the same for every preset."""
        return self.settings.batch_size * self.settings.grad_accum * self.data.manifest.block_size

    @property
    def _routed_tokens(self) -> int:
        """Tokens that pass the routers in a step: the last of each block is only a target."""
        return self.settings.batch_size * self.settings.grad_accum * (self.data.manifest.block_size - 1)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _next_batch(self) -> Batch:
        return self._to_device(self.data.train.batch(self.sampler.next()))

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _new_step_routing(self, lb_coef: float) -> StepRouting | None:
        if not self.layers:
            return None
        assert self.config.moe is not None
        domains = len(self.data.domains)
        return StepRouting(self.layers, self.config.moe, domains, tokens=self._routed_tokens, lb_coef=lb_coef)

"""The training loop, to be read from top to bottom.

One optimizer step = ``grad_accum`` micro-batches of packed blocks. The language-model loss is a mean
over all scored tokens of the step, so that it does not depend on how the step is cut; the auxiliary
losses are added to what is differentiated and never to what is reported as the language-model loss.
Balancing state moves once per optimizer step, at the one place that says so.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.corpus.loader import Batch, BlockSampler, PackedDataset, targets
from moectl.errors import ConfigError
from moectl.models.decoder import Decoder
from moectl.moe.stats import collapse_value
from moectl.training import diagnose, optim, optim_state, rng, runtime, state
from moectl.training.collapse import CollapseDetector
from moectl.training.protocol import Evaluate, Progress, RunLogger, TrainResult
from moectl.training.routing import StepRouting


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
        ConfigError: the dataset has fewer blocks than a micro-batch, or the router cannot be trained.
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
        self.config, self.train_config = config, config.train
        self.device = runtime.configure(config.train)
        self.model = model.to(self.device, runtime.parameter_dtype(config.train.precision))
        self.layers = model.moe_layers()
        self.data, self.logger, self.checkpoints = data, logger, checkpoints
        self.evaluate, self.progress = evaluate, progress
        self.optimizer = optim.build_optimizer(model, config.optim)
        self.sampler = BlockSampler(data.train.num_blocks, batch_size=config.train.batch_size, seed=config.train.seed)
        self.collapse = CollapseDetector(config.train.collapse)
        self.step = self.tokens = 0
        self.since_check = {n: torch.zeros(self._count_shape(n), dtype=torch.int64) for n in self.layers}
        self.tokens_since_check = 0
        self.last: dict[str, float] = {}
        self._stop_signal: str | None = None
        self._refuse_untrainable()
        for layer in self.layers.values():
            layer.router.set_schedule(config.train.steps)

    def train(self) -> TrainResult:
        """Run to ``train.steps``, or to the first reason to stop; a checkpoint is written either way.

        A loss or gradient that is not finite stops the run before the weights are touched; the last
        good checkpoint stays and the event names the layer that went first.
        """
        self.model.train()
        seconds, first_token = 0.0, self.tokens
        if self.step == 0:
            self.save()
            self._evaluate()
        result: TrainResult | None = None
        with self._stop_on_signal():
            while result is None and self.step < self.train_config.steps:
                started = time.perf_counter()
                metrics, problem = self.optimizer_step()
                elapsed = time.perf_counter() - started
                seconds += elapsed
                if problem is not None:
                    result = self._result("failed", problem)
                    break
                metrics["train/tokens_per_second"] = self._step_tokens() / elapsed
                self._report(metrics)
                result = self._after_step()
        result = result or self._result("finished", f"all {self.train_config.steps} steps done")
        if result.status != "failed":
            self._finish(result)
        self.logger.event(result.status, result.reason, step=self.step, tokens=self.tokens)
        return TrainResult(
            result.status,
            result.reason,
            self.step,
            self.tokens,
            dict(self.last),
            seconds,
            self.tokens - first_token,
        )

    def optimizer_step(self) -> tuple[dict[str, float], str | None]:
        """One optimizer step. Returns its metrics, and what was not finite (then no weight has moved)."""
        batches = [self._to_device(self.data.train.batch(self.sampler.next())) for _ in range(self._accum)]
        labels = [targets(batch) for batch in batches]
        scored_tokens = sum(int((label >= 0).sum()) for label in labels)
        routing = self._new_step_routing()
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, lm, lb, z

        scale = optim.learning_rate_scale(self.step, self.train_config.steps, self.config.optim)
        optim.set_learning_rate(self.optimizer, scale)
        self.optimizer.zero_grad(set_to_none=True)
        for batch, label in zip(batches, labels, strict=True):
            losses = self._micro_batch(batch, label, scored_tokens, routing)
            losses[0].backward()
            totals += torch.stack([loss.detach().double() for loss in losses])

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        max_norm = self.config.optim.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        names = ("train/loss", "train/lm_loss", "train/lb_loss", "train/z_loss")
        metrics = (
            dict(zip(names, totals.tolist(), strict=True))
            if routing
            else dict(zip(names[:2], totals.tolist()[:2], strict=True))
        )
        metrics |= {"train/grad_norm": float(grad_norm), "train/lr": self.config.optim.lr * scale}
        problem = diagnose.not_finite(self.model, batches, metrics["train/loss"], grad_norm)
        if problem is not None:
            self.logger.event("not_finite", problem, step=self.step + 1)
            return metrics, problem

        self.optimizer.step()
        self.step += 1
        self.tokens += self._step_tokens()
        if routing is not None:
            self._after_optimizer_step(routing)
            if self._due(self.train_config.log_every):
                metrics |= routing.metrics()
        return metrics, None

    def _micro_batch(
        self, batch: Batch, labels: Tensor, scored_tokens: int, routing: StepRouting | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This micro-batch's part of the step's total, language-model, balance and z-loss."""
        with runtime.precision_context(self.train_config.precision, self.device):
            lm_sum = self.model.lm_loss_sum(batch.input_ids[:, :-1], labels, batch.doc_ids[:, :-1])
        lm = lm_sum / max(scored_tokens, 1)
        if routing is None:
            return lm, lm, lm.new_zeros(()), lm.new_zeros(())
        share = 1.0 / self._accum  # packed blocks: every micro-batch has the same number of tokens
        domain_T = batch.domain_ids.repeat_interleave(labels.shape[1])
        balance, z_loss = routing.losses(domain_T, share)
        balance, z_loss = balance * share, z_loss * share
        moe = routing.moe
        return lm + moe.lb_coef * balance + moe.z_coef * z_loss, lm, balance, z_loss

    def _after_optimizer_step(self, routing: StepRouting) -> None:
        """What moves once per optimizer step, from the load of the whole step: noise, balancing biases."""
        for number, layer in self.layers.items():
            step = routing.steps[number]
            layer.router.after_step(step.counts_E)
            self.since_check[number] += step.counts_NE.cpu()
        self.tokens_since_check += self._routed_tokens()

    def _after_step(self) -> TrainResult | None:
        """Checks, evaluation and checkpoints that are due; a reason to stop, if there is one."""
        collapsed = self._check_collapse() if self.layers and self._due(self.train_config.check_every) else None
        last_step = self.step == self.train_config.steps
        if self._due(self.train_config.eval_every) and not last_step:
            self._evaluate()
        if self._due(self.train_config.checkpoint_every) and not last_step:
            self.save()
        if collapsed is not None and self.train_config.early_stop:
            return self._result("collapsed", collapsed)
        if self._stop_signal is not None and not last_step:
            return self._result("interrupted", f"{self._stop_signal} after step {self.step}")
        return None

    def _check_collapse(self) -> str | None:
        """Record the counts since the last check and look at each layer; the first collapse, if any."""
        top_k = next(iter(self.layers.values())).router.top_k
        counts = {n: domains_NE.sum(0) for n, domains_NE in self.since_check.items()}
        findings = self.collapse.check(counts, self.tokens_since_check, top_k)
        self.logger.routing(
            self.step,
            {
                "tokens": self.tokens_since_check,
                "domains": list(self.data.domains),
                "layers": {str(n): {"counts": domains.tolist()} for n, domains in self.since_check.items()},
            },
        )
        for finding in findings:
            kind = "collapse" if finding.collapsed else "imbalance"
            self.logger.event(kind, str(finding), step=self.step, layer=finding.layer, expert=finding.expert)
        for counts_NE in self.since_check.values():
            counts_NE.zero_()
        self.tokens_since_check = 0
        return next((str(finding) for finding in findings if finding.collapsed), None)

    def _evaluate(self, *, final: bool = False) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        values = dict(self.evaluate(self.model, final))
        self.model.train()
        self.last |= values
        self.logger.log(self.step, self.tokens, values)

    def _finish(self, result: TrainResult) -> None:
        """The final evaluation and checkpoint; an interrupted run is saved only, to stop at once."""
        if result.status != "interrupted":
            self._evaluate(final=True)
        self.save()

    def save(self) -> Path:
        """Write a checkpoint: everything that the next step depends on. Step 0 is kept for good.

        Raises:
            MoectlError: weights are not finite (the last good checkpoint stays), or the disk is full.
        """
        diagnose.refuse_not_finite(self.model, self.step)
        tensors, optimizer_state = optim_state.pack_optimizer(self.optimizer, list(self.model.named_parameters()))
        counts = {f"layer.{n}": counts_NE for n, counts_NE in self.since_check.items()}
        parts: dict[str, dict[str, Tensor]] = {
            "model": self.model.state_dict(),
            "optimizer": tensors,
            "rng": rng.rng_state(),
        }
        if counts:
            parts["routing"] = counts
        return state.save_checkpoint(
            self.checkpoints,
            self.step,
            parts,
            self._state() | {"optimizer": optimizer_state},
            keep=self.train_config.keep_checkpoints,
            protect=(0,),
        )

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "sampler": self.sampler.state_dict(),
            "collapse": self.collapse.state_dict(),
            "tokens_since_check": self.tokens_since_check,
            "last": self.last,
            "decoder": self.model.config.to_dict(),
            "config_hash": self.config.content_hash(),
            "data_id": self.data.manifest.id,
        }

    def restore(self, checkpoint: state.Checkpoint) -> None:
        """Continue exactly where ``checkpoint`` was written.

        Raises:
            ConfigError: it belongs to another configuration or dataset.
            MoectlError: a key is missing, unexpected or of the wrong shape.
        """
        saved = checkpoint.state
        for key, ours in (("config_hash", self.config.content_hash()), ("data_id", self.data.manifest.id)):
            if saved[key] != ours:
                raise ConfigError(
                    f"the checkpoint {checkpoint.folder.name} was made with another {key.split('_')[0]}",
                    "Resume with the run's own config and data, or start a new run.",
                )
        state.load_model_strict(self.model, checkpoint.tensors["model"])
        named = list(self.model.named_parameters())
        optim_state.unpack_optimizer(self.optimizer, named, checkpoint.tensors["optimizer"], saved["optimizer"])
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.sampler.load_state_dict(saved["sampler"])
        self.collapse.load_state_dict(saved["collapse"])
        self.tokens_since_check = saved["tokens_since_check"]
        self.last = dict(saved["last"])
        for number, counts_NE in self.since_check.items():
            counts_NE.copy_(checkpoint.tensors["routing"][f"layer.{number}"])
        rng.restore_rng(checkpoint.tensors["rng"])

    @property
    def _accum(self) -> int:
        return self.train_config.grad_accum

    def _step_tokens(self) -> int:
        """Tokens per optimizer step: whole blocks, the same for every preset."""
        return self.train_config.batch_size * self._accum * self.data.manifest.block_size

    def _routed_tokens(self) -> int:
        """Tokens that pass the routers in a step: the last of each block is only a target."""
        return self.train_config.batch_size * self._accum * (self.data.manifest.block_size - 1)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.train_config.steps

    def _count_shape(self, layer: int) -> tuple[int, int]:
        return len(self.data.domains), self.layers[layer].router.num_experts

    def _new_step_routing(self) -> StepRouting | None:
        if not self.layers:
            return None
        assert self.config.moe is not None
        return StepRouting(self.layers, self.config.moe, len(self.data.domains))

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def _report(self, metrics: dict[str, float]) -> None:
        self.last |= metrics
        if self._due(self.train_config.log_every):
            self.logger.log(self.step, self.tokens, metrics)
        if self.progress is not None:
            self.progress(self.step, self.last)

    def _result(self, status: Any, reason: str) -> TrainResult:
        return TrainResult(status, reason, self.step, self.tokens)

    def _refuse_untrainable(self) -> None:
        for number, layer in self.layers.items():
            problem = layer.router.training_problem()
            if problem is not None:
                raise ConfigError(f"the router of layer {number} cannot be trained: {problem}")

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step under way; a second one ends it at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self._stop_signal is not None:
                raise KeyboardInterrupt
            self._stop_signal = f"stopped by {signal.Signals(number).name}"

        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = [signal.signal(number, handle) for number in numbers]
        except ValueError:  # not the main thread: signals are somebody else's business
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def balance_scale(layers: Sequence[Any]) -> tuple[float, float]:
    """What a balance number is read against: its balanced value, 1.0, and its collapse value, E/k."""
    router = layers[0].router
    return 1.0, collapse_value(router.num_experts, router.top_k)

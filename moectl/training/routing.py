"""Routing over one optimizer step: counts of the global batch, balance losses, and what gets logged.

Shape suffixes: B batch rows, E experts, N domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.moe.layer import MoELayer
from moectl.moe.losses import BALANCE_LOSSES, LayerLoad, layer_load, masked_mean, merged, router_z_loss
from moectl.training.pairs import chosen_together
from moectl.training.schedules import balance_coefficient

#: What a loss is called in the log, where that is not its own name: ``train/lb_loss``.
LOGGED = {"switch": "lb"}


class LoadSum:
    """Loads of several micro-batches as one: counts, and probabilities and entropies weighted by real tokens."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.probs_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, load: LayerLoad) -> None:
        """Add one micro-batch."""
        self.counts_E += load.counts
        self.probs_E += load.tokens * load.probs.detach().double()
        self.entropy += load.tokens * load.entropy.detach().double()
        self.tokens += load.tokens

    def load(self) -> LayerLoad:
        """All of it, in float64 and without gradient."""
        tokens = self.tokens.clamp(min=1)
        return LayerLoad(self.counts_E, self.probs_E / tokens, self.entropy / tokens, self.tokens)


class LayerStep:
    """One layer's routing during one optimizer step.

    Attributes:
        done: the load of the micro-batches so far.
        whole: that of the whole step, counted in a pass of its own; None with running counts.
        counts_NE: assignments so far, by domain and expert.
        trained: each balance loss as it was trained on, averaged over the micro-batches so far.
        logit_abs: mean |logit| of the micro-batches so far, summed over their tokens.
        dropped: assignments lost to capacity so far; None without one.
        together_EE: tokens so far that chose both of two experts; None where nobody asked.
    """

    def __init__(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        self.done = LoadSum(num_experts, device)
        self.whole: LoadSum | None = None
        self.counts_NE = torch.zeros(num_domains, num_experts, dtype=torch.int64, device=device)
        self.trained: dict[str, Tensor] = {}
        self.logit_abs = torch.zeros((), dtype=torch.float64, device=device)
        self.dropped: Tensor | None = None
        self.together_EE: Tensor | None = None

    @property
    def counts_E(self) -> Tensor:
        return self.done.counts_E

    def value(self, name: str) -> float:
        """The balance loss ``name`` of the whole step, exactly."""
        return float(BALANCE_LOSSES[name].of(self.done.load()))


class StepRouting:
    """Collects every MoE layer's routing over the micro-batches of one optimizer step.

    Each micro-batch weighs by its real tokens, so that padding and an uneven cut change nothing.

    Args:
        layers: MoE layers by layer number.
        moe: balance losses, their scope and coefficients.
        num_domains: ``N``.
        tokens: real tokens of the whole step.
        lb_coef: of the Switch loss at this step; None for the config's.
        pairs: count which experts are chosen together, too, where a token has several.
    """

    def __init__(
        self,
        layers: Mapping[int, MoELayer],
        moe: MoEConfig,
        num_domains: int,
        *,
        tokens: int,
        lb_coef: float | None = None,
        pairs: bool = False,
    ) -> None:
        self.layers, self.moe, self.tokens, self.pairs = layers, moe, tokens, pairs
        switch = balance_coefficient(moe, layers) if lb_coef is None else lb_coef
        self.coefficients = {"switch": switch, "cv2": moe.cv2_coef, "entropy": moe.entropy_coef}
        self.steps = {
            number: LayerStep(num_domains, layer.router.num_experts, layer.router.weight.device)
            for number, layer in layers.items()
        }

    @property
    def two_passes(self) -> bool:
        """Whether :meth:`count` wants to see every micro-batch before the first :meth:`losses`."""
        return self.moe.balance_exact and any(BALANCE_LOSSES[name].from_load for name in self.moe.balance_loss)

    @torch.no_grad()
    def count(self) -> None:
        """First of two passes: add the micro-batch just run to the totals that every loss of the step will use.

        Losses and gradients then do not depend on how the step is cut into micro-batches: shares and
        mean probabilities are those of the whole step, of which each micro-batch differentiates its
        own part. (With a capacity, or under expert choice, they do depend on it, for an expert's room is
        that of one call; and with noise, for another cut draws other noise.)
        """
        for number, layer in self.layers.items():
            step = self.steps[number]
            if step.whole is None:
                step.whole = LoadSum(layer.router.num_experts, layer.router.weight.device)
            step.whole.add(merged(_rows(layer, 1)))

    def losses(self, domain_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Auxiliary losses of the micro-batch just run: what is differentiated, and its parts for the log.

        Each is a mean over layers, times this micro-batch's share of the step's real tokens, so that
        the step's value is their sum; the first carries the coefficients, the parts do not.

        Args:
            domain_ids: ``[B]``, the domain of each row.

        Returns:
            ``Σ coefficient · loss``, and the losses by their name in the log (``lb``, ``cv2``, ``entropy``, ``z``).
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self.moe.balance_loss, "z")}
        for number, layer in self.layers.items():
            rows = _rows(layer, domain_ids.numel())
            here = merged(rows)
            share = here.tokens.double() / self.tokens
            self._record(self.steps[number], layer, rows, here, domain_ids)
            for name, value in self._balance(self.steps[number], rows, here).items():
                parts[name].append(share.to(value.dtype) * value)
            assert layer.routing is not None
            z_loss = router_z_loss(layer.routing.router_logits, layer.token_mask)
            parts["z"].append(share.to(z_loss.dtype) * z_loss)
        means = {name: torch.stack(values).mean() for name, values in parts.items()}
        coefficients = {**self.coefficients, "z": self.moe.z_coef}
        total = torch.stack([coefficients[name] * mean for name, mean in means.items()]).sum()
        return total, {LOGGED.get(name, name): mean for name, mean in means.items()}

    def _balance(self, step: LayerStep, rows: LayerLoad, here: LayerLoad) -> dict[str, Tensor]:
        """Each balance loss of one layer, over the tokens that the scope names."""
        if self.moe.balance_scope == "global":
            seen = (step.whole or step.done).load()
            here = here._replace(counts=seen.counts, pooled=seen.probs)
        values: dict[str, Tensor] = {}
        for name in self.moe.balance_loss:
            if self.moe.balance_scope == "sequence":
                # DeepSeek-V3 (arXiv:2412.19437, eq. 17-20): shares and probabilities within each row, then averaged.
                per_row = BALANCE_LOSSES[name].of(rows)
                values[name] = (per_row * rows.tokens.to(per_row.dtype)).sum() / here.tokens.clamp(min=1)
            else:
                values[name] = BALANCE_LOSSES[name].of(here)
            share = here.tokens.double() / self.tokens
            step.trained[name] = step.trained.get(name, 0.0) + share * values[name].detach().double()
        return values

    @torch.no_grad()
    def _record(self, step: LayerStep, layer: MoELayer, rows: LayerLoad, here: LayerLoad, domain_ids: Tensor) -> None:
        """Add one micro-batch to what was done so far."""
        assert layer.routing is not None
        step.done.add(here)
        step.counts_NE.index_add_(0, domain_ids, rows.counts)
        mean = masked_mean(layer.routing.router_logits.detach().abs().mean(-1), layer.token_mask)
        step.logit_abs += here.tokens * mean.double()
        if layer.dropped is not None:
            lost = layer.dropped.sum()
            step.dropped = lost if step.dropped is None else step.dropped + lost
        if self.pairs and layer.router.slots > 1:
            both_EE = chosen_together(layer.routing, layer.router.num_experts, layer.token_mask)
            step.together_EE = both_EE if step.together_EE is None else step.together_EE + both_EE


def _rows(layer: MoELayer, rows: int) -> LayerLoad:
    """The layer's last call, by row of the batch."""
    assert layer.routing is not None, "the model was not run"
    return layer_load(layer.routing, layer.token_mask, groups=rows)

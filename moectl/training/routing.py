"""Routing over one optimizer step: counts of the global batch, balance losses, and what gets logged.

Shape suffixes: T tokens, E experts, K experts per token, N domains.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.moe import stats
from moectl.moe.layer import MoELayer
from moectl.moe.losses import load_balancing_loss, masked_mean, router_z_loss
from moectl.moe.types import RouterOutput


class LayerStep:
    """One layer's routing during one optimizer step.

    ``counts_NE`` are assignments by domain and expert; ``balance_used`` is what the running counts
    gave, weighted over the micro-batches, to compare with the exact value over the whole step.
    """

    def __init__(self, num_domains: int, num_experts: int, device: torch.device) -> None:
        self.counts_NE = torch.zeros(num_domains, num_experts, dtype=torch.int64, device=device)
        self.probs_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.balance_used = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def counts_E(self) -> Tensor:
        return self.counts_NE.sum(0)

    def balance(self) -> float:
        """The exact Switch value of the whole step: ``E · Σ f · P``."""
        return stats.balance_value(self.counts_E, self.probs_E)


class StepRouting:
    """Collects every MoE layer's routing over the micro-batches of one optimizer step.

    Args:
        layers: MoE layers by layer number.
        moe: loss weights and balance scope.
        num_domains: ``N``.
    """

    def __init__(self, layers: Mapping[int, MoELayer], moe: MoEConfig, num_domains: int) -> None:
        self.layers = layers
        self.moe = moe
        self.steps = {
            number: LayerStep(num_domains, layer.router.num_experts, layer.router.weight.device)
            for number, layer in layers.items()
        }

    def losses(self, domain_T: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Balance loss and z-loss of the micro-batch just run, each a mean over layers, unweighted.

        With ``balance_scope: global`` the shares ``f`` come from all micro-batches of the step so far
        (running counts); with ``micro`` from this one alone.

        Args:
            domain_T: the domain of each token.
            share: this micro-batch's part of the step's tokens.
        """
        balances, z_losses = [], []
        for number, layer in self.layers.items():
            routing = layer.routing
            assert routing is not None, "the model was not run"
            counts_E = self._record(self.steps[number], routing, layer.token_mask, domain_T, share)
            balance = load_balancing_loss(
                routing.router_probs,
                routing.topk_indices,
                counts_E.numel(),
                layer.token_mask,
                counts=counts_E,
            )
            self.steps[number].balance_used += share * balance.detach()
            balances.append(balance)
            z_losses.append(router_z_loss(routing.router_logits, layer.token_mask))
        return torch.stack(balances).mean(), torch.stack(z_losses).mean()

    def _record(
        self, step: LayerStep, routing: RouterOutput, mask_T: Tensor | None, domain_T: Tensor, share: float
    ) -> Tensor:
        """Add one micro-batch and return the counts ``[E]`` that its balance loss uses."""
        num_experts = step.probs_E.numel()
        cell_TK = domain_T[:, None] * num_experts + routing.topk_indices
        micro_NE = stats.expert_counts(cell_TK, step.counts_NE.numel(), keep=routing.keep).view_as(step.counts_NE)
        step.counts_NE += micro_NE
        step.probs_E += share * masked_mean(routing.router_probs.detach(), mask_T)
        step.entropy += share * masked_mean(routing.entropy.detach(), mask_T)
        return step.counts_E if self.moe.balance_scope == "global" else micro_NE.sum(0)

    def metrics(self) -> dict[str, float]:
        """Per layer, and the worst layer; balance is 1.0 when balanced and E/k at collapse."""
        values: dict[str, float] = {}
        for number, step in self.steps.items():
            values[f"balance/layer.{number}"] = step.balance()
            values[f"max_share/layer.{number}"] = stats.max_share(step.counts_E)
            values[f"load_cv/layer.{number}"] = stats.load_cv(step.counts_E)
            values[f"entropy/layer.{number}"] = float(step.entropy)
        values["balance/worst"] = max(step.balance() for step in self.steps.values())
        values["balance/collapse_value"] = max(
            stats.collapse_value(layer.router.num_experts, layer.router.top_k) for layer in self.layers.values()
        )
        values["balance/running_deviation"] = max(
            abs(float(step.balance_used) - step.balance()) for step in self.steps.values()
        )
        return values

"""Collapse detection, per layer and never over a mean of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moectl.config.guards import CollapseConfig
from moectl.errors import CheckError
from moectl.moe.stats import shares
from moectl.training.pairs import Pair


@dataclass(frozen=True)
class Finding:
    """One layer's trouble at one check.

    Attributes:
        layer: layer number.
        kind: ``dominance`` (one expert takes too many tokens), ``starvation`` (one gets almost none), or of a pair
            of experts that are one: ``together`` (always chosen for the same tokens), ``alike`` (the same weights).
        expert: the expert; the first of a pair.
        share: of tokens for dominance, of assignments for starvation; of the tokens that chose either expert of
            a pair those that chose both; the cosine of their weights.
        balanced: what dominance or starvation would be under an even load; of a pair the bound it is over.
        in_a_row: consecutive checks at which this layer was in trouble, this one included.
        collapsed: whether that makes it a collapse.
    """

    layer: int
    kind: str
    expert: int
    share: float
    balanced: float
    in_a_row: int
    collapsed: bool
    other: int | None = None
    """The second expert of a pair."""

    def __str__(self) -> str:
        if self.other is not None:
            return f"{self._head()}: {self._pair()}; {self._row()})"
        verb = "takes" if self.kind == "dominance" else "gets only"
        unit, worst = ("tokens", 1) if self.kind == "dominance" else ("assignments", 0)
        return (
            f"{self._head()}: expert {self.expert} {verb} {self.share:.1%} of {unit}"
            f" ({self.balanced:.1%} balanced, {worst:.0%} at worst; {self._row()})"
        )

    def _head(self) -> str:
        return f"layer {self.layer} {'collapsed' if self.collapsed else 'warning'}"

    def _row(self) -> str:
        return "1 check" if self.in_a_row == 1 else f"{self.in_a_row} checks in a row"

    def _pair(self) -> str:
        experts = f"experts {self.expert} and {self.other}"
        if self.kind == "together":
            return f"{experts} share {self.share:.1%} of the tokens of either (bound {self.balanced:.0%}"
        return f"{experts} have grown alike, weight cosine {self.share:.4f} (bound {self.balanced:g}"


class CollapseDetector:
    """Looks at each layer's counts since the last check; ``patience`` bad checks in a row are a collapse.

    Args:
        config: what is trouble, and for how long.
        layers: numbers of the layers.
    """

    def __init__(self, config: CollapseConfig, layers: Iterable[int] = ()) -> None:
        self.config = config
        self.in_a_row: dict[int, int] = dict.fromkeys(layers, 0)

    def check(
        self,
        counts: Mapping[int, Tensor],
        tokens: int,
        experts_choose: Collection[int] = (),
        *,
        pairs: Mapping[int, Pair] | None = None,
    ) -> list[Finding]:
        """Findings of this check, one per layer in trouble, worst layer first. A layer's load goes before its pairs.

        Args:
            counts: per layer ``[E]`` assignments since the last check.
            tokens: real tokens since the last check.
            experts_choose: layers whose experts choose their tokens. There no expert can dominate.
            pairs: per layer the pair of experts that are one.
        """
        findings = []
        for layer, counts_E in counts.items():
            pair = (pairs or {}).get(layer)
            trouble = self._trouble(counts_E, tokens, layer not in experts_choose)
            self.in_a_row[layer] = row = self.in_a_row.get(layer, 0) + 1 if trouble or pair else 0
            collapsed = row >= self.config.patience
            if trouble:
                findings.append(Finding(layer, *trouble, row, collapsed))
            elif pair:
                bound = self.config.max_together if pair.why == "together" else self.config.max_cosine
                findings.append(Finding(layer, pair.why, pair.first, pair.value, bound, row, collapsed, pair.second))
        return sorted(findings, key=lambda finding: (finding.in_a_row, finding.share), reverse=True)

    def _trouble(self, counts_E: Tensor, tokens: int, tokens_choose: bool) -> tuple[str, int, float, float] | None:
        num_experts, total = counts_E.numel(), int(counts_E.sum())
        if total == 0:
            return None
        of_tokens = counts_E.double() / max(tokens, 1)
        # With many experts per token (a dense phase of a schedule for k) an even load is as high: no sign. Halfway from
        # there to all tokens is one, which k = E never comes to. From the counts: k may have changed since.
        even = total / max(tokens, 1) / num_experts
        bound = self.config.max_share if even < self.config.max_share else (1 + even) / 2
        if tokens_choose and float(of_tokens.max()) > bound:
            return "dominance", int(of_tokens.argmax()), float(of_tokens.max()), even
        share_E = shares(counts_E)
        starved = float(share_E.min()) < self.config.min_share_of_uniform / num_experts
        if starved and total / num_experts >= self.config.min_expected_count:
            return "starvation", int(share_E.argmin()), float(share_E.min()), 1 / num_experts
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": {str(layer): row for layer, row in self.in_a_row.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's counts. Raises CheckError where they are not of these layers."""
        found = {int(layer): int(row) for layer, row in state["in_a_row"].items()}
        if found.keys() != self.in_a_row.keys():
            raise CheckError(
                f"the checkpoint counts bad checks of the layers {[*found]}, this run has {[*self.in_a_row]}"
            )
        self.in_a_row = found

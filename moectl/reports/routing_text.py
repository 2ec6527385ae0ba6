"""Generated text, each token in the colour of its expert; or with a mark behind it, where there is no colour.

Shape suffix: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moectl.models.generation import Said, Visit

#: Backgrounds of a terminal's 256 colours, light enough for black letters; neighbours are far apart.
BACKGROUNDS = (117, 215, 156, 218, 228, 147, 210, 115, 252, 180, 189, 121, 223, 183, 151, 174)
_STYLES = ("", "4;", "1;", "3;")  # plain, underlined, bold, italic: for more experts than backgrounds
_RESET = "\x1b[0m"


@dataclass(frozen=True)
class LayerSummary:
    """One layer's routing of the generated tokens.

    Attributes:
        shares: ``[E]``: of the visits, which an even load would give each 1/E.
        entropy: of the clean probabilities, nats, mean over tokens; NaN for no tokens.
        tokens: counted.
    """

    layer: int
    shares: tuple[float, ...]
    entropy: float
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "num_experts": len(self.shares),
            "shares": list(self.shares),
            "even_share": 1 / len(self.shares),
            "entropy": self.entropy,
            "uniform_entropy": math.log(len(self.shares)),
            "tokens": self.tokens,
        }


def summarize(said: Sequence[Said], num_experts: Mapping[int, int]) -> list[LayerSummary]:
    """What each layer did with the generated tokens, in order of depth."""
    found = []
    for layer, count in num_experts.items():
        visits = [each.visits[layer] for each in said if layer in each.visits]
        taken = [expert for visit in visits for expert in visit.experts]
        shares = tuple(taken.count(expert) / len(taken) if taken else math.nan for expert in range(count))
        entropy = sum(visit.entropy for visit in visits) / len(visits) if visits else math.nan
        found.append(LayerSummary(layer, shares, entropy, len(visits)))
    return found


def painted(text: str, visits: Sequence[Visit | None], *, colour: bool) -> str:
    """A piece of text in the colour of its last token's first expert.

    Args:
        text: of one token, or of several that make a character together.
        visits: of these tokens; None where a token was not routed.
        colour: False: marks such as ``[e3]``, all experts of a token joined by ``+``, tokens by a comma.
    """
    known = [visit for visit in visits if visit is not None and visit.experts]
    if not known or not text:
        return text
    if not colour:
        return f"{text}[{','.join('+'.join(f'e{expert}' for expert in visit.experts) for visit in known)}]"
    code = style_of(known[-1].experts[0])
    # A background that runs on over a line's end paints the rest of the terminal's line.
    return "\n".join(f"\x1b[{code}m{line}{_RESET}" if line else "" for line in text.split("\n"))


def style_of(expert: int) -> str:
    """The terminal's code for an expert: black on a background of its own."""
    return f"{_STYLES[expert // len(BACKGROUNDS) % len(_STYLES)]}30;48;5;{BACKGROUNDS[expert % len(BACKGROUNDS)]}"


def legend(layer: int, num_experts: int, *, colour: bool) -> str:
    """What colours or marks mean."""
    if not colour:
        return f"layer {layer}: [e0] to [e{num_experts - 1}] behind each token, the heaviest first"
    shown = " ".join(f"\x1b[{style_of(expert)}m e{expert} {_RESET}" for expert in range(num_experts))
    return f"layer {layer}: {shown}"


def summary_rows(summaries: Sequence[LayerSummary]) -> list[list[str]]:
    """For a table: layer, each expert's share with the even one beside, entropy with the uniform one beside."""
    rows = []
    for summary in summaries:
        count = len(summary.shares)
        shares = " ".join(f"e{expert} {_percent(share)}" for expert, share in enumerate(summary.shares))
        rows.append(
            [
                str(summary.layer),
                shares,
                f"{100 / count:.1f}",
                "–" if math.isnan(summary.entropy) else f"{summary.entropy:.3f} of {math.log(count):.3f}",
                f"{summary.tokens:,}",
            ]
        )
    return rows


SUMMARY_COLUMNS = ("layer", "share of visits, %", "1/E, %", "entropy, nats", "tokens")


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}"

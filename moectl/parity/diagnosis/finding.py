"""A mistake that was found, and why it is believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Mistakes that explain a difference; several are told together where they have the same effect here.

    Attributes:
        codes: of the catalogue, empty for a mistake that has no entry.
        title: what is wrong.
        evidence: what was computed, and how well it agrees.
        tensor: the first that differed because of it.
        hypotheses: their names.
    """

    codes: tuple[str, ...]
    title: str
    evidence: str
    tensor: str
    hypotheses: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        code = self.codes[0] if self.codes else None
        return {
            "code": code,
            "codes": list(self.codes),
            "title": self.title,
            "evidence": self.evidence,
            "tensor": self.tensor,
            "hypotheses": list(self.hypotheses),
        }

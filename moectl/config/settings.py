"""The ground of every config section, and the kinds of numbers that its keys take."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of every section: unknown keys refused, immutable, hashed by content."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def content_hash(self) -> str:
        """SHA-256 over the canonical JSON of all values (hex, 64 characters)."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

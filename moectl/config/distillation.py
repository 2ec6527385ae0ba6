"""What a run learns from a teacher: which one, and how much of the loss."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moectl.config.settings import Positive, Settings


class DistillConfig(Settings):
    """``alpha · T² · KL(teacher_T ‖ student_T) + (1 - alpha) · LM loss``, both at temperature T (arXiv 1503.02531)."""

    teacher: str = Field(description="a finished run: id, name, prefix or folder")
    temperature: Positive = Field(2.0, description="both distributions are softened by it; the term is scaled by T²")
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="share of the teacher in the loss; the rest is the LM loss"
    )

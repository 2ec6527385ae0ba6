"""The tables of the registry (SQLAlchemy 2, typed). Their schema is made by the migrations alone.

A float column cannot hold NaN in SQLite (it becomes NULL), so every number has a kind beside it.
"""

from __future__ import annotations

import math

from sqlalchemy import CheckConstraint, Double, ForeignKey, Index, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

KINDS = ("finite", "nan", "+inf", "-inf")
_VALUES = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}


class Base(DeclarativeBase):
    # Names for all constraints: batch migrations find them by name.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Run(Base):
    """One run folder as it was when last read. ``record`` is its run.json, whole."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    status: Mapped[str]
    preset: Mapped[str | None]
    router: Mapped[str | None]
    seed: Mapped[int | None]
    commit: Mapped[str | None]
    config_hash: Mapped[str | None]
    data_id: Mapped[str | None]
    created: Mapped[str]
    record: Mapped[str] = mapped_column(Text)
    # How far the index has read: the state of run.json, and the bytes of metrics.jsonl.
    signature: Mapped[str]
    generation: Mapped[str]
    metrics_end: Mapped[int] = mapped_column(default=0)

    __table_args__ = (Index(None, "created"), Index(None, "config_hash"))


class Metric(Base):
    """One number of one log call."""

    __tablename__ = "metrics"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    name: Mapped[str]
    step: Mapped[int]
    tokens: Mapped[int]
    time: Mapped[float] = mapped_column(Double)
    value: Mapped[float | None] = mapped_column(Double)
    kind: Mapped[str]

    __table_args__ = (
        CheckConstraint("kind IN ('finite', 'nan', '+inf', '-inf')", name="kind"),
        CheckConstraint("(kind = 'finite') = (value IS NOT NULL)", name="value"),
        Index(None, "run_id", "name", "step"),
    )


def to_columns(value: float) -> tuple[float | None, str]:
    """A number as (value, kind).

    >>> to_columns(math.nan), to_columns(-math.inf), to_columns(0.5)
    ((None, 'nan'), (None, '-inf'), (0.5, 'finite'))
    """
    if math.isnan(value):
        return None, "nan"
    if math.isinf(value):
        return None, "+inf" if value > 0 else "-inf"
    return value, "finite"


def from_columns(value: float | None, kind: str) -> float:
    """The inverse of ``to_columns``."""
    return _VALUES[kind] if value is None else value

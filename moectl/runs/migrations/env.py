"""Runs the migrations on the connection that ``runs.database`` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from moectl.runs.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
    transactional_ddl=True,  # it can, once the driver's own transaction handling is off
)
with context.begin_transaction():
    context.run_migrations()

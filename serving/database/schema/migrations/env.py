"""Alembic's entry point; `calotype.serving.database.schema.upgrade` hands in the connection."""

from __future__ import annotations

from alembic import context

from calotype.serving.database.schema.training_tables import metadata


def run() -> None:
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()


run()

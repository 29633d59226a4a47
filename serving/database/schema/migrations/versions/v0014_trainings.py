"""Trainings, and what they told on their way."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision: str | None = "0013"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "trainings",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("team_id", sa.String(64), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("api_key_id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(253), nullable=False),
        sa.Column("name", sa.String(253), nullable=False),
        sa.Column("dataset_id", sa.String(64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("wanted", sa.String(16), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("checkpoints", sa.JSON(), nullable=False),
        sa.Column("samples", sa.JSON(), nullable=False),
        sa.Column("acceptance", sa.JSON()),
        sa.Column("promoted", sa.Float()),
        sa.Column("adapter_file_id", sa.String(64)),
        sa.Column("report_file_id", sa.String(64)),
        sa.Column("adapter_sha256", sa.String(64)),
        sa.Column("error", sa.JSON()),
        sa.Column("device_seconds", sa.Float(), nullable=False),
        sa.Column("price", sa.Float(), nullable=False),
        sa.Column("budget_seconds", sa.Float()),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("leased_until", sa.Float()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("started", sa.Float()),
        sa.Column("ended", sa.Float()),
    )
    op.create_index("ix_trainings_team_id_created", "trainings", ["team_id", "created"])
    op.create_index("ix_trainings_status", "trainings", ["status"])
    op.create_table(
        "training_events",
        sa.Column("training_id", sa.String(64), sa.ForeignKey("trainings.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("training_events")
    op.drop_table("trainings")

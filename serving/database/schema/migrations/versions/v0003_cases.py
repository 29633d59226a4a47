"""Appeals against refusals and reports of misuse."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "cases",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("team_id", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("held_by", sa.String(255)),
        sa.Column("held_until", sa.Float()),
        sa.Column("note", sa.Text()),
        sa.Column("decided", sa.Float()),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name="fk_cases_team_id"),
        sa.PrimaryKeyConstraint("id", name="pk_cases"),
    )
    op.create_index("ix_cases_status_created", "cases", ["status", "created"])
    op.create_index("ix_cases_team_id_subject", "cases", ["team_id", "subject"])


def downgrade() -> None:
    op.drop_index("ix_cases_team_id_subject", "cases")
    op.drop_index("ix_cases_status_created", "cases")
    op.drop_table("cases")

"""Pictures that wait for a person."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "held_pictures",
        sa.Column("asset_id", sa.String(64), nullable=False),
        sa.Column("case_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("team_id", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("blob_key", sa.String(512), nullable=False),
        sa.Column("seal", sa.String(64), nullable=False),
        sa.Column("content_type", sa.String(64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["case_id"], ["cases.id"], name="fk_held_pictures_case_id"),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name="fk_held_pictures_team_id"),
        sa.PrimaryKeyConstraint("asset_id", name="pk_held_pictures"),
    )
    op.create_index("ix_held_pictures_blob_key", "held_pictures", ["blob_key"])
    op.create_index("ix_held_pictures_expires", "held_pictures", ["expires"])


def downgrade() -> None:
    op.drop_index("ix_held_pictures_expires", "held_pictures")
    op.drop_index("ix_held_pictures_blob_key", "held_pictures")
    op.drop_table("held_pictures")

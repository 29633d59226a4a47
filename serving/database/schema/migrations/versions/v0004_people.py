"""What people did, what they took down, and what stored pictures are recognised by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "people_log",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(128), nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_people_log"),
    )
    op.create_table(
        "taken_down",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("pdq", sa.String(64)),
        sa.Column("payload", sa.String(12)),
        sa.Column("category", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_taken_down"),
    )
    op.create_table(
        "picture_index",
        sa.Column("asset_id", sa.String(64), nullable=False),
        sa.Column("pdq", sa.String(64)),
        sa.Column("payload", sa.String(12)),
        sa.ForeignKeyConstraint(
            ["asset_id"], ["assets.id"], name="fk_picture_index_asset_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("asset_id", name="pk_picture_index"),
    )
    op.create_index("ix_picture_index_payload", "picture_index", ["payload"])


def downgrade() -> None:
    op.drop_index("ix_picture_index_payload", "picture_index")
    op.drop_table("picture_index")
    op.drop_table("taken_down")
    op.drop_table("people_log")

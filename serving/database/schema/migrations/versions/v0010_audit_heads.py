"""Signed heads of audit logs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision: str | None = "0009"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("log", sa.String(255), nullable=False),
        sa.Column("lines", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("signature", sa.String(128)),
        sa.Column("key", sa.String(64)),
        sa.PrimaryKeyConstraint("log", "lines", name="pk_audit_heads"),
    )
    op.create_index("ix_audit_heads_signature", "audit_heads", ["signature"])


def downgrade() -> None:
    op.drop_index("ix_audit_heads_signature", "audit_heads")
    op.drop_table("audit_heads")

"""Whose moderators write an audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision: str | None = "0011"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("audit_heads", sa.Column("model", sa.String(255)))


def downgrade() -> None:
    op.drop_column("audit_heads", "model")

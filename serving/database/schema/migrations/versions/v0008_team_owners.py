"""The Team object that a team belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision: str | None = "0007"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("teams", sa.Column("namespace", sa.String(255)))
    op.add_column("teams", sa.Column("uid", sa.String(64)))


def downgrade() -> None:
    op.drop_column("teams", "uid")
    op.drop_column("teams", "namespace")

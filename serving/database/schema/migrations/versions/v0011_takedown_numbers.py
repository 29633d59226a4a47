"""Numbers of takedowns, by which it is told what a picture was checked after."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision: str | None = "0010"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("taken_down", sa.Column("number", sa.Integer()))


def downgrade() -> None:
    op.drop_column("taken_down", "number")

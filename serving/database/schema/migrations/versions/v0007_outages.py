"""What jobs wait for while a part is away, and the device time that was measured so far."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("outage", sa.JSON(none_as_null=True)))
    measured = sa.Column("gpu_seconds", sa.Float(), nullable=False, server_default="0")
    op.add_column("jobs", measured)


def downgrade() -> None:
    op.drop_column("jobs", "gpu_seconds")
    op.drop_column("jobs", "outage")

"""Data sets, the pictures that adapters learnt from, and which jobs were drawn with which."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision: str | None = "0012"
branch_labels: str | None = None
depends_on: str | None = None

_PAGE = 500


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("team_id", sa.String(64), sa.ForeignKey("teams.id"), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("file_id", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("report", sa.JSON()),
        sa.Column("error", sa.JSON()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("checked", sa.Float()),
        sa.Column("claimed_until", sa.Float()),
    )
    op.create_index("ix_datasets_team_id_created", "datasets", ["team_id", "created"])
    op.create_index("ix_datasets_status", "datasets", ["status"])
    op.create_table(
        "trained_adapters",
        sa.Column("digest", sa.String(255), primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("dataset_digest", sa.String(64), nullable=False),
        sa.Column("command", sa.Text()),
        sa.Column("created", sa.Float(), nullable=False),
    )
    op.create_table(
        "adapter_origins",
        sa.Column(
            "adapter_digest",
            sa.String(255),
            sa.ForeignKey("trained_adapters.digest"),
            primary_key=True,
        ),
        sa.Column("picture_sha256", sa.String(64), primary_key=True),
        sa.Column("rights", sa.JSON()),
    )
    op.create_index("ix_adapter_origins_picture_sha256", "adapter_origins", ["picture_sha256"])
    op.create_table(
        "adapter_draws",
        sa.Column("adapter_digest", sa.String(255), primary_key=True),
        sa.Column("job_id", sa.String(64), primary_key=True),
    )
    op.create_index("ix_adapter_draws_job_id", "adapter_draws", ["job_id"])
    op.create_table(
        "revocations",
        sa.Column("picture_sha256", sa.String(64), primary_key=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
    )
    _note_draws()


def downgrade() -> None:
    for name in ("revocations", "adapter_draws", "adapter_origins", "trained_adapters", "datasets"):
        op.drop_table(name)


def _note_draws() -> None:
    """Of the jobs that there are, by their recipes."""
    connection = op.get_bind()
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("recipe", sa.JSON))
    draws = sa.table("adapter_draws", sa.column("adapter_digest"), sa.column("job_id"))
    last = ""
    while True:
        query = sa.select(jobs.c.id, jobs.c.recipe).where(jobs.c.id > last)
        page = connection.execute(query.order_by(jobs.c.id).limit(_PAGE)).all()
        if not page:
            return
        last = page[-1].id
        found = {
            (str(adapter.get("digest", ""))[:255], row.id)
            for row in page
            for adapter in (row.recipe or {}).get("adapters", [])
        }
        if found:
            connection.execute(
                draws.insert(),
                [{"adapter_digest": digest, "job_id": job} for digest, job in sorted(found)],
            )

"""Keys of held pictures in their rows alone, whose cases are, and what may be appealed against."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("cases", sa.Column("owner_team_id", sa.String(64)))
    op.execute("UPDATE cases SET owner_team_id = team_id WHERE kind <> 'report'")
    op.execute(
        "UPDATE cases SET owner_team_id = (SELECT team_id FROM assets WHERE assets.id = "
        "cases.subject) WHERE kind = 'report'"
    )
    op.create_table(
        "refusals",
        sa.Column("team_id", sa.String(64), nullable=False),
        sa.Column("decision_id", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name="fk_refusals_team_id"),
        sa.PrimaryKeyConstraint("team_id", "decision_id", name="pk_refusals"),
    )
    op.create_index("ix_refusals_job_id", "refusals", ["job_id"])
    _note_refusals()
    _forget_seals()


def downgrade() -> None:
    op.drop_index("ix_refusals_job_id", "refusals")
    op.drop_table("refusals")
    op.drop_column("cases", "owner_team_id")


def _forget_seals() -> None:
    """Jobs held the key of all their held pictures; these have it in rows of their own."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("UPDATE jobs SET input = (input::jsonb - 'seal')::json")
    else:
        op.execute("UPDATE jobs SET input = json_remove(input, '$.seal')")


def _note_refusals() -> None:
    """What was refused before this release can be appealed against as before."""
    connection = op.get_bind()
    found = connection.execute(
        sa.text("SELECT id, team_id, created, moderation, error FROM jobs WHERE purged IS NULL")
    )
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for job_id, team_id, created, moderation, error in found:
        record, told = (
            _read(moderation),
            _read(_read(_read(error).get("details")).get("moderation")),
        )
        ids = [told.get("decision_id")]
        output = record.get("output")
        for decision in (record.get("input"), *(output if isinstance(output, list) else ())):
            if isinstance(decision, dict) and decision.get("blocked"):
                ids.append(decision.get("id"))
        for decision_id in ids:
            if isinstance(decision_id, str):
                rows[team_id, decision_id] = {
                    "team_id": team_id,
                    "decision_id": decision_id,
                    "job_id": job_id,
                    "created": created,
                }
    insert = sa.text("INSERT INTO refusals VALUES (:team_id, :decision_id, :job_id, :created)")
    if rows:
        connection.execute(insert, list(rows.values()))


def _read(column: object) -> dict[str, object]:
    found = json.loads(column) if isinstance(column, str) else column
    return found if isinstance(found, dict) else {}

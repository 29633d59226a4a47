"""Where the bytes of pictures went, and takedowns that are complete."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision: str | None = "0008"
branch_labels: str | None = None
depends_on: str | None = None

Place = tuple[str, str, str, int]
"""(SHA-256 of a picture's file, kind, job or file, position)"""


def upgrade() -> None:
    op.create_table(
        "picture_places",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", "kind", "holder", "position", name="pk_picture_places"),
    )
    op.create_index("ix_picture_places_holder", "picture_places", ["holder"])
    op.add_column("taken_down", sa.Column("team_ids", sa.JSON()))
    op.add_column("taken_down", sa.Column("settled", sa.Float()))
    op.execute("UPDATE taken_down SET settled = created")
    _note_places()


def downgrade() -> None:
    op.drop_column("taken_down", "settled")
    op.drop_column("taken_down", "team_ids")
    op.drop_index("ix_picture_places_holder", "picture_places")
    op.drop_table("picture_places")


def _note_places() -> None:
    """Of the jobs that are kept: their sources, previews, and the outputs of their batches."""
    connection = op.get_bind()
    found: set[Place] = set()
    outputs = connection.execute(
        sa.text(
            "SELECT batch_lines.job_id, batches.output_file_id FROM batch_lines JOIN batches "
            "ON batches.id = batch_lines.batch_id WHERE batches.output_file_id IS NOT NULL "
            "AND batch_lines.job_id IS NOT NULL"
        )
    )
    files = {str(row.job_id): str(row.output_file_id) for row in outputs}
    shown = sa.text("SELECT DISTINCT job_id, image_index FROM previews")
    previews = {(row.job_id, row.image_index) for row in connection.execute(shown)}
    rows = connection.execute(sa.text("SELECT id, request, output FROM jobs WHERE purged IS NULL"))
    for job_id, request, output in rows:
        given = _read(request)
        references = given.get("references")
        keys = [given.get("image"), *(references if isinstance(references, list) else ())]
        for key in keys:
            if isinstance(key, str) and key:
                digest = key.rpartition("/")[2].partition(".")[0]
                found.add((digest, "drawn_from", job_id, 0))
        images = _read(output).get("images")
        for image in images if isinstance(images, list) else ():
            digest, index = str(image["sha256"]), int(image["index"])
            if (job_id, index) in previews:
                found.add((digest, "preview", job_id, index))
            if job_id in files:
                found.add((digest, "file", files[job_id], 0))
    insert = sa.text("INSERT INTO picture_places VALUES (:sha256, :kind, :holder, :position)")
    names = ("sha256", "kind", "holder", "position")
    if found:
        connection.execute(insert, [dict(zip(names, place, strict=True)) for place in found])


def _read(column: object) -> dict[str, object]:
    found = json.loads(column) if isinstance(column, str) else column
    return found if isinstance(found, dict) else {}

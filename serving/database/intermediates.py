"""What a running generator leaves for others: checkpoints for its successor, previews for clients.

Both are fenced: what arrives under an older lease is refused. The blobs become garbage when nobody
needs them any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, select, update

from calotype.serving.database.blob_refs import add_ref, release_ref
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values
from calotype.serving.database.schema.tables import checkpoints, jobs, previews
from calotype.serving.jobs.records import Checkpoint, PreviewRecord

# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_GONE_CHECKPOINT = (
    delete(checkpoints)
    .where(checkpoints.c.job_id == bindparam("job"))
    .returning(checkpoints.c.blob_key)
)
_GONE_PREVIEWS = (
    delete(previews)
    .where(
        previews.c.job_id == bindparam("job"),
        previews.c.image_index.not_in(bindparam("shown", expanding=True)),
    )
    .returning(previews.c.blob_key)
)
_PREVIEWS = (
    select(previews)
    .where(previews.c.job_id == bindparam("job"))
    .order_by(previews.c.partial_index, previews.c.image_index)
)
_CHECKPOINT = select(checkpoints).where(checkpoints.c.job_id == bindparam("job"))
_DRAWN = select(func.count()).where(previews.c.job_id == jobs.c.id).scalar_subquery()
_WATCHED = select(jobs.c.id, jobs.c.status, jobs.c.fence, jobs.c.step, _DRAWN).where(
    jobs.c.id.in_(bindparam("watched", expanding=True))
)
# An update, not a select: it takes the row's lock, so that no new lease comes in between.
_HOLD = update(jobs).where(
    jobs.c.id == bindparam("job"), jobs.c.status == "running", jobs.c.fence == bindparam("lease")
)


def clear_intermediates(
    connection: Connection, job_id: str, now: float, shown: Collection[int]
) -> None:
    """Lets go of the checkpoint of a job that is over, and of previews of what is not shown.

    Those of a shown image stay until the job expires: a client that looks a moment too late, or
    comes back, gets them all the same.

    Args:
        shown: the images that clients see as they were drawn.
    """
    of_job = {"job": job_id, "shown": sorted(shown)}
    for gone in (_GONE_CHECKPOINT, _GONE_PREVIEWS):
        release_ref(connection, list(connection.execute(gone, of_job).scalars()), now)


class Intermediates(Repository):
    """Checkpoints and previews of running jobs."""

    def save_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Replaces the job's checkpoint; False when the lease is not the current one."""
        with writing(self.engine) as connection:
            if not _holds(connection, checkpoint.job_id, checkpoint.fence):
                return False
            gone = connection.execute(_GONE_CHECKPOINT, {"job": checkpoint.job_id})
            old = [key for key in gone.scalars() if key != checkpoint.blob_key]
            connection.execute(checkpoints.insert().values(column_values(checkpoint)))
            add_ref(connection, [checkpoint.blob_key])
            release_ref(connection, old, self.clock.time())
        return True

    def get_checkpoint(self, job_id: str) -> Checkpoint | None:
        with reading(self.engine) as connection:
            row = connection.execute(_CHECKPOINT, {"job": job_id}).mappings().first()
        return None if row is None else Checkpoint(**row)

    def drop_checkpoint(self, job_id: str) -> None:
        """The checkpoint cannot be read: the job starts from the beginning."""
        with writing(self.engine) as connection:
            gone = connection.execute(_GONE_CHECKPOINT, {"job": job_id})
            release_ref(connection, list(gone.scalars()), self.clock.time())

    def add_preview(self, preview: PreviewRecord) -> bool:
        """False when the lease is not the current one or the preview is there already.

        It counts for the step at which it arrives, so that it comes after what clients have seen.
        """
        with writing(self.engine) as connection:
            if not _holds(connection, preview.job_id, preview.fence):
                return False
            step = select(jobs.c.step).where(jobs.c.id == preview.job_id)
            reached = int(connection.execute(step).scalar_one())
            preview = replace(preview, step=max(reached, preview.step))
            known = select(previews.c.blob_key).where(
                previews.c.job_id == preview.job_id,
                previews.c.image_index == preview.image_index,
                previews.c.partial_index == preview.partial_index,
            )
            if connection.execute(known).first() is not None:
                return False
            connection.execute(previews.insert().values(column_values(preview)))
            add_ref(connection, [preview.blob_key])
        return True

    def list_previews(self, job_id: str) -> list[PreviewRecord]:
        """Of a job that is open or succeeded, in the order in which they were drawn."""
        with reading(self.engine) as connection:
            rows = connection.execute(_PREVIEWS, {"job": job_id}).mappings()
            return [PreviewRecord(**row) for row in rows]

    def watch_jobs(self, job_ids: Sequence[str]) -> Mapping[str, tuple[Any, ...]]:
        """job id -> (status, fence, step, previews): tells cheaply whether anything changed."""
        with reading(self.engine) as connection:
            found = connection.execute(_WATCHED, {"watched": list(job_ids)})
            return {row[0]: tuple(row[1:]) for row in found}


def _holds(connection: Connection, job_id: str, fence: int) -> bool:
    found = connection.execute(_HOLD, {"job": job_id, "lease": fence, "fence": fence})
    return found.rowcount == 1

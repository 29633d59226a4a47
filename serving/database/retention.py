"""What is removed when its time is over: jobs with their prompts, then what is left of them."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, or_, select, text, update

from calotype.serving.database.blob_refs import not_in_files, release_ref
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.review_tables import picture_places, refusals
from calotype.serving.database.schema.tables import (
    assets,
    batch_lines,
    batches,
    checkpoints,
    jobs,
    previews,
    webhook_attempts,
    webhook_deliveries,
)
from calotype.serving.database.schema.training_tables import adapter_draws
from calotype.serving.jobs.lifecycle import OPEN, TERMINAL
from calotype.serving.jobs.records import JobRecord

_PAGE = 200
_EMPTY_REQUEST = ("rendered_size", "size", "steps", "n")

# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_OVER = (
    select(jobs)
    .where(
        jobs.c.expires <= bindparam("now"),
        jobs.c.purged.is_(None),
        jobs.c.status.in_(sorted(TERMINAL)),
    )
    .limit(bindparam("most"))
)
# While a file holds one of its pictures, that one is still to be found.
_FORGOTTEN = (
    select(jobs.c.id)
    .where(
        jobs.c.purged <= bindparam("moment"),
        ~select(assets.c.job_id).where(assets.c.job_id == jobs.c.id).exists(),
    )
    .limit(bindparam("most"))
)
_ENDED_BATCHES = (
    select(batches.c.id)
    .where(
        batches.c.status.not_in(("in_progress", "cancelling")),
        batches.c.deadline <= bindparam("moment"),
    )
    .limit(bindparam("most"))
)
_LATE = (
    select(jobs.c.id)
    .where(
        jobs.c.status.in_(sorted(OPEN)),
        or_(jobs.c.deadline <= bindparam("moment"), jobs.c.expires <= bindparam("moment")),
    )
    .limit(bindparam("most"))
)


class Retention(Repository):
    """Removes what expired."""

    def purge_jobs(self, limit: int = _PAGE) -> int:
        """Takes prompt, recipe and images from jobs whose time is over; how many there were.

        What is left says that there was such a job (410), until `forget_jobs`.
        """
        now = self.clock.time()
        wanted = {"now": now, "most": limit}
        if not self.finds(_OVER, wanted):
            return 0
        with writing(self.engine) as connection:
            found = connection.execute(_OVER, wanted).mappings()
            ended = [JobRecord(**row) for row in found]
            for job in ended:
                connection.execute(
                    update(jobs)
                    .where(jobs.c.id == job.id)
                    .values(
                        purged=now,
                        input={},
                        request={k: job.request[k] for k in _EMPTY_REQUEST if k in job.request},
                        recipe=None,
                        output=None,
                        error=None,
                        outage=None,
                        moderation=None,
                        metadata={},
                        webhook=None,
                        idempotency=None,
                        body_sha256=None,
                    )
                )
                for of_job in (
                    delete(assets).where(assets.c.job_id == job.id, not_in_files()),
                    delete(previews).where(previews.c.job_id == job.id),
                ):
                    gone = connection.execute(of_job.returning(text("blob_key"))).scalars()
                    release_ref(connection, list(gone), now)
        return len(ended)

    def forget_jobs(self, purged_before: float, limit: int = _PAGE) -> int:
        """Removes the last trace of jobs that were purged so long ago; their usage stays."""
        wanted = {"moment": purged_before, "most": limit}
        if not self.finds(_FORGOTTEN, wanted):
            return 0
        with writing(self.engine) as connection:
            ids = list(connection.execute(_FORGOTTEN, wanted).scalars())
            if not ids:
                return 0
            for table in (checkpoints, previews):
                gone = connection.execute(
                    delete(table).where(table.c.job_id.in_(ids)).returning(table.c.blob_key)
                )
                release_ref(connection, list(gone.scalars()), self.clock.time())
            connection.execute(delete(refusals).where(refusals.c.job_id.in_(ids)))
            connection.execute(delete(picture_places).where(picture_places.c.holder.in_(ids)))
            connection.execute(delete(adapter_draws).where(adapter_draws.c.job_id.in_(ids)))
            told = select(webhook_deliveries.c.id).where(webhook_deliveries.c.job_id.in_(ids))
            attempts = webhook_attempts.c.delivery_id.in_(told)
            connection.execute(delete(webhook_attempts).where(attempts))
            connection.execute(
                delete(webhook_deliveries).where(webhook_deliveries.c.job_id.in_(ids))
            )
            connection.execute(delete(jobs).where(jobs.c.id.in_(ids)))
        return len(ids)

    def forget_batches(self, ended_before: float, limit: int = _PAGE) -> int:
        """Removes batches whose window ended so long ago; their files expire by themselves."""
        wanted = {"moment": ended_before, "most": limit}
        if not self.finds(_ENDED_BATCHES, wanted):
            return 0
        with writing(self.engine) as connection:
            ids = list(connection.execute(_ENDED_BATCHES, wanted).scalars())
            if ids:
                connection.execute(delete(batch_lines).where(batch_lines.c.batch_id.in_(ids)))
                connection.execute(delete(batches).where(batches.c.id.in_(ids)))
        return len(ids)

    def overdue_jobs(self, deadline_before: float, limit: int = _PAGE) -> list[str]:
        """Open jobs past their deadline: their dispatcher is away, or was never there."""
        with reading(self.engine) as connection:
            wanted = {"moment": deadline_before, "most": limit}
            return list(connection.execute(_LATE, wanted).scalars())

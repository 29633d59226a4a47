"""Where the bytes of a picture went besides its asset, so that a takedown finds all of them.

By the SHA-256 of a picture's file: previews of it, files that hold it (the output of a batch), and
jobs that are drawn from it.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, bindparam, insert, select

from calotype.serving.database.schema.review_tables import picture_places
from calotype.serving.database.schema.tables import previews
from calotype.serving.jobs.recipe import digest_of_key
from calotype.serving.jobs.records import NewJob
from calotype.serving.jobs.result import ImageResult

PREVIEW, DRAWN_FROM, FORBIDDEN = "preview", "drawn_from", "forbidden"
"""Kinds of places whose holder is a job; forbidden: drawn from what was taken down."""

# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_SOURCES = (
    select(picture_places.c.kind)
    .where(
        picture_places.c.holder == bindparam("job"),
        picture_places.c.kind.in_((DRAWN_FROM, FORBIDDEN)),
    )
    .with_for_update()
)
_SHOWN = select(previews.c.image_index).where(previews.c.job_id == bindparam("job")).distinct()


def note_sources(connection: Connection, job: NewJob) -> None:
    """A job is drawn from these pictures."""
    maps = [control["image"] for control in job.request.get("controls", ())]
    keys = (job.request.get("image"), *job.request.get("references", ()), *maps)
    _note(connection, ((digest_of_key(key), DRAWN_FROM, job.id, 0) for key in keys if key))


def is_forbidden(connection: Connection, job_id: str) -> bool:
    """Whether a picture that the job is drawn from was taken down; none is until the transaction
    ends."""
    return FORBIDDEN in connection.execute(_SOURCES, {"job": job_id}).scalars().all()


def note_previews(connection: Connection, job_id: str, images: Iterable[ImageResult]) -> None:
    """Pictures of a job have previews, which show nearly the same."""
    shown = set(connection.execute(_SHOWN, {"job": job_id}).scalars())
    places = ((i.sha256, PREVIEW, job_id, i.index) for i in images if i.index in shown)
    _note(connection, places)


def _note(connection: Connection, places: Iterable[tuple[str, str, str, int]]) -> None:
    rows = [
        {"sha256": digest, "kind": kind, "holder": holder, "position": position}
        for digest, kind, holder, position in sorted(set(places))
    ]
    if rows:
        connection.execute(insert(picture_places), rows)

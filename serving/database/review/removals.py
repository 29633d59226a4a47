"""Takes pictures out of everything that could show them, in one transaction.

Bytes are deleted after it, by whoever comes first: their keys are noted as garbage that needs no
grace period, so a fault in between delays only the deletion of what nobody serves any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, or_, select, update

from calotype.serving.database.blob_refs import FILE, discard
from calotype.serving.database.review.held_images import drop_held
from calotype.serving.database.review.picture_places import DRAWN_FROM, FORBIDDEN, PREVIEW
from calotype.serving.database.schema.review_tables import held_images, picture_places
from calotype.serving.database.schema.tables import (
    assets,
    batch_lines,
    batches,
    checkpoints,
    files,
    jobs,
    previews,
)
from calotype.serving.jobs.lifecycle import OPEN

_PAGE = 500
_FORBIDDEN = (
    select(jobs.c.id)
    .join(picture_places, picture_places.c.holder == jobs.c.id)
    .where(picture_places.c.kind == FORBIDDEN, jobs.c.status.in_(sorted(OPEN)))
    .distinct()
    .limit(bindparam("most"))
)


@dataclass(slots=True)
class Removal:
    """What was taken out."""

    assets: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    previews: int = 0
    teams: set[str] = field(default_factory=set)
    """Whose it was."""
    open_jobs: set[str] = field(default_factory=set)
    """Jobs that are still drawn from it: to be cancelled."""
    blobs: list[str] = field(default_factory=list)
    """What nobody refers to any more: to be deleted at once."""

    def to_payload(self) -> dict[str, object]:
        """For the record of who did it."""
        return {
            "assets": sorted(self.assets),
            "files": sorted(self.files),
            "held": sorted(self.held),
            "previews": self.previews,
            "files_deleted": len(self.blobs),
        }


def remove_pictures(
    connection: Connection, asset_ids: Collection[str], sha256s: Collection[str], now: float
) -> Removal:
    """Forgets pictures, every file with the same bytes, and all that the table of places names:
    their previews, files that hold them, what was drawn from them and what that left.

    Args:
        sha256s: of the bytes of files that must go, whoever has them.
    """
    found, keys = Removal(), set[str]()
    names, digests, known = set(asset_ids), set(sha256s), set[str]()
    while names or digests:
        gone = [
            *_taken(connection, assets, assets.c.id, names),
            *_taken(connection, assets, assets.c.sha256, digests),
        ]
        found.assets |= {row["id"] for row in gone}
        keys |= {row["blob_key"] for row in gone}
        found.teams |= {row["team_id"] for row in gone}
        fresh = (digests | {row["sha256"] for row in gone}) - known
        known |= fresh
        drawn = _clear_places(connection, fresh, found, keys, now)
        query = select(assets.c.id).where(assets.c.job_id.in_(sorted(drawn)))
        names, digests = set(connection.execute(query).scalars()) if drawn else set(), set()
    found.blobs = discard(connection, keys)
    return found


def _clear_places(
    connection: Connection, digests: Collection[str], found: Removal, keys: set[str], now: float
) -> set[str]:
    """Empties every place of these bytes; the jobs that were drawn from them."""
    gone = _taken(connection, files, files.c.sha256, digests)
    for some in _pages(digests):
        # First of all: a job that ends just now waits for it, or has ended when it is done.
        mine = picture_places.c.sha256.in_(some)
        mark = update(picture_places).where(mine, picture_places.c.kind == DRAWN_FROM)
        connection.execute(mark.values(kind=FORBIDDEN))
    places = _rows(connection, picture_places, picture_places.c.sha256, digests)
    held_in = {place["holder"] for place in places if place["kind"] == FILE}
    gone += _taken(connection, files, files.c.id, held_in)
    found.files |= {row["id"] for row in gone}
    found.teams |= {row["team_id"] for row in gone}
    keys |= {row["blob_key"] for row in gone}
    for row in _rows(connection, held_images, held_images.c.sha256, digests):
        keys.add(drop_held(connection, row["asset_id"], "It was taken down.", now).blob_key)
        found.held.add(row["asset_id"])
        found.teams.add(row["team_id"])
    shown = [
        and_(previews.c.job_id == place["holder"], previews.c.image_index == place["position"])
        for place in places
        if place["kind"] == PREVIEW
    ]
    drawn = {place["holder"] for place in places if place["kind"] in (DRAWN_FROM, FORBIDDEN)}
    left = [*_taken(connection, previews, previews.c.job_id, drawn)]
    for start in range(0, len(shown), _PAGE):
        gone_previews = delete(previews).where(or_(*shown[start : start + _PAGE]))
        left += connection.execute(gone_previews.returning(previews)).mappings().all()
    found.previews += len(left)
    left += _taken(connection, checkpoints, checkpoints.c.job_id, drawn)
    keys |= {row["blob_key"] for row in left}
    drawing = _rows(connection, jobs, jobs.c.id, drawn)
    found.open_jobs |= {row["id"] for row in drawing if row["status"] in OPEN}
    batch_ids = {row["batch_id"] for row in drawing if row["batch_id"] is not None}
    gone = _clear_batch_inputs(connection, batch_ids, drawn)
    found.files |= {row["id"] for row in gone}
    keys |= {row["blob_key"] for row in gone}
    return drawn


def _clear_batch_inputs(
    connection: Connection, batch_ids: Collection[str], drawn: Collection[str]
) -> list[Any]:
    """Forgets what batches were sent as, whose lines may hold the picture; the files' rows."""
    for some in _pages(drawn):
        lines = update(batch_lines).where(batch_lines.c.job_id.in_(some))
        connection.execute(lines.values(body={}))
    sent = {row["input_file_id"] for row in _rows(connection, batches, batches.c.id, batch_ids)}
    return _taken(connection, files, files.c.id, sent)


def _taken(connection: Connection, table: Any, column: Any, values: Collection[str]) -> list[Any]:
    """Deletes the rows with these values, and returns them."""
    found: list[Any] = []
    for some in _pages(values):
        gone = delete(table).where(column.in_(some)).returning(table)
        found += connection.execute(gone).mappings().all()
    return found


def _rows(connection: Connection, table: Any, column: Any, values: Collection[str]) -> list[Any]:
    found: list[Any] = []
    for some in _pages(values):
        found += connection.execute(select(table).where(column.in_(some))).mappings().all()
    return found


def _pages(values: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(values)
    for start in range(0, len(ordered), _PAGE):
        yield ordered[start : start + _PAGE]


def forbidden_jobs(connection: Connection, limit: int = _PAGE) -> list[str]:
    """Open jobs that are drawn from what was taken down."""
    return list(connection.execute(_FORBIDDEN, {"most": limit}).scalars())

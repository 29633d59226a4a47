"""Images that were taken down: gone from wherever they could be shown, and refused from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Connection, delete, func, insert, select, update

from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.images import pdq
from calotype.moderation.images.known_images import KnownList
from calotype.moderation.policy.categories import Category
from calotype.serving.core.errors import NotFound, PermissionDenied, StorageFailed
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values
from calotype.serving.database.review.cases import Reviewer
from calotype.serving.database.review.image_index import Fingerprint
from calotype.serving.database.review.removals import Removal, forbidden_jobs, remove_pictures
from calotype.serving.database.review.reviewer_audit import append_action
from calotype.serving.database.review.takedown_order import begin_takedown, newest_takedown
from calotype.serving.database.schema.review_tables import people_log, taken_down
from calotype.serving.jobs.records import new_id

SETTLE_SECONDS = 3600.0
"""A picture that was checked before its takedown is stored within this time, or never."""


@dataclass(frozen=True, slots=True)
class TakedownRecord:
    """A row of the table ``taken_down``."""

    id: str
    pdq: str | None
    payload: str | None
    category: str
    reason: str
    actor: str
    created: float
    team_ids: list[str] | None = None
    """Whose it was."""
    number: int | None = None
    settled: float | None = None
    """When all copies were found; None = newly stored images are compared with it."""


@dataclass(frozen=True, slots=True)
class TakedownOrder:
    """What is to be taken down."""

    found: Fingerprint
    category: Category
    reason: str
    asset_ids: Collection[str]
    """Its stored copies."""
    sha256s: Collection[str]
    """Of the bytes of files that it is."""


# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_LISTED = select(taken_down).order_by(taken_down.c.created, taken_down.c.id)
_UNSETTLED = select(taken_down.c.id).where(taken_down.c.settled.is_(None)).limit(1)
_COUNT = select(func.count()).select_from(taken_down)


class _OnlyTried(Exception):
    """Takes back a transaction."""


class Takedowns(Repository):
    """Taken-down images."""

    def try_out(self, order: TakedownOrder) -> Removal:
        """What `take_down` would take out; nothing is."""
        with contextlib.suppress(_OnlyTried), writing(self.engine) as connection:
            done = remove_pictures(connection, order.asset_ids, order.sha256s, self.clock.time())
            raise _OnlyTried
        return done

    def take_down(self, order: TakedownOrder, actor: str) -> tuple[TakedownRecord, Removal]:
        """`take_down_in` in a transaction of its own."""
        with writing(self.engine, durable=True) as connection:
            return self.take_down_in(connection, order, actor)

    def take_down_in(
        self, connection: Connection, order: TakedownOrder, actor: str
    ) -> tuple[TakedownRecord, Removal]:
        """From now on the image is shown nowhere and refused wherever images are checked.

        With its record in the log of what people do. What is left is to delete ``blobs`` and to
        cancel ``open_jobs``; whoever does so may repeat it.
        """
        begin_takedown(connection)
        now, found = self.clock.time(), order.found
        done = remove_pictures(connection, order.asset_ids, order.sha256s, now)
        record = TakedownRecord(
            new_id("takedown"),
            found.pdq,
            found.payload,
            order.category.value,
            order.reason,
            actor,
            now,
            sorted(done.teams),
        )
        details = done.to_payload() | {"category": order.category.value}
        append_action(connection, now, actor, "takedown.made", record.id, details)
        number = select(func.max(people_log.c.number)).scalar_subquery()
        values = column_values(record) | {"number": number}
        connection.execute(insert(taken_down).values(values))
        return record, done

    def extend(self, takedown_id: str, asset_ids: Collection[str]) -> Removal:
        """Takes down further copies, which were stored while the takedown was made."""
        now = self.clock.time()
        with writing(self.engine, durable=True) as connection:
            done = remove_pictures(connection, asset_ids, (), now)
            mine = taken_down.c.id == takedown_id
            query = select(taken_down.c.team_ids).where(mine)
            teams = set(connection.execute(query).scalar_one_or_none() or ()) | done.teams
            connection.execute(update(taken_down).where(mine).values(team_ids=sorted(teams)))
            details = done.to_payload()
            append_action(connection, now, "nobody", "takedown.extended", takedown_id, details)
        return done

    def forbidden_jobs(self) -> list[str]:
        """Open jobs that are drawn from what was taken down: to be ended."""
        with reading(self.engine) as connection:
            return forbidden_jobs(connection)

    def list_takedowns(self) -> list[TakedownRecord]:
        """The oldest first."""
        with reading(self.engine) as connection:
            return [TakedownRecord(**row) for row in connection.execute(_LISTED).mappings()]

    def unsettled(self) -> bool:
        """Whether newly stored images must still be compared with what was taken down."""
        return self.finds(_UNSETTLED, {})

    def settle(self) -> None:
        """All stored images were compared: takedowns of long ago are complete."""
        now = self.clock.time()
        old = taken_down.c.created <= now - SETTLE_SECONDS
        with writing(self.engine) as connection:
            connection.execute(
                update(taken_down).where(taken_down.c.settled.is_(None), old).values(settled=now)
            )

    def lift_takedown(self, takedown_id: str, reviewer: Reviewer) -> None:
        """The image may come again.

        Raises:
            NotFound: there is no such takedown.
            PermissionDenied: the image was the reviewer's own team's.
        """
        mine = taken_down.c.id == takedown_id
        with writing(self.engine, durable=True) as connection:
            gone = connection.execute(delete(taken_down).where(mine).returning(taken_down))
            row = gone.mappings().first()
            if row is None:
                raise NotFound(f"There is no takedown '{takedown_id[:80]}'.")
            if reviewer.team_id in (row["team_ids"] or ()):
                raise PermissionDenied(
                    f"The takedown '{takedown_id}' is of a picture of your own team: a reviewer "
                    "with a key of another team must lift it.",
                    code="own_team",
                )
            now = self.clock.time()
            append_action(connection, now, reviewer.key_id, "takedown.lifted", takedown_id)

    def stamp(self) -> tuple[int, int]:
        """How many there are and the newest one's number: changes whenever the list does."""
        with reading(self.engine) as connection:
            return int(connection.execute(_COUNT).scalar_one()), newest_takedown(connection)


class TakenDown:
    """The list of images that were taken down, as the safety stage asks for it.

    Asked at every image, so that a takedown holds from the next one on, in every replica.
    """

    def __init__(self, takedowns: Takedowns) -> None:
        self._takedowns = takedowns
        self._known: tuple[tuple[int, int], KnownList] | None = None

    def __call__(self) -> KnownList:
        """Raises ClassifierUnavailable: then nothing is known of any image."""
        return self.numbered()[1]

    def numbered(self) -> tuple[int, KnownList]:
        """The number of the newest takedown, and the list with it. Raises like the call."""
        try:
            stamp = self._takedowns.stamp()
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, _as_list(self._takedowns.list_takedowns())
        except StorageFailed as error:
            raise ClassifierUnavailable(
                f"The list of pictures that were taken down cannot be read: {error.message}"
            ) from error
        return self._known[0][1], self._known[1]


def _as_list(rows: Sequence[TakedownRecord]) -> KnownList:
    hashed = [(row, pdq.words(row.pdq)) for row in rows if row.pdq is not None]
    return KnownList(
        "taken-down",
        np.stack([words for _, words in hashed]) if hashed else np.empty((0, 4), dtype=np.uint64),
        tuple(Category(row.category) for row, _ in hashed),
        tuple(row.id for row, _ in hashed),
        {row.payload: (Category(row.category), row.id) for row in rows if row.payload is not None},
    )

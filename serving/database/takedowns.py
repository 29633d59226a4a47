"""Images that were taken down, and what stored images are recognised by.

An image is found by the payload of its watermark (this very image, in any copy that still has
the mark) and by its PDQ (the same image, resized, saved again or turned). `picture_index` holds
both for every stored image; it is filled by `api.takedowns`, which reads the files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.images import pdq
from calotype.moderation.images.known_images import KnownList
from calotype.moderation.images.pdq import Words
from calotype.moderation.policy.categories import Category
from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.database.blob_refs import add_ref, is_referenced, release_ref
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.review_tables import image_index, taken_down
from calotype.serving.database.schema.tables import assets, files
from calotype.serving.jobs.records import AssetRecord, new_id

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What an image is recognised by."""

    pdq: str | None
    """64 hexadecimal digits; None where there is too little in the image."""
    payload: str | None
    """Of its watermark; None where there is none."""
    turned: Words | None = None
    """[8, 4]: its PDQ in every way of turning it."""


@dataclass(frozen=True, slots=True)
class StoredMatch:
    """A stored image that is the one that was looked for."""

    asset: AssetRecord
    by: str
    """``watermark`` or ``pdq``, or how it was named: ``asset_id``, ``report``."""
    distance: int | None
    """Bits in which the hashes differ; None for a watermark."""


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


class Takedowns(Repository):
    """Taken-down images, and the fingerprints of stored ones."""

    # -- what is stored ------------------------------------------------------------------------

    def unindexed_assets(self, limit: int = 100) -> list[AssetRecord]:
        """Stored images of which nobody has noted what they are recognised by."""
        known = select(image_index.c.asset_id).where(image_index.c.asset_id == assets.c.id)
        query = select(assets).where(~known.exists()).order_by(assets.c.created).limit(limit)
        with reading(self.engine) as connection:
            return [AssetRecord(**row) for row in connection.execute(query).mappings()]

    def index_image(self, asset_id: str, found: Fingerprint) -> None:
        """Notes it; an image that is gone by now, or noted already, is left alone."""
        row = {"asset_id": asset_id, "pdq": found.pdq, "payload": found.payload}
        try:
            with writing(self.engine) as connection:
                connection.execute(insert(image_index).values(row))
        except IntegrityError:
            return

    def find_images(self, looked_for: Fingerprint) -> list[StoredMatch]:
        """The stored images that are copies of one, the surest first."""
        away: dict[str, int | None] = dict(self._near(looked_for.turned))
        if looked_for.payload is not None:
            same = select(image_index.c.asset_id).where(image_index.c.payload == looked_for.payload)
            with reading(self.engine) as connection:
                away |= dict.fromkeys(connection.execute(same).scalars())
        found = []
        for chunk in _chunks(sorted(away)):
            with reading(self.engine) as connection:
                rows = connection.execute(select(assets).where(assets.c.id.in_(chunk))).mappings()
                found += [AssetRecord(**row) for row in rows]
        matches = [
            StoredMatch(a, "watermark" if away[a.id] is None else "pdq", away[a.id]) for a in found
        ]
        return sorted(matches, key=lambda m: (-1 if m.distance is None else m.distance, m.asset.id))

    def _near(self, turned: Words | None) -> Iterator[tuple[str, int]]:
        if turned is None:
            return
        last = ""
        while True:
            query = (
                select(image_index.c.asset_id, image_index.c.pdq)
                .where(image_index.c.pdq.is_not(None), image_index.c.asset_id > last)
                .order_by(image_index.c.asset_id)
                .limit(_PAGE)
            )
            with reading(self.engine) as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            stored = np.stack([pdq.words(row.pdq) for row in rows])
            away = np.min([pdq.distances(stored, one) for one in turned], axis=0)
            for index in np.flatnonzero(away <= pdq.SAME):
                yield rows[int(index)].asset_id, int(away[index])
            last = rows[-1].asset_id

    def remove_copies(self, asset_ids: Sequence[str], sha256s: Collection[str]) -> list[str]:
        """Forgets images and every stored or uploaded file with the same bytes.

        Returns:
            The blobs that nobody refers to any more, to be deleted.
        """
        now = self.clock.time()
        wanted: set[str] = set()
        with writing(self.engine) as connection:
            for chunk in _chunks(sorted(asset_ids)):
                gone = delete(assets).where(assets.c.id.in_(chunk)).returning(assets.c.blob_key)
                wanted.update(connection.execute(gone).scalars())
            for chunk in _chunks(sorted(sha256s)):
                for table in (assets, files):
                    copies = delete(table).where(table.c.sha256.in_(chunk))
                    wanted.update(connection.execute(copies.returning(table.c.blob_key)).scalars())
            release_ref(connection, wanted, now)
            return sorted(key for key in wanted if not is_referenced(connection, key))

    def forget_blobs(self, keys: Sequence[str]) -> None:
        """These blobs are deleted: they wait for no sweep."""
        with writing(self.engine) as connection:
            add_ref(connection, keys)

    # -- what must not come again --------------------------------------------------------------

    def take_down(
        self, found: Fingerprint, category: Category, reason: str, actor: str
    ) -> TakedownRecord:
        """From now on the image is refused wherever images are checked."""
        record = TakedownRecord(
            new_id("takedown"),
            found.pdq,
            found.payload,
            category.value,
            reason,
            actor,
            self.clock.time(),
        )
        values = {name: getattr(record, name) for name in record.__dataclass_fields__}
        with writing(self.engine) as connection:
            connection.execute(insert(taken_down).values(values))
        return record

    def list_takedowns(self) -> list[TakedownRecord]:
        """The oldest first."""
        query = select(taken_down).order_by(taken_down.c.created, taken_down.c.id)
        with reading(self.engine) as connection:
            return [TakedownRecord(**row) for row in connection.execute(query).mappings()]

    def lift_takedown(self, takedown_id: str) -> None:
        """The image may come again. Raises NotFound."""
        with writing(self.engine) as connection:
            gone = connection.execute(delete(taken_down).where(taken_down.c.id == takedown_id))
        if not gone.rowcount:
            raise NotFound(f"There is no takedown '{takedown_id[:80]}'.")

    def stamp(self) -> tuple[int, float]:
        """Changes whenever the list does."""
        query = select(func.count(), func.max(taken_down.c.created)).select_from(taken_down)
        with reading(self.engine) as connection:
            count, newest = connection.execute(query).one()
        return int(count), float(newest or 0.0)


class TakenDown:
    """The list of images that were taken down, as the safety stage asks for it.

    Asked at every image, so that a takedown holds from the next one on, in every replica.
    """

    def __init__(self, takedowns: Takedowns) -> None:
        self._takedowns = takedowns
        self._known: tuple[tuple[int, float], KnownList] | None = None

    def __call__(self) -> KnownList:
        """Raises ClassifierUnavailable: then nothing is known of any image."""
        try:
            stamp = self._takedowns.stamp()
            if self._known is None or self._known[0] != stamp:
                self._known = stamp, _as_list(self._takedowns.list_takedowns())
        except StorageFailed as error:
            raise ClassifierUnavailable(
                f"The list of pictures that were taken down cannot be read: {error.message}"
            ) from error
        return self._known[1]


def _as_list(rows: Sequence[TakedownRecord]) -> KnownList:
    hashed = [(row, pdq.words(row.pdq)) for row in rows if row.pdq is not None]
    return KnownList(
        "taken-down",
        np.stack([words for _, words in hashed]) if hashed else np.empty((0, 4), dtype=np.uint64),
        tuple(Category(row.category) for row, _ in hashed),
        tuple(row.id for row, _ in hashed),
        {row.payload: (Category(row.category), row.id) for row in rows if row.payload is not None},
    )


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), 500):
        yield names[start : start + 500]

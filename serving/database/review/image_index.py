"""What stored images are recognised by: the payload of their watermark, and their PDQ.

The payload finds this very image, in any copy that still has the mark; the PDQ the same image,
resized, saved again or turned. The table is filled by `api.takedowns`, which reads the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from calotype.moderation.images import pdq
from calotype.moderation.images.pdq import Words
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.review_tables import image_index
from calotype.serving.database.schema.tables import assets
from calotype.serving.jobs.records import AssetRecord

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


class ImageIndex(Repository):
    """The fingerprints of stored images."""

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


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), 500):
        yield names[start : start + 500]

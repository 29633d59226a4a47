"""References to blobs: assets, uploaded files, checkpoints, previews; and what nobody refers to.

Blobs are addressed by their content, so several rows may name one. When the last reference goes the
key is noted as garbage; a sweeper deletes the blob after a while, unless a new row names it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, and_, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from calotype.serving.core.errors import NotFound
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository
from calotype.serving.database.schema.review_tables import held_images
from calotype.serving.database.schema.tables import (
    assets,
    blob_garbage,
    checkpoints,
    files,
    previews,
)
from calotype.serving.jobs.records import AssetRecord, FileRecord

_REFERRING = (assets, files, checkpoints, previews, held_images)
_PAGE = 200
JOB_INPUT = "job_input"
"""Purpose of a file that came with a request; it is not listed."""


def add_ref(connection: Connection, keys: Iterable[str]) -> None:
    """A new row refers to these blobs: they are no garbage any more."""
    wanted = list(keys)
    if wanted:
        connection.execute(delete(blob_garbage).where(blob_garbage.c.blob_key.in_(wanted)))


def release_ref(connection: Connection, keys: Iterable[str], now: float) -> None:
    """A row that referred to these blobs is gone: those without another one become garbage."""
    for key in sorted(set(keys)):
        if not is_referenced(connection, key):
            insert: Any = (
                postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            )(blob_garbage)
            values = {"blob_key": key, "since": now}
            connection.execute(insert.values(values).on_conflict_do_nothing())


def is_referenced(connection: Connection, key: str) -> bool:
    return any(
        connection.execute(select(table.c.blob_key).where(table.c.blob_key == key).limit(1)).first()
        for table in _REFERRING
    )


class BlobRefs(Repository):
    """Assets, uploaded files, and the blobs that they name."""

    # -- assets --------------------------------------------------------------------------------

    def get_asset(self, asset_id: str, team_id: str | None = None) -> AssetRecord | None:
        query = select(assets).where(assets.c.id == asset_id)
        if team_id is not None:
            query = query.where(assets.c.team_id == team_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else AssetRecord(**row)

    def delete_asset(self, asset_id: str, team_id: str) -> bool:
        """Forgets an image; False when the team has none of that id."""
        mine = and_(assets.c.id == asset_id, assets.c.team_id == team_id)
        return self._forget(assets, mine) == 1

    def expire_assets(self, limit: int = _PAGE) -> int:
        """Forgets images whose time is over; how many there were."""
        return self._forget(assets, assets.c.expires <= self.clock.time(), limit)

    # -- files ---------------------------------------------------------------------------------

    def add_file(self, file: FileRecord) -> None:
        values = {name: getattr(file, name) for name in file.__dataclass_fields__}
        with writing(self.engine, durable=True) as connection:
            connection.execute(files.insert().values(values))
            add_ref(connection, [file.blob_key])

    def get_file(self, file_id: str, team_id: str) -> FileRecord | None:
        query = select(files).where(files.c.id == file_id, files.c.team_id == team_id)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else FileRecord(**row)

    def find_blob(self, team_id: str, sha256: str) -> str | None:
        """The key of a file of the team with these bytes, if it still has one."""
        query = select(files.c.blob_key).where(files.c.team_id == team_id, files.c.sha256 == sha256)
        with reading(self.engine) as connection:
            return connection.execute(query.limit(1)).scalar_one_or_none()

    def list_files(
        self,
        team_id: str,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """A page of the team's files; ``after`` is the last id of the page before."""
        query = select(files).where(files.c.team_id == team_id, files.c.purpose != JOB_INPUT)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        rows = self.page(
            query, files, team_id, "file", limit=limit, after=after, oldest_first=oldest_first
        )
        return [FileRecord(**row) for row in rows]

    def delete_file(self, file_id: str, team_id: str) -> None:
        """Raises NotFound when the team has no such file."""
        mine = and_(files.c.id == file_id, files.c.team_id == team_id)
        if not self._forget(files, mine):
            raise NotFound(f"There is no file '{file_id[:80]}'.")

    def expire_files(self, limit: int = _PAGE) -> int:
        return self._forget(files, files.c.expires <= self.clock.time(), limit)

    # -- garbage -------------------------------------------------------------------------------

    def garbage(self, noted_before: float, limit: int = _PAGE) -> list[str]:
        """Keys that nobody has referred to since ``noted_before``; still nobody does."""
        query = (
            select(blob_garbage.c.blob_key)
            .where(blob_garbage.c.since <= noted_before)
            .order_by(blob_garbage.c.since)
            .limit(limit)
        )
        with writing(self.engine) as connection:
            keys = list(connection.execute(query).scalars())
            named = [key for key in keys if is_referenced(connection, key)]
            add_ref(connection, named)
        return [key for key in keys if key not in named]

    def forget_garbage(self, keys: Sequence[str]) -> None:
        """These blobs are deleted."""
        with writing(self.engine) as connection:
            add_ref(connection, keys)

    def unknown_blobs(self, keys: Sequence[str]) -> list[str]:
        """Those that no row names, not even as garbage: left by a writer that died."""
        with reading(self.engine) as connection:
            noted = select(blob_garbage.c.blob_key).where(blob_garbage.c.blob_key.in_(keys))
            known = set(connection.execute(noted).scalars())
            return [key for key in keys if key not in known and not is_referenced(connection, key)]

    def _forget(self, table: Any, condition: Any, limit: int = _PAGE) -> int:
        with writing(self.engine) as connection:
            query = select(table.c.id, table.c.blob_key).where(condition).limit(limit)
            rows = connection.execute(query).all()
            if not rows:
                return 0
            ids = [row.id for row in rows]
            # Two sweepers may see the same rows; only who removes them lets their blobs go.
            gone = connection.execute(
                delete(table).where(table.c.id.in_(ids)).returning(table.c.blob_key)
            )
            keys = list(gone.scalars())
            release_ref(connection, keys, self.clock.time())
        return len(keys)

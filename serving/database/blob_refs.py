"""References to blobs: assets, uploaded files, checkpoints, previews; and what nobody refers to.

Every writer chooses a fresh key (`storage.new_key`), and only rows that exist let another row name
their blob. So when the last reference goes nobody can name the key again: it is noted as garbage,
and a sweeper deletes the blob after a while, which lets whoever reads it just then finish.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    delete,
    func,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from calotype.serving.core.errors import Conflict, NotFound, QuotaExceeded
from calotype.serving.database.connection import reading, writing
from calotype.serving.database.repository import Repository, column_values, upsert
from calotype.serving.database.schema.review_tables import held_images, picture_places
from calotype.serving.database.schema.tables import (
    assets,
    blob_garbage,
    checkpoints,
    files,
    previews,
    teams,
)
from calotype.serving.jobs.records import AssetRecord, FileRecord

_REFERRING = (assets, files, checkpoints, previews, held_images)
_PAGE = 200
JOB_INPUT = "job_input"
"""Purpose of a file that came with a request; it is not listed."""
BATCH_OUTPUT = "batch_output"
"""Purpose of a file with the answers of a batch, pictures among them."""
FILE = "file"
"""Kind of a place of pictures that is a file: the output of a batch."""
AT_ONCE = 0.0
"""Since when blobs are garbage that needs no grace period."""


def _named(table: Any) -> Any:
    return select(literal(1)).where(table.c.blob_key == bindparam("key"))


# Built once: SQLAlchemy takes longer to put a statement together than SQLite to run it.
_REFERENCE = union_all(*map(_named, _REFERRING)).limit(1)
_NO_GARBAGE = delete(blob_garbage).where(
    blob_garbage.c.blob_key.in_(bindparam("keys", expanding=True))
)
_GARBAGE = (
    select(blob_garbage.c.blob_key)
    .where(
        blob_garbage.c.since <= bindparam("moment"),
        blob_garbage.c.blob_key.not_in(bindparam("besides", expanding=True)),
    )
    .order_by(blob_garbage.c.since)
    .limit(bindparam("most"))
)
_ASSET = select(assets).where(assets.c.id == bindparam("asset"))
_ASSET_OF_TEAM = _ASSET.where(assets.c.team_id == bindparam("team"))
_FILE = select(files).where(files.c.id == bindparam("file"), files.c.team_id == bindparam("team"))


def add_ref(connection: Connection, keys: Iterable[str]) -> None:
    """A new row refers to these blobs: they are no garbage any more."""
    wanted = list(keys)
    if wanted:
        connection.execute(_NO_GARBAGE, {"keys": wanted})


def release_ref(connection: Connection, keys: Iterable[str], now: float) -> None:
    """A row that referred to these blobs is gone: those without another one become garbage."""
    for key in sorted(set(keys)):
        if not is_referenced(connection, key):
            insert: Any = (
                postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            )(blob_garbage)
            values = {"blob_key": key, "since": now}
            connection.execute(insert.values(values).on_conflict_do_nothing())


def discard(connection: Connection, keys: Iterable[str]) -> list[str]:
    """Like `release_ref`, for blobs that must not be kept any longer; those without a reference."""
    gone = [key for key in sorted(set(keys)) if not is_referenced(connection, key)]
    for key in gone:
        upsert(connection, blob_garbage, {"blob_key": key, "since": AT_ONCE}, ["blob_key"])
    return gone


def _some(table: Any, *conditions: ColumnElement[bool]) -> Select[tuple[str]]:
    return select(table.c.id).where(*conditions).limit(bindparam("most"))


def not_in_files() -> ColumnElement[bool]:
    """Of an asset: no file holds its bytes, as the output of a batch does."""
    same = and_(picture_places.c.sha256 == assets.c.sha256, picture_places.c.kind == FILE)
    return ~select(picture_places.c.holder).where(same).exists()


def is_referenced(connection: Connection, key: str) -> bool:
    return connection.execute(_REFERENCE, {"key": key}).first() is not None


_OVER_ASSETS = _some(assets, assets.c.expires <= bindparam("moment"), not_in_files())
_OVER_FILES = _some(files, files.c.expires <= bindparam("moment"))
_OF_FILE = _some(files, files.c.id == bindparam("file"), files.c.team_id == bindparam("team"))


class BlobRefs(Repository):
    """Assets, uploaded files, and the blobs that they name."""

    def is_named(self, key: str) -> bool:
        """Whether a row names the blob."""
        with reading(self.engine) as connection:
            return is_referenced(connection, key)

    # -- assets --------------------------------------------------------------------------------

    def get_asset(self, asset_id: str, team_id: str | None = None) -> AssetRecord | None:
        query = _ASSET if team_id is None else _ASSET_OF_TEAM
        with reading(self.engine) as connection:
            row = connection.execute(query, {"asset": asset_id, "team": team_id}).mappings().first()
        return None if row is None else AssetRecord(**row)

    def delete_asset(self, asset_id: str, team_id: str) -> bool:
        """Forgets an image and its previews; False when the team has none of that id."""
        now = self.clock.time()
        there = or_(assets.c.expires.is_(None), assets.c.expires > now)
        mine = and_(assets.c.id == asset_id, assets.c.team_id == team_id, there)
        with writing(self.engine, durable=True) as connection:
            asset = connection.execute(select(assets).where(mine)).mappings().first()
            if asset is None:
                return False
            expired = update(assets).where(assets.c.id == asset_id).values(expires=now)
            connection.execute(expired)  # kept where a file holds it
            gone = delete(assets).where(assets.c.id == asset_id, not_in_files())
            removed = connection.execute(gone.returning(assets.c.blob_key)).scalars().all()
            places = select(picture_places.c.position).where(
                picture_places.c.sha256 == asset["sha256"],
                picture_places.c.holder == asset["job_id"],
            )
            shown = delete(previews).where(
                previews.c.job_id == asset["job_id"], previews.c.image_index.in_(places)
            )
            left = connection.execute(shown.returning(previews.c.blob_key)).scalars()
            release_ref(connection, [*removed, *left], now)
        return True

    def existing_assets(self, asset_ids: Sequence[str]) -> set[str]:
        """Those of these images that are neither deleted nor taken down nor over."""
        there = or_(assets.c.expires.is_(None), assets.c.expires > self.clock.time())
        query = select(assets.c.id).where(assets.c.id.in_(list(asset_ids)), there)
        with reading(self.engine) as connection:
            return set(connection.execute(query).scalars())

    def expire_assets(self, limit: int = _PAGE) -> int:
        """Forgets images whose time is over; how many there were.

        Those that a file holds are kept with it, so that a takedown finds both by what they show.
        """
        return self._forget(assets, _OVER_ASSETS, limit, moment=self.clock.time())

    # -- files ---------------------------------------------------------------------------------

    def check_room(self, team_id: str, size: int, most_bytes: int) -> None:
        """Raises QuotaExceeded when the files of a team would have more than ``most_bytes``."""
        with reading(self.engine) as connection:
            _check_room(connection, team_id, size, most_bytes)

    def add_file(
        self,
        file: FileRecord,
        pictures: Collection[str] = (),
        *,
        most_bytes: int | None = None,
    ) -> None:
        """Args:
            pictures: the assets whose bytes are in the file.
            most_bytes: of all files of the team.

        Raises:
            Conflict: one of them is gone by now, so the file must be written without it.
            QuotaExceeded: there are more than ``most_bytes``.
        """
        with writing(self.engine, durable=True) as connection:
            _check_quota(connection, file, most_bytes)
            connection.execute(files.insert().values(column_values(file)))
            digests = _digests_of(connection, pictures)
            if digests:
                rows = [
                    {"sha256": digest, "kind": FILE, "holder": file.id, "position": 0}
                    for digest in sorted(digests)
                ]
                connection.execute(picture_places.insert(), rows)
            add_ref(connection, [file.blob_key])

    def share_blob(self, file: FileRecord, *, most_bytes: int | None = None) -> FileRecord | None:
        """Adds a file with the blob of another one of its team that has the same bytes.

        Returns:
            The file as it was added; None = there is no other, so its bytes must be stored first.

        Raises:
            QuotaExceeded: see `add_file`.
        """
        mine = and_(files.c.team_id == file.team_id, files.c.sha256 == file.sha256)
        same = select(files.c.blob_key).where(mine).limit(1).with_for_update(read=True)
        with writing(self.engine, durable=True) as connection:
            key = connection.execute(same).scalar_one_or_none()
            if key is None:
                return None
            _check_quota(connection, file, most_bytes)
            file = replace(file, blob_key=key)
            connection.execute(files.insert().values(column_values(file)))
        return file

    def get_file(self, file_id: str, team_id: str) -> FileRecord | None:
        with reading(self.engine) as connection:
            row = connection.execute(_FILE, {"file": file_id, "team": team_id}).mappings().first()
        return None if row is None else FileRecord(**row)

    def find_same(self, team_id: str, sha256: str) -> FileRecord | None:
        """A file of the team with these bytes, if it still has one."""
        query = select(files).where(files.c.team_id == team_id, files.c.sha256 == sha256).limit(1)
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else FileRecord(**row)

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
        if not self._forget(files, _OF_FILE, file=file_id, team=team_id):
            raise NotFound(f"There is no file '{file_id[:80]}'.")

    def expire_files(self, limit: int = _PAGE) -> int:
        return self._forget(files, _OVER_FILES, limit, moment=self.clock.time())

    # -- garbage -------------------------------------------------------------------------------

    def garbage(
        self, noted_before: float, limit: int = _PAGE, besides: Collection[str] = ()
    ) -> list[str]:
        """Keys that nobody has referred to since ``noted_before``; still nobody does.

        Args:
            besides: keys that are left out.
        """
        wanted = {"moment": noted_before, "besides": sorted(besides), "most": limit}
        if not self.finds(_GARBAGE, wanted):
            return []
        with writing(self.engine) as connection:
            keys = list(connection.execute(_GARBAGE, wanted).scalars())
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

    def _forget(
        self, table: Any, query: Select[tuple[str]], limit: int = _PAGE, **values: object
    ) -> int:
        wanted = values | {"most": limit}
        if not self.finds(query, wanted):
            return 0
        with writing(self.engine) as connection:
            ids = list(connection.execute(query, wanted).scalars())
            if not ids:
                return 0
            # Two sweepers may see the same rows; only who removes them lets their blobs go.
            gone = connection.execute(
                delete(table).where(table.c.id.in_(ids)).returning(table.c.blob_key)
            )
            keys = list(gone.scalars())
            release_ref(connection, keys, self.clock.time())
            if table is files:
                in_files = picture_places.c.holder.in_(ids)
                connection.execute(delete(picture_places).where(in_files))
        return len(keys)


def _digests_of(connection: Connection, pictures: Collection[str]) -> set[str]:
    """The SHA-256 of each of these assets, which stay until the transaction ends."""
    found: dict[str, str] = {}
    names = sorted(pictures)
    for start in range(0, len(names), _PAGE):
        some = assets.c.id.in_(names[start : start + _PAGE])
        query = select(assets.c.id, assets.c.sha256).where(some).with_for_update(read=True)
        found |= {row.id: row.sha256 for row in connection.execute(query)}
    gone = [name for name in names if name not in found]
    if gone:
        raise Conflict(f"The picture '{gone[0]}' is gone, and {len(gone) - 1} others.", code="gone")
    return set(found.values())


def _check_quota(connection: Connection, file: FileRecord, most_bytes: int | None) -> None:
    """`BlobRefs.check_room` while nobody else adds a file of the team."""
    if most_bytes is None:
        return
    connection.execute(select(teams.c.id).where(teams.c.id == file.team_id).with_for_update())
    _check_room(connection, file.team_id, file.size, most_bytes)


def _check_room(connection: Connection, team_id: str, size: int, most_bytes: int) -> None:
    query = select(func.sum(files.c.size)).where(files.c.team_id == team_id)
    taken = int(connection.execute(query).scalar() or 0)
    if taken + size > most_bytes:
        raise QuotaExceeded(
            f"Your team keeps files of {taken:,} bytes and may keep {most_bytes:,}; this one has "
            f"{size:,}. Delete some (DELETE /v1/files/{{id}}), or wait until they expire.",
            code="insufficient_quota",
            param="file",
        )

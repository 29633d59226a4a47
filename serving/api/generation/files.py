"""Files of a team: bytes in the blob store and their row in the database."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from calotype.serving.api.http.failures import quarantined
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import NotFound
from calotype.serving.database.blob_refs import BATCH_OUTPUT, JOB_INPUT
from calotype.serving.jobs.records import FileRecord, new_id
from calotype.serving.storage import new_key, stream_key


async def find_file(gateway: Gateway, file_id: str, team_id: str) -> FileRecord:
    """Raises NotFound when the team has no such file, or it has expired."""
    file = await asyncio.to_thread(gateway.database.files.get_file, file_id, team_id)
    if file is None:
        raise NotFound(f"There is no file '{file_id[:80]}'.")
    origins = gateway.database.origins
    held = file.purpose == BATCH_OUTPUT
    if held and await asyncio.to_thread(origins.quarantined_file, file_id):
        raise quarantined(f"A picture in the file '{file_id}'")
    if file.expires is not None and file.expires <= gateway.database.clock.time():
        raise NotFound(f"The file '{file_id}' has expired.", code="expired")
    return file


def keep_file(
    gateway: Gateway,
    team_id: str,
    data: bytes,
    kind: str,
    *,
    purpose: str,
    filename: str,
    content_type: str,
    expires: float | None,
    pictures: Collection[str] = (),
) -> FileRecord:
    """Stores bytes as a file of the team; once, where it has another file with the same bytes.

    Args:
        kind: ending of the blob's key, such as ``png``.
        expires: seconds since the epoch; None = never.
        pictures: the assets whose bytes are in the file.

    Raises:
        StorageFailed: the bytes or the row cannot be written.
        Conflict: one of the pictures is gone by now.
        QuotaExceeded: the team keeps too many bytes.
    """
    file = FileRecord(
        id=new_id("file"),
        team_id=team_id,
        purpose=purpose,
        filename=re.sub(r"[\x00-\x1f\x7f]", "_", filename)[:255],
        content_type=content_type,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        blob_key="",
        created=gateway.database.clock.time(),
        expires=expires,
    )
    files, most = gateway.database.files, gateway.settings.team_file_bytes
    files.check_room(team_id, file.size, most)  # before anything is stored
    shared = None if pictures else files.share_blob(file, most_bytes=most)
    if shared is not None:
        return shared
    file = replace(file, blob_key=new_key(team_id, data, kind))
    gateway.blobs.put(file.blob_key, data)
    files.add_file(file, pictures, most_bytes=most)
    return file


def keep_same(
    gateway: Gateway, team_id: str, sha256: str, kept_seconds: float
) -> FileRecord | None:
    """A further file with bytes that the team has; None where it has them no more."""
    files, now = gateway.database.files, gateway.database.clock.time()
    same = files.find_same(team_id, sha256)
    if same is None:
        return None
    return files.share_blob(
        replace(
            same,
            id=new_id("file"),
            purpose=JOB_INPUT,
            created=now,
            expires=now + kept_seconds,
        )
    )


def keep_stream(
    gateway: Gateway,
    team_id: str,
    parts: Iterable[bytes],
    kind: str,
    *,
    purpose: str,
    filename: str,
    content_type: str,
    expires: float,
    pictures: Collection[str] = (),
) -> FileRecord:
    """`keep_file` for what does not fit into memory.

    Args:
        pictures: the assets whose bytes are in the file; looked at when it is written.

    Raises:
        StorageFailed: the bytes or the row cannot be written.
        Conflict: one of the pictures is gone by now.
    """
    digest, size = hashlib.sha256(), 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        for part in parts:
            digest.update(part)
            size += len(part)
            yield part

    key = stream_key(team_id, kind)
    gateway.blobs.put_parts(key, measured())
    file = FileRecord(
        id=new_id("file"),
        team_id=team_id,
        purpose=purpose,
        filename=filename,
        content_type=content_type,
        size=size,
        sha256=digest.hexdigest(),
        blob_key=key,
        created=gateway.database.clock.time(),
        expires=expires,
    )
    gateway.database.files.add_file(file, pictures)
    return file

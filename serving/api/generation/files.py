"""Files of a team: bytes in the blob store and their row in the database."""

from __future__ import annotations

import asyncio
import hashlib
import re

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import NotFound
from calotype.serving.jobs.records import FileRecord, new_id
from calotype.serving.storage import content_key


async def find_file(gateway: Gateway, file_id: str, team_id: str) -> FileRecord:
    """Raises NotFound when the team has no such file, or it has expired."""
    file = await asyncio.to_thread(gateway.database.files.get_file, file_id, team_id)
    if file is None:
        raise NotFound(f"There is no file '{file_id[:80]}'.")
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
) -> FileRecord:
    """Stores bytes as a file of the team.

    Args:
        kind: ending of the blob's key, such as ``png``.
        expires: seconds since the epoch; None = never.

    Raises:
        StorageFailed: the bytes or the row cannot be written.
    """
    key = content_key(team_id, data, kind)
    gateway.blobs.put(key, data)
    file = FileRecord(
        id=new_id("file"),
        team_id=team_id,
        purpose=purpose,
        filename=re.sub(r"[\x00-\x1f\x7f]", "_", filename)[:255],
        content_type=content_type,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        blob_key=key,
        created=gateway.database.clock.time(),
        expires=expires,
    )
    gateway.database.files.add_file(file)
    return file

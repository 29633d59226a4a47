"""Signs the heads of audit logs and keeps them in the database and in the object store.

The key is the gateway's: the moderators, which write the logs, hand their heads to the database and
cannot sign. A head that was signed is never taken back, so it says for ever what a log held.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

from calotype.moderation.records.heads import HeadKey, SignedHead
from calotype.serving.core.protocols import BlobStore, ListedBlobStore
from calotype.serving.database.database import Database
from calotype.serving.storage import HEADS_PREFIX

log = logging.getLogger(__name__)

AUDIT_KEY = "CALOTYPE_AUDIT_KEY"
"""The key that signs heads: 64 hexadecimal digits. Every gateway of a service has the same one."""

_ODD = re.compile(r"[^A-Za-z0-9_-]")


class HeadSigner:
    def __init__(self, database: Database, blobs: BlobStore, key: HeadKey) -> None:
        self._heads, self._blobs, self._key = database.audit_heads, blobs, key

    async def work(self, pause: float) -> float:
        await asyncio.to_thread(self.sign_all)
        return pause

    def sign_all(self) -> int:
        """Signs what waits; how many heads. Raises StorageFailed: the rest is signed later."""
        self._heads.note_people_log()
        count = 0
        while waiting := self._heads.unsigned():
            for head in waiting:
                signed = self._key.sign(head)
                # The store first: what the database calls signed is in both.
                self._blobs.put(object_key(signed), signed.to_bytes())
                self._heads.record(signed)
                count += 1
        return count


def object_key(signed: SignedHead) -> str:
    """Where the object store keeps a head. Whatever a log is called, this is a key."""
    log = signed.head.log
    name = f"{_ODD.sub('_', log)[:80]}-{hashlib.sha256(log.encode()).hexdigest()[:12]}"
    return f"{HEADS_PREFIX}{name}/{signed.head.lines:012d}.json"


def stored_heads(blobs: ListedBlobStore) -> Iterator[SignedHead]:
    """Every head in the object store. Raises AuditError: an object is no head."""
    for key, _ in blobs.entries(HEADS_PREFIX):
        yield SignedHead.from_bytes(blobs.get(key))


def head_key(
    data_dir: pathlib.Path | None, variables: Mapping[str, str] = os.environ, *, make: bool = False
) -> HeadKey | None:
    """The key of this installation; None where there is none.

    Raises:
        AuditError: it is no key.
    """
    if text := variables.get(AUDIT_KEY, "").strip():
        return HeadKey.from_text(text)
    return None if data_dir is None else HeadKey.in_folder(data_dir, make=make)

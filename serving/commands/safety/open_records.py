"""Where the commands find what proves an audit log: database, object store and public keys."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from calotype.moderation.records.heads import Head, SignedHead, trusted
from calotype.serving.api.background.head_signer import head_key, stored_heads
from calotype.serving.config.environment import BLOB_URL, DATABASE_URL
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import ListedBlobStore
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.storage import open_blobs


@dataclass(frozen=True, slots=True)
class Records:
    """What stands beside the logs of one service."""

    data_dir: pathlib.Path
    database: Database | None
    """None where the data folder has none and the environment names none."""
    blobs: ListedBlobStore | None

    def heads(self, keys: Sequence[str] = ()) -> list[Head]:
        """All heads that were signed, from both places.

        Args:
            keys: public keys, in hexadecimal; none = this installation's own.

        Raises:
            AuditError: a head was changed, or is signed by another key.
        """
        found: set[SignedHead] = set()
        if self.database is not None:
            found |= set(self.database.audit_heads.signed())
        if self.blobs is not None:
            found |= set(stored_heads(self.blobs))
        own = head_key(self.data_dir)
        known = [key.strip().lower() for key in keys] or ([] if own is None else [own.public])
        return trusted(sorted(found, key=lambda signed: signed.head.lines), known)

    def actions(self, heads: Sequence[Head]) -> Iterator[JsonObject]:
        """What reviewers did. Raises AuditError: see `ReviewerAudit.actions`."""
        return iter(()) if self.database is None else self.database.reviewer_audit.actions(heads)


@contextlib.contextmanager
def open_records(data_dir: pathlib.Path) -> Iterator[Records]:
    """What the environment names, or what lies in the data folder."""
    url, blob_url = os.environ.get(DATABASE_URL), os.environ.get(BLOB_URL)
    if not url and (data_dir / "calotype.db").exists():
        url = sqlite_url(data_dir)
    assets = data_dir / "assets"
    if not blob_url and assets.is_dir():
        blob_url = assets.resolve().as_uri()
    database = Database.open(url) if url else None
    try:
        yield Records(data_dir, database, open_blobs(blob_url) if blob_url else None)
    finally:
        if database is not None:
            database.close()

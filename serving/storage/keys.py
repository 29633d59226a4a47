"""Names of blobs."""

from __future__ import annotations

import hashlib
import re
import secrets

from calotype.serving.core.errors import InvalidRequest

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
MAX_KEY_CHARS = 512
HEADS_PREFIX = "audit/heads/"
"""Where signed heads of audit logs are kept; no row of the database names these keys."""


def check_key(key: str) -> str:
    """Returns ``key`` when it names something inside the store.

    Raises:
        InvalidRequest: the key is empty, absolute, climbs out (``..``) or has odd characters.
    """
    if len(key) > MAX_KEY_CHARS or _KEY.fullmatch(key) is None:
        raise InvalidRequest(
            f"A blob key has letters, digits, '.', '_', '-' and '/' between its parts; "
            f"got {key[:80]!r}."
        )
    return key


def new_key(team_id: str, data: bytes, suffix: str) -> str:
    """A key that was never used: ``team/ab/abcd...-0123456789abcdef.png``, by the SHA-256 of the
    bytes.

    Nobody else will ever write under it or name it. So a key that no row names any more stays
    unnamed, and its blob can be deleted without looking for who is about to name it.
    """
    digest = hashlib.sha256(data).hexdigest()
    return check_key(f"{team_id}/{digest[:2]}/{digest}-{secrets.token_hex(8)}.{suffix}")


def stream_key(team_id: str, suffix: str) -> str:
    """Like `new_key`, for bytes that are not known before they are written."""
    return check_key(f"{team_id}/files/{secrets.token_hex(16)}.{suffix}")

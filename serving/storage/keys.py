"""Names of blobs."""

from __future__ import annotations

import hashlib
import re

from calotype.serving.core.errors import InvalidRequest

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
MAX_KEY_CHARS = 512


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


def content_key(team_id: str, data: bytes, suffix: str) -> str:
    """The key of ``data``: ``team/ab/abcd....png``. Equal bytes of one team have one key.

    Teams do not share keys: nobody can find out what another team has drawn.
    """
    digest = hashlib.sha256(data).hexdigest()
    return check_key(f"{team_id}/{digest[:2]}/{digest}.{suffix}")

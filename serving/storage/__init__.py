"""Where pictures lie: bytes under a key, written whole or not at all.

The gateway reads, the generator writes; a key is chosen by the writer (`new_key`).
"""

from __future__ import annotations

import pathlib
from urllib.parse import parse_qsl, unquote, urlsplit

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.protocols import ListedBlobStore
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.storage.gateway import GatewayBlobStore
from calotype.serving.storage.keys import (
    HEADS_PREFIX,
    MAX_KEY_CHARS,
    check_key,
    new_key,
    stream_key,
)
from calotype.serving.storage.objects import ObjectBlobStore

__all__ = [
    "HEADS_PREFIX",
    "MAX_KEY_CHARS",
    "FolderBlobStore",
    "ObjectBlobStore",
    "check_key",
    "new_key",
    "open_blobs",
    "stream_key",
]

_OPTIONS = ("endpoint", "region", "virtual_hosted_style_request", "skip_signature")


def open_blobs(url: str) -> ListedBlobStore:
    """The store behind ``url``.

    ``file:///absolute/folder``, ``s3://bucket/prefix`` or ``gs://bucket/prefix``; the latter two
    may end with ``?endpoint=https://...&region=...``. See `ObjectBlobStore` for credentials.
    ``http://gateway:8001`` is the internal port of the gateways, for a pod of a model.

    Raises:
        InvalidRequest: the URL names no place that pictures can be kept in.
    """
    parts = urlsplit(url)
    if parts.scheme in ("s3", "gs"):
        options = dict(parse_qsl(parts.query))
        unknown = sorted(set(options) - set(_OPTIONS))
        if not parts.netloc or unknown or parts.fragment or "@" in parts.netloc:
            hint = f"{unknown[0]!r} is no option of it" if unknown else "it names no bucket"
            raise InvalidRequest(
                f"The blob URL {_plain(url)!r} cannot be used: {hint}. "
                f"Options are {', '.join(_OPTIONS)}."
            )
        return ObjectBlobStore(f"{parts.scheme}://{parts.netloc}{parts.path}", options)
    if parts.scheme in ("http", "https") and parts.hostname and not parts.path.strip("/"):
        return GatewayBlobStore(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise InvalidRequest(
            f"The blob URL {_plain(url)!r} cannot be used: it must be file:///absolute/folder, "
            "s3://bucket/prefix or gs://bucket/prefix."
        )
    if parts.query or parts.fragment or not parts.path.strip("/"):
        raise InvalidRequest(f"The blob URL {_plain(url)!r} names no folder.")
    return FolderBlobStore(pathlib.Path(unquote(parts.path)))


def _plain(url: str) -> str:
    """The URL without what somebody may have written before an ``@``."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"[:120]

"""Stored files in answers and requests, written as they are read: none is ever whole in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping

from starlette.responses import Response, StreamingResponse

from calotype.serving.core.protocols import PART_BYTES, BlobStore, OpenBlob


class StoredPictures:
    """Takes the place of stored pictures in a JSON text until it is written."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._keys: dict[str, str] = {}
        """Mark -> blob key, in their order in the text."""

    def mark(self, blob_key: str) -> str:
        """What stands in the text where the picture's base64 shall be; no client can guess it."""
        mark = f"picture-{secrets.token_hex(16)}"
        self._keys[mark] = blob_key
        return mark

    def check(self) -> None:
        """Raises NotFound or StorageFailed when one of the pictures cannot be read."""
        for blob_key in self._keys.values():
            self._blobs.open(blob_key).parts.close()

    def pieces(self, text: str) -> Iterator[bytes]:
        """The text with the pictures in it.

        Raises:
            NotFound, StorageFailed: a picture cannot be read.
        """
        for mark, blob_key in self._keys.items():
            before, found, text = text.partition(mark)
            if not found:
                raise ValueError("The text lacks a picture that was marked, or their order.")
            yield before.encode("utf-8")
            for part in self._blobs.open(blob_key).parts:
                yield base64.b64encode(part)
        yield text.encode("utf-8")


async def json_response(
    pictures: StoredPictures, content: Mapping[str, object], headers: Mapping[str, str]
) -> StreamingResponse:
    """A JSON answer with pictures in it. Raises what reading the first one raises."""
    parts = in_threads(pictures.pieces(json.dumps(content, ensure_ascii=False)))
    first = [await anext(parts)]
    with contextlib.suppress(StopAsyncIteration):
        first.append(await anext(parts))

    async def whole() -> AsyncIterator[bytes]:
        while first:
            yield first.pop(0)
        async for part in parts:
            yield part

    return StreamingResponse(whole(), media_type="application/json", headers=dict(headers))


def file_response(
    found: OpenBlob, media_type: str, headers: Mapping[str, str] = {}, *, head: bool = False
) -> Response:
    """A stored file as it is.

    Args:
        head: the answer to HEAD: nothing of the file is read.
    """
    known = {"content-length": str(found.size), "x-content-type-options": "nosniff"}
    if head:
        found.parts.close()
        return Response(media_type=media_type, headers={**known, **headers})
    parts = in_threads(found.parts)
    return StreamingResponse(parts, media_type=media_type, headers={**known, **headers})


async def in_threads(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Goes through a blocking iterator beside the event loop, and closes it."""
    try:
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            yield part
    finally:
        close = getattr(parts, "close", None)
        if close is not None:
            await asyncio.to_thread(close)


def from_loop(stream: AsyncIterator[bytes], loop: asyncio.AbstractEventLoop) -> Iterator[bytes]:
    """What comes to an event loop, for a thread beside it, in parts of about `PART_BYTES`."""

    async def gathered() -> bytes:
        part = bytearray()
        async for chunk in stream:
            part += chunk
            if len(part) >= PART_BYTES:
                break
        return bytes(part)

    while part := asyncio.run_coroutine_threadsafe(gathered(), loop).result():
        yield part

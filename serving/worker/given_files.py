"""Reads the images that a request names: its start, its mask, references, control maps."""

from __future__ import annotations

import asyncio

from calotype.serving.core.errors import InvalidRequest, NotFound
from calotype.serving.core.protocols import BlobStore
from calotype.serving.core.request import GenerationRequest


async def read_given_files(blobs: BlobStore, request: GenerationRequest) -> dict[str, bytes]:
    """Their files by name, which is their blob key.

    Raises:
        InvalidRequest: one of them is not kept any more.
    """
    names = [request.image, request.mask, *request.references]
    names += [control.image for control in request.controls]
    keys = list(dict.fromkeys(name for name in names if name is not None))
    try:
        found = [await asyncio.to_thread(blobs.get, key) for key in keys]
    except NotFound:
        raise InvalidRequest(
            "A picture that the request names is not kept any more; send it again.",
            param="image",
        ) from None
    return dict(zip(keys, found, strict=True))

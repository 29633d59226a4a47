"""A drawn image that waits for a reviewer: its file is sealed before it is stored.

Each image has a key of its own, which is made here and handed to the database's row of this image
alone: when the row goes, no copy of the file can be read again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from calotype.serving.core.decision import Decision
from calotype.serving.core.protocols import BlobStore
from calotype.serving.images.sealing import make_seal, seal
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import CONTENT_TYPES, HeldImage


async def hold_image(
    blobs: BlobStore,
    lease: Lease,
    index: int,
    data: bytes,
    decision: Decision,
    prompt: Sequence[str] = (),
) -> HeldImage:
    """Stores image ``index`` of a request sealed.

    Args:
        data: its file.
        decision: what was decided about it.
        prompt: the categories for which its prompt is held.

    Raises:
        StorageFailed: the file could not be written.
    """
    request, options = lease.request, lease.options
    asset_id = new_id("asset")
    key = f"{lease.team_id}/held/{asset_id}.sealed"
    seal_key = make_seal()
    sealed = await asyncio.to_thread(seal, data, seal_key, asset_id)
    await asyncio.to_thread(blobs.put, key, sealed)
    return HeldImage(
        asset_id=asset_id,
        blob_key=key,
        seal=seal_key,
        index=index,
        seed=request.seed + index,
        width=request.size.width,
        height=request.size.height,
        content_type=CONTENT_TYPES[options.output_format],
        sha256=hashlib.sha256(data).hexdigest(),
        categories=sorted({*decision.categories, *prompt}),
        decision_id=decision.id,
        policy=decision.policy,
    )

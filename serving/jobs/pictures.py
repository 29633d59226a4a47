"""From drawn pixels to a stored result: judge, encode, put.

The last part of every worker's work. The pixels that were judged are the pixels that are encoded;
a refused picture is neither encoded nor stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from calotype.serving.jobs.judging import JudgingPolicy, judge_patiently
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import (
    CONTENT_TYPES,
    BlockedImage,
    GenerationResult,
    ImageResult,
    openai_usage,
)
from calotype.serving.protocols import BlobStore, SafetyStage
from calotype.serving.request import ImageSize

if TYPE_CHECKING:
    from calotype.serving.request import Pixels


async def judge_and_store(
    lease: Lease,
    pictures: Sequence[Pixels],
    safety: SafetyStage,
    blobs: BlobStore,
    *,
    gpu_seconds: float,
    text_tokens: int,
    policy: JudgingPolicy | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> GenerationResult:
    """The result of a lease whose pictures are drawn, in order, at the size that was asked for.

    Raises:
        ModerationUnavailable: a picture could not be judged; nothing was stored.
        StorageFailed: a picture could not be stored; those before it were deleted again.
    """
    patience = policy or JudgingPolicy()
    decisions = [
        await judge_patiently(partial(safety.judge_image, pixels), patience, sleep)
        for pixels in pictures
    ]
    images: list[ImageResult] = []
    blocked: list[BlockedImage] = []
    try:
        for index, (pixels, decision) in enumerate(zip(pictures, decisions, strict=True)):
            if decision["blocked"]:
                blocked.append(_refused(index, decision))
            else:
                images.append(
                    await asyncio.to_thread(_store, lease, index, pixels, decision, blobs)
                )
    except BaseException:
        await asyncio.shield(discard(images, blobs))
        raise
    sizes = [ImageSize(pixels.shape[1], pixels.shape[0]) for pixels in pictures]
    return GenerationResult(
        images=images,
        blocked=blocked,
        metrics={"gpu_seconds": round(gpu_seconds, 4)},
        usage=openai_usage(text_tokens, sizes),
        decisions=decisions,
    )


async def discard(images: Sequence[ImageResult], blobs: BlobStore) -> None:
    """Deletes stored pictures of a job that was not completed: the lease was lost."""
    for image in images:
        await asyncio.to_thread(blobs.delete, image.blob_key)


def encode_picture(pixels: Pixels, output_format: str, compression: int = 100) -> bytes:
    """The file that a client gets.

    Args:
        output_format: ``png``, ``jpeg`` or ``webp``.
        compression: OpenAI's ``output_compression``: quality 0-100 of jpeg and webp.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    if output_format == "png":
        picture.save(file, "PNG", compress_level=6)
    elif output_format == "jpeg":
        # Above 95 JPEG files only grow.
        picture.save(file, "JPEG", quality=max(1, min(95, compression)))
    else:
        picture.save(file, "WEBP", quality=compression)
    return file.getvalue()


def _store(
    lease: Lease, index: int, pixels: Pixels, decision: dict[str, Any], blobs: BlobStore
) -> ImageResult:
    output_format = str(lease.input.get("output_format", "png"))
    compression = int(lease.input.get("output_compression", 100))
    data = encode_picture(pixels, output_format, compression)
    asset_id = new_id("asset")
    key = f"{time.strftime('%Y/%m/%d', time.gmtime())}/{asset_id}.{output_format}"
    blobs.put(key, data)
    return ImageResult(
        asset_id=asset_id,
        blob_key=key,
        index=index,
        seed=int(lease.request["seed"]) + index,
        width=pixels.shape[1],
        height=pixels.shape[0],
        content_type=CONTENT_TYPES[output_format],
        sha256=hashlib.sha256(data).hexdigest(),
        flagged=bool(decision.get("flagged", False)),
    )


def _refused(index: int, decision: dict[str, Any]) -> BlockedImage:
    return BlockedImage(
        index=index,
        categories=[str(name) for name in decision.get("categories", [])],
        decision_id=decision.get("id"),
        policy=decision.get("policy"),
    )

"""What is done with drawn pixels: enlarge, judge, encode, stamp, store.

The pixels that were judged are the pixels that are encoded; of a blocked picture nothing is stored.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype.moderation.errors import PictureError
from calotype.serving.engine.input_pictures import restore_outside
from calotype.serving.errors import InvalidRequest
from calotype.serving.jobs.judging import JudgingPolicy, judge_patiently, refusal
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import CONTENT_TYPES, BlockedImage, ImageResult
from calotype.serving.pictures import blur, encode_picture, enlarge, given_pictures
from calotype.serving.protocols import BlobStore, SafetyStage
from calotype.serving.request import GenerationRequest
from calotype.serving.storage import content_key

if TYPE_CHECKING:
    from calotype.serving.request import Pixels


JUDGED_SIDE = 1024
"""Given pictures are judged no larger than this."""


@dataclass(frozen=True, slots=True)
class HandedOut:
    """What became of the pictures of a request."""

    images: list[ImageResult]
    blocked: list[BlockedImage]
    decisions: list[dict[str, Any]]
    """One for each picture, in order."""
    judging_seconds: float
    """Judging and encoding, which go on at once."""


class PictureDesk:
    def __init__(self, safety: SafetyStage, blobs: BlobStore) -> None:
        self._safety, self._blobs = safety, blobs

    async def admit(
        self, lease: Lease, request: GenerationRequest, files: Mapping[str, bytes]
    ) -> None:
        """Judges the pictures that a request is drawn from, before anything is drawn.

        Raises:
            ContentBlocked: one of them does not pass.
            InvalidRequest: one of them cannot be read.
            ModerationUnavailable: one of them could not be judged.
        """
        try:
            seen = await asyncio.to_thread(given_pictures, request, files, JUDGED_SIDE)
        except PictureError as error:
            raise InvalidRequest(str(error), param="image") from error
        for decision in await asyncio.gather(*(self._judged(view, "", ()) for view in seen)):
            blocked = refusal("input", decision, str(lease.input.get("request_id", lease.job_id)))
            if blocked is not None:
                raise blocked

    async def hand_out(
        self,
        lease: Lease,
        request: GenerationRequest,
        drawn: Sequence[Pixels],
        files: Mapping[str, bytes],
    ) -> HandedOut:
        """Args:
            drawn: uint8 [height, width, 3] each, as the denoiser drew them.
            files: the pictures that the request names.

        Raises:
            ModerationUnavailable: a picture could not be judged, so none is stored.
            StorageFailed: a file could not be written.
        """
        pictures = list(drawn)
        if request.rendered_size != request.size:
            pictures = await asyncio.to_thread(
                lambda: [restore_outside(request, files, enlarge(p, request.size)) for p in drawn]
            )
        begun = time.monotonic()
        restore = None
        if request.mask is not None or request.expand is not None:
            restore = functools.partial(restore_outside, request, files)
        encode = functools.partial(_encoded, lease)
        # Encoded while they are judged: the file of a blocked picture is dropped unseen.
        seen = await asyncio.to_thread(given_pictures, request, files)
        decisions, encoded = await asyncio.gather(
            asyncio.gather(*(self._judged(pixels, request.prompt, seen) for pixels in pictures)),
            asyncio.to_thread(
                lambda: [encode(pixels, i, restore) for i, pixels in enumerate(pictures)]
            ),
        )
        seconds = time.monotonic() - begun
        images: list[ImageResult] = []
        blocked: list[BlockedImage] = []
        for index, (pixels, decision) in enumerate(zip(pictures, decisions, strict=True)):
            if decision["blocked"] and decision.get("verdict") != "BLUR":
                names = [str(name) for name in decision.get("categories", [])]
                blocked.append(
                    BlockedImage(index, names, decision.get("id"), decision.get("policy"))
                )
                continue
            data = encoded[index]
            if decision.get("verdict") == "BLUR":
                data = await asyncio.to_thread(encode, blur(pixels), index, None)
            images.append(await self._store(lease, request, index, data, decision))
        return HandedOut(images, blocked, list(decisions), seconds)

    async def _judged(self, pixels: Pixels, prompt: str, given: Sequence[Pixels]) -> dict[str, Any]:
        """The safety stage's decision; asked again while the stage comes back from a crash."""
        judge = functools.partial(self._safety.judge_image, pixels, prompt, given)
        return await judge_patiently(judge, JudgingPolicy(), asyncio.sleep)

    async def _store(
        self,
        lease: Lease,
        request: GenerationRequest,
        index: int,
        data: bytes,
        decision: Mapping[str, Any],
    ) -> ImageResult:
        kind = picture_format(lease)
        key = content_key(lease.team_id, data, kind)
        # Never deleted here: another job's picture may be the same. What no row names is swept.
        await asyncio.to_thread(self._blobs.put, key, data)
        return ImageResult(
            asset_id=new_id("asset"),
            blob_key=key,
            index=index,
            seed=request.seed + index,
            width=request.size.width,
            height=request.size.height,
            content_type=CONTENT_TYPES[kind],
            sha256=hashlib.sha256(data).hexdigest(),
            flagged=bool(decision.get("flagged")),
        )


def picture_format(lease: Lease) -> str:
    """``png``, ``jpeg`` or ``webp``."""
    return str(lease.input.get("output_format") or "png")


def _encoded(
    lease: Lease, pixels: Pixels, index: int, restore: Callable[[Pixels], Pixels] | None
) -> bytes:
    return encode_picture(
        pixels,
        picture_format(lease),
        lease.input.get("output_compression"),
        recipe=lease.stamp_for(index),
        restore=restore,
    )

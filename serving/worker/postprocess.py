"""What is done with drawn pixels: enlarge, judge, encode, stamp, store.

The pixels that were judged are the pixels that are encoded; of a blocked picture nothing is stored.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calotype.moderation.errors import ImageError
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.model.input_images import restore_outside
from calotype.serving.images.encode import blur, encode_image, enlarge, given_images
from calotype.serving.jobs.judging import (
    JudgingPolicy,
    held_categories,
    judge_patiently,
    judged_text,
    refusal,
    scope_of,
    unavailable,
    version_of,
)
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import CONTENT_TYPES, BlockedImage, HeldImage, ImageResult
from calotype.serving.storage import content_key
from calotype.serving.worker.held_image import hold_image

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


SWITCH_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Between attempts to have all of a request judged by one version; replicas switch in seconds."""
JUDGED_SIDE = 1024
"""Given pictures are judged no larger than this."""


@dataclass(frozen=True, slots=True)
class Finalized:
    """What became of the pictures of a request."""

    images: list[ImageResult]
    blocked: list[BlockedImage]
    decisions: list[dict[str, Any]]
    """One for each picture, in order."""
    judging_seconds: float
    """Judging and encoding, which go on at once."""
    prompt: dict[str, Any] | None = None
    """The prompt's decision, if it had to be judged again."""
    held: list[HeldImage] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the pictures of a request were drawn from."""

    files: Mapping[str, bytes]
    pixels: Sequence[Pixels]


class Postprocessor:
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
            seen = await asyncio.to_thread(given_images, request, files, JUDGED_SIDE)
        except ImageError as error:
            raise InvalidRequest(str(error), param="image") from error
        judging = (self._judged(lease, view, "", ()) for view in seen)
        for decision in await asyncio.gather(*judging):
            blocked = refusal("input", decision, str(lease.input.get("request_id", lease.job_id)))
            if blocked is not None:
                raise blocked

    async def finalize(
        self,
        lease: Lease,
        request: GenerationRequest,
        drawn: Sequence[Pixels],
        files: Mapping[str, bytes],
    ) -> Finalized:
        """Args:
            drawn: uint8 [height, width, 3] each, as the denoiser drew them.
            files: the pictures that the request names.

        Raises:
            ContentBlocked: the prompt, or a picture that the request brings, is refused by a policy
                that has changed since it was judged first.
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
        seen = await asyncio.to_thread(given_images, request, files)
        (decisions, prompt), encoded = await asyncio.gather(
            self._judged_whole(lease, request, pictures, Seen(files, seen)),
            asyncio.to_thread(
                lambda: [encode(pixels, i, restore) for i, pixels in enumerate(pictures)]
            ),
        )
        seconds = time.monotonic() - begun
        images: list[ImageResult] = []
        blocked: list[BlockedImage] = []
        held: list[HeldImage] = []
        because = lease.hold if prompt is None else held_categories(prompt)
        for index, (pixels, decision) in enumerate(zip(pictures, decisions, strict=True)):
            verdict = decision.get("verdict")
            waits = verdict == "REVIEW" or (because is not None and verdict != "BLOCK")
            if waits and "seal" in lease.input:
                data = encoded[index]
                held.append(
                    await hold_image(
                        self._blobs, lease, request, index, data, decision, because or ()
                    )
                )
                continue
            if decision["blocked"] and verdict != "BLUR":
                names = [str(name) for name in decision.get("categories", [])]
                blocked.append(
                    BlockedImage(index, names, decision.get("id"), decision.get("policy"))
                )
                continue
            data = encoded[index]
            if verdict == "BLUR":
                data = await asyncio.to_thread(encode, blur(pixels), index, None)
            images.append(await self._store(lease, request, index, data, decision))
        return Finalized(images, blocked, list(decisions), seconds, prompt, held)

    async def _judged_whole(
        self, lease: Lease, request: GenerationRequest, images: Sequence[Pixels], seen: Seen
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The decisions of all pictures, and the prompt's if it was made anew: of one version.

        Where the policy changed since the prompt was judged, the newer one judges everything.
        """
        for pause in SWITCH_PAUSES:
            judging = (self._judged(lease, p, request.prompt, seen.pixels) for p in images)
            decisions = list(await asyncio.gather(*judging))
            versions = [version_of(decision) for decision in decisions]
            now = versions[0]
            if versions == [now] * len(versions):
                if lease.version is None or now == list(lease.version):
                    return decisions, None
                prompt = await self._prompt_again(lease)
                if version_of(prompt) == now:
                    await self.admit(lease, request, seen.files)
                    return decisions, prompt
            await asyncio.sleep(pause)
        raise unavailable("its policy changed again and again")

    async def _prompt_again(self, lease: Lease) -> dict[str, Any]:
        """Raises ContentBlocked where it does not pass any more."""
        judge = functools.partial(
            self._safety.check_prompt, judged_text(lease.request), scope_of(lease.input)
        )
        decision = await judge_patiently(judge, JudgingPolicy(), asyncio.sleep)
        blocked = refusal("input", decision, str(lease.input.get("request_id", lease.job_id)))
        holds = "seal" in lease.input and held_categories(decision) is not None
        if blocked is not None and not holds:
            raise blocked
        return decision

    async def _judged(
        self, lease: Lease, pixels: Pixels, prompt: str, given: Sequence[Pixels]
    ) -> dict[str, Any]:
        """The safety stage's decision; asked again while the stage comes back from a crash."""
        scope = scope_of(lease.input)
        judge = functools.partial(self._safety.check_image, pixels, prompt, given, scope)
        return await judge_patiently(judge, JudgingPolicy(), asyncio.sleep)

    async def _store(
        self,
        lease: Lease,
        request: GenerationRequest,
        index: int,
        data: bytes,
        decision: Mapping[str, Any],
    ) -> ImageResult:
        kind = image_format(lease)
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


def image_format(lease: Lease) -> str:
    """``png``, ``jpeg`` or ``webp``."""
    return str(lease.input.get("output_format") or "png")


def _encoded(
    lease: Lease, pixels: Pixels, index: int, restore: Callable[[Pixels], Pixels] | None
) -> bytes:
    return encode_image(
        pixels,
        image_format(lease),
        lease.input.get("output_compression"),
        recipe=lease.stamp_for(index),
        restore=restore,
    )

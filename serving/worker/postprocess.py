"""What is done with drawn pixels: enlarge, check, encode, sign, store.

The pixels that were checked are the pixels that are encoded; of a blocked image nothing is stored.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype.moderation.errors import ImageError
from calotype.serving.core.decision import Decision, ImageContext
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.engine.model.input_images import restore_outside
from calotype.serving.images.encode import blur, encode_image, given_images
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.moderation_checks import (
    CheckRetries,
    check_with_retries,
    prompt_text,
    refusal,
    unavailable,
)
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import CONTENT_TYPES, BlockedImage, HeldImage, ImageResult
from calotype.serving.storage import new_key
from calotype.serving.worker.drawn_images import Fate, at_requested_size, fate_of
from calotype.serving.worker.held_image import hold_image
from calotype.serving.worker.output_check import Sources, check_output

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


SWITCH_PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Between attempts to have all of a request checked by one version; replicas switch in seconds."""
CHECKED_SIDE = 1024
"""Given images are checked no larger than this."""


@dataclass(frozen=True, slots=True)
class Finalized:
    """What became of the images of a request."""

    images: Sequence[ImageResult]
    blocked: Sequence[BlockedImage]
    held: Sequence[HeldImage]
    decisions: Sequence[Decision]
    """One for each image, in order."""
    check_seconds: float
    """Checking and encoding, which go on at once."""
    prompt: Decision | None = None
    """The prompt's decision, if it had to be checked again."""


class Postprocessor:
    """Args:
    retries: how the safety stage is asked again while it comes back from a crash.
    """

    def __init__(
        self, safety: SafetyStage, blobs: BlobStore, retries: CheckRetries | None = None
    ) -> None:
        self._safety, self._blobs = safety, blobs
        self._retries = retries or CheckRetries()

    async def admit(self, lease: Lease, files: Mapping[str, bytes]) -> None:
        """Checks the images that a request is drawn from, before anything is drawn.

        Raises:
            ContentBlocked: one of them does not pass.
            InvalidRequest: one of them cannot be read.
            ModerationUnavailable: one of them could not be checked.
        """
        try:
            seen = await asyncio.to_thread(given_images, lease.request, files, CHECKED_SIDE)
        except ImageError as error:
            raise InvalidRequest(str(error), param="image") from error
        for decision in await asyncio.gather(*(self._check_given(lease, view) for view in seen)):
            blocked = refusal("input", decision, lease.options.request_id)
            if blocked is not None:
                raise blocked

    async def finalize(self, lease: Lease, drawn: Sequence[Pixels], sources: Sources) -> Finalized:
        """Args:
            drawn: uint8 [height, width, 3] each, as the denoiser drew them.

        Raises:
            ContentBlocked: the prompt, or an image that the request brings, is refused by a policy
                that has changed since it was checked first.
            ModerationUnavailable: an image could not be checked, so none is stored.
            StorageFailed: a file could not be written.
        """
        request, files = lease.request, sources.files
        pixels = await asyncio.to_thread(at_requested_size, request, drawn, files)
        begun = time.monotonic()
        restore = None
        if request.mask is not None or request.expand is not None:
            restore = functools.partial(restore_outside, request, files)
        # Encoded while they are checked: the file of a blocked image is dropped unseen.
        (decisions, prompt), encoded = await asyncio.gather(
            self._check_all(lease, pixels, sources),
            asyncio.to_thread(
                lambda: [_encoded(lease, image, i, restore) for i, image in enumerate(pixels)]
            ),
        )
        seconds = time.monotonic() - begun
        review = lease.review_categories if prompt is None else prompt.review_categories
        images: list[ImageResult] = []
        blocked: list[BlockedImage] = []
        held: list[HeldImage] = []
        for index, (data, decision) in enumerate(zip(encoded, decisions, strict=True)):
            match fate_of(decision, held_by_prompt=review is not None, sealable=True):
                case Fate.HOLD:
                    held.append(
                        await hold_image(self._blobs, lease, index, data, decision, review or ())
                    )
                case Fate.BLOCK:
                    names = list(decision.categories)
                    blocked.append(BlockedImage(index, names, decision.id, decision.policy))
                case Fate.BLUR:
                    blurred = blur(pixels[index])
                    data = await asyncio.to_thread(_encoded, lease, blurred, index, None)
                    images.append(await self._store(lease, index, data, decision))
                case Fate.SHOW:
                    images.append(await self._store(lease, index, data, decision))
        return Finalized(images, blocked, held, decisions, seconds, prompt)

    async def _check_all(
        self, lease: Lease, images: Sequence[Pixels], sources: Sources
    ) -> tuple[list[Decision], Decision | None]:
        """The decisions of all images, and the prompt's if it was made anew: of one version.

        Where the policy changed since the prompt was checked, the newer one decides everything.
        """
        for pause in SWITCH_PAUSES:
            checks = (
                check_output(self._safety, lease, image, sources, self._retries) for image in images
            )
            decisions = list(await asyncio.gather(*checks))
            version = decisions[0].version
            if all(decision.version == version for decision in decisions):
                if lease.prompt_policy in (None, version):
                    return decisions, None
                prompt = await self._check_prompt(lease)
                if prompt.version == version:
                    await self.admit(lease, sources.files)
                    return decisions, prompt
            await asyncio.sleep(pause)
        raise unavailable("its policy changed again and again")

    async def _check_prompt(self, lease: Lease) -> Decision:
        """Raises ContentBlocked where it does not pass any more."""
        options = lease.options
        check = functools.partial(
            self._safety.check_prompt, prompt_text(lease.request), options.scope
        )
        decision = await check_with_retries(check, self._retries, asyncio.sleep)
        blocked = refusal("input", decision, options.request_id)
        if blocked is not None and decision.review_categories is None:
            raise blocked
        return decision

    async def _check_given(self, lease: Lease, pixels: Pixels) -> Decision:
        context = ImageContext.of_upload(lease.options.scope)
        check = functools.partial(self._safety.check_image, pixels, context)
        return await check_with_retries(check, self._retries, asyncio.sleep)

    async def _store(
        self, lease: Lease, index: int, data: bytes, decision: Decision
    ) -> ImageResult:
        request, kind = lease.request, lease.options.output_format
        key = new_key(lease.team_id, data, kind)
        # Never deleted here: nobody knows whether the row was written. What no row names is swept.
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
            flagged=decision.flagged,
        )


def _encoded(
    lease: Lease, pixels: Pixels, index: int, restore: Callable[[Pixels], Pixels] | None
) -> bytes:
    options = lease.options
    return encode_image(
        pixels,
        options.output_format,
        options.output_compression,
        recipe=lease.file_recipe(index),
        restore=restore,
    )

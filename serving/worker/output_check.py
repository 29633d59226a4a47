"""The one place where drawn images are checked: previews and finished images alike.

Both are checked with all that is known of their request, because rules combine what an image shows
with what it was drawn for and from. Who shows an image has its decision from here.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype.moderation.errors import ImageError
from calotype.serving.core.decision import Decision, ImageContext
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.core.request import GenerationRequest
from calotype.serving.images.encode import given_images
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.moderation_checks import CheckRetries, check_with_retries

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


@dataclass(frozen=True, slots=True)
class Sources:
    """What the images of a request are drawn from."""

    files: Mapping[str, bytes]
    """The images that the request names, by name."""
    pixels: Sequence[Pixels]
    """The same as the safety stage looks at them."""

    @classmethod
    async def of(cls, request: GenerationRequest, files: Mapping[str, bytes]) -> Sources:
        """Raises InvalidRequest: one of them cannot be read."""
        try:
            return cls(files, await asyncio.to_thread(given_images, request, files))
        except ImageError as error:
            raise InvalidRequest(str(error), param="image") from error


async def check_output(
    safety: SafetyStage, lease: Lease, pixels: Pixels, sources: Sources, retries: CheckRetries
) -> Decision:
    """The decision about an image of this lease, unfinished ones included.

    Raises:
        ModerationUnavailable: there is none, so it must not be shown.
    """
    context = ImageContext(lease.request.prompt, sources.pixels, lease.options.scope)
    check = functools.partial(safety.check_image, pixels, context)
    return await check_with_retries(check, retries, asyncio.sleep)

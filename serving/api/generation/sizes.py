"""Which size a request is answered with, and which one the denoiser draws for it.

What a client asks for is held to the model's limits. An edit without a size keeps its image's own,
whatever its proportions: the image is fitted to the whole patches that the model draws, and the
answer fitted back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from calotype.serving.api.generation.uploads import Images
from calotype.serving.api.http.schemas import GenerationBody
from calotype.serving.config import ImageModel
from calotype.serving.config.model.sampling import PATCH
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import ImageSize, Margins, same_proportions


@dataclass(frozen=True, slots=True)
class ChosenSize:
    size: ImageSize
    """Of the answer."""
    rendered_size: ImageSize
    """Of what the denoiser draws."""
    warning: str | None = None
    """What the client should know: its image was made smaller or larger, or cut."""


def choose_size(
    model: ImageModel, body: GenerationBody, given: Images, margins: Margins | None
) -> ChosenSize:
    """The size that the body names, else that of the image that is edited, else the default.

    Raises:
        InvalidRequest: the model cannot draw that.
    """
    spec = model.spec
    image = given.size and _with_margins(given.size, margins or Margins())
    asked = _asked(body)
    if asked is not None:
        size, param = asked
        if given.image is None:
            return ChosenSize(size, spec.check_size(size, param))
        spec.check_size(_whole_patches(size), param)
        rendered = spec.rendered_size(size)
        if image is None or same_proportions(image, size):
            return ChosenSize(size, rendered)
        if margins is not None:
            raise InvalidRequest(
                f"{param} is {size}, but the image with its margins is {image}; leave {param} out, "
                "or ask for one of the same proportions.",
                param=param,
            )
        return ChosenSize(
            size,
            rendered,
            f"The image is {image}, of other proportions than the size {size}: what lies beyond "
            "them at its edges was cut off evenly. Leave size out to keep all of it.",
        )
    usual = ImageSize.parse(spec.defaults.size)
    if image is None:
        return ChosenSize(usual, spec.check_size(usual, "size"))
    if given.image is None:  # looked at, not drawn over: only its proportions are kept
        size = _scaled(model, image, usual.pixels)
        return ChosenSize(size, spec.check_size(size, "image"))
    limits = spec.limits
    patches = _whole_patches(image)
    if patches.pixels <= limits.max_pixels and min(image.width, image.height) >= limits.min_side:
        spec.check_size(patches, "image")
        return ChosenSize(image, spec.rendered_size(image))
    size = _scaled(model, image, min(image.pixels, limits.max_pixels))
    return ChosenSize(
        size,
        spec.check_size(size, "image"),
        f"The image is {image}; {model.name} draws sides from {limits.min_side} pixels and at most "
        f"{limits.max_pixels:,} pixels in all, so the answer is {size}.",
    )


def _asked(body: GenerationBody) -> tuple[ImageSize, str] | None:
    if body.width is not None and body.height is not None:
        return ImageSize(body.width, body.height), "width"
    if body.size is not None and body.size != "auto":
        return ImageSize.parse(body.size), "size"
    return None


def _with_margins(image: ImageSize, margins: Margins) -> ImageSize:
    return ImageSize(
        image.width + margins.left + margins.right, image.height + margins.top + margins.bottom
    )


def _scaled(model: ImageModel, image: ImageSize, pixels: int) -> ImageSize:
    """Whole patches in the image's proportions: about ``pixels``, no side below the least."""
    scale = max(
        math.sqrt(pixels / image.pixels),
        model.spec.limits.min_side / min(image.width, image.height),
    )
    sides = [round(side * scale / PATCH) * PATCH for side in (image.width, image.height)]
    if sides[0] * sides[1] > model.spec.limits.max_pixels:
        sides = [int(side * scale / PATCH) * PATCH for side in (image.width, image.height)]
    return ImageSize(*(max(side, _least(model)) for side in sides))


def _whole_patches(size: ImageSize) -> ImageSize:
    return ImageSize(
        *(max(PATCH, round(side / PATCH) * PATCH) for side in (size.width, size.height))
    )


def _least(model: ImageModel) -> int:
    return math.ceil(model.spec.limits.min_side / PATCH) * PATCH

"""Images that a request brings: files in, checked and upright pixels out. No torch.

Files come from anybody, so nothing is decoded before its size is known, and whatever is wrong is
told with the request's field.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import (
    MAX_REFERENCES,
    GenerationRequest,
    ImageSize,
    Margins,
    check_reference,
    same_proportions,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calotype.serving.core.request import Pixels

    Region = NDArray[np.bool_]
    """[height, width], true where an image is drawn anew."""

MAX_FILE_BYTES = 64 * 1024**2
MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP")
_REFERENCE_PIXELS = 1024 * 1024
_PNG_DEPTH_AT = 24
"""Where a PNG file says how many bits a channel has."""


@dataclass(frozen=True, slots=True)
class InputImages:
    """What a request brings, at the sizes at which the model sees it.

    Attributes:
        start: the image to start from, with margins, uint8 [height, width, 3].
        redraw: what of it is drawn anew; None is everything.
        exact: ``start`` was not resized, so that what stays can stay to the bit.
        references: images to look at, at most about one megapixel each.
    """

    start: Pixels | None = None
    redraw: Region | None = None
    exact: bool = True
    references: tuple[Pixels, ...] = ()


def read_inputs(request: GenerationRequest, files: Mapping[str, bytes], side: int) -> InputImages:
    """Reads every image that a request names.

    Args:
        files: the bytes by the names that the request uses.
        side: width and height of what the model draws are multiples of this.

    Raises:
        InvalidRequest: an image is missing, cannot be read or does not fit; the field is named.
    """
    if len(request.references) > MAX_REFERENCES:
        raise InvalidRequest(
            f"references may hold at most {MAX_REFERENCES} pictures; got "
            f"{len(request.references)}.",
            param="references",
        )
    references = []
    for place, name in enumerate(request.references):
        param = f"references[{place}]"
        given = read_image(given_file(files, name, param), param)
        most = request.reference_uses[place].max_pixels if request.reference_uses else None
        references.append(fit_reference(given, side, param, most))
    start, redraw, exact = _read_start(request, files, request.rendered_size)
    return InputImages(start, redraw, exact, tuple(references))


def restore_outside(
    request: GenerationRequest, files: Mapping[str, bytes], pixels: Pixels
) -> Pixels:
    """A drawn image with the given one back where nothing was to be drawn.

    For images that were enlarged after they were drawn; the engine itself does it for others.
    Without a mask or margins the image as it is.
    """
    height, width = pixels.shape[:2]
    start, redraw, _ = _read_start(request, files, ImageSize(width, height))
    return pixels if start is None or redraw is None else merge(pixels, start, redraw)


def merge(pixels: Pixels, start: Pixels, redraw: Region) -> Pixels:
    """``pixels`` where ``redraw`` is true, ``start`` elsewhere, to the bit."""
    merged: Pixels = np.where(redraw[:, :, None], pixels, start)
    return merged


def _read_start(
    request: GenerationRequest, files: Mapping[str, bytes], size: ImageSize
) -> tuple[Pixels | None, Region | None, bool]:
    if request.image is None:
        for name in ("mask", "expand", "strength"):
            if getattr(request, name) is not None:
                raise InvalidRequest(f"{name} needs an image to act on; give one.", param=name)
        return None, None, True
    start = read_image(given_file(files, request.image, "image"), "image")
    redraw: Region | None = None
    if request.mask is not None:
        redraw = read_mask(given_file(files, request.mask, "mask"), start)
    if request.expand is not None:
        start, redraw = _expanded(start, redraw, request.expand)
    height, width = start.shape[:2]
    if (width, height) == (size.width, size.height):
        return start, redraw, True
    if request.expand is not None and not same_proportions(ImageSize(width, height), size):
        raise InvalidRequest(
            f"image is {width}x{height} with its margins, but size is {size}; leave size out, or "
            "ask for one of the same proportions.",
            param="image",
        )
    box = _kept_part(ImageSize(width, height), request.size)
    wanted = (size.width, size.height)
    picture = Image.fromarray(start).resize(wanted, Image.Resampling.LANCZOS, box)
    if redraw is not None:
        mask = Image.fromarray(redraw).resize(wanted, Image.Resampling.BOX, box)
        redraw = np.asarray(mask, dtype=bool)
    return np.asarray(picture), redraw, False


def _kept_part(image: ImageSize, size: ImageSize) -> tuple[float, float, float, float]:
    """The largest middle part of the proportions of ``size``: left, top, right and bottom.

    Everything where the proportions differ by rounding alone.
    """
    if same_proportions(image, size):
        return 0, 0, image.width, image.height
    width = min(image.width, image.height * size.width / size.height)
    height = min(image.height, image.width * size.height / size.width)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height


def read_image(data: bytes, param: str) -> Pixels:
    """RGB pixels of a PNG, JPEG or WebP file, upright; what is transparent is white.

    Raises:
        InvalidRequest: no such file, too large, animated, not 8 bit or not RGB.
    """
    return np.asarray(_flat(_decode(data, param)))


def read_mask(data: bytes, start: Pixels) -> Region:
    """What a mask marks: where it is transparent, or white if nothing of it is transparent.

    Raises:
        InvalidRequest: it cannot be read, has another size than the image, or marks nothing.
    """
    image = _decode(data, "mask")
    height, width = start.shape[:2]
    if image.size != (width, height):
        raise InvalidRequest(
            f"mask is {image.width}x{image.height}, but the image is {width}x{height}; both "
            "must have the same size.",
            param="mask",
        )
    marked: Region | None = None
    if image.has_transparency_data:
        marked = np.asarray(image.convert("RGBA"))[:, :, 3] < 128
    if marked is None or not marked.any():
        marked = np.asarray(_flat(image).convert("L")) >= 128
        # An image that is all white because it is all opaque marks everything, as it says.
    if not marked.any():
        raise InvalidRequest(
            "mask marks nothing; make the part to draw anew transparent or white.", param="mask"
        )
    return marked


def fit_reference(pixels: Pixels, side: int, param: str, max_pixels: int | None = None) -> Pixels:
    """A reference as FLUX.2 looks at it: about one megapixel at most, whole patches, centre cut.

    As ``Flux2Pipeline(image=...)`` prepares it, which has no ``max_pixels`` but one megapixel.

    Raises:
        InvalidRequest: it is too small or too narrow.
    """
    image = Image.fromarray(pixels)
    width, height = image.size
    check_reference(ImageSize(width, height), param)
    size = _bounded(ImageSize(width, height), side, max_pixels)
    if size != ImageSize(width, height):
        image = image.resize((size.width, size.height), Image.Resampling.LANCZOS)
    wide, high = size.width // side * side, size.height // side * side
    left, top = (size.width - wide) // 2, (size.height - high) // 2
    return np.asarray(image.crop((left, top, left + wide, top + high)))


def reference_tokens(size: ImageSize, side: int, max_pixels: int | None = None) -> int:
    """Image tokens that a reference of this size has, as `fit_reference` makes it."""
    seen = _bounded(size, side, max_pixels)
    return (seen.width // side) * (seen.height // side)


def _bounded(size: ImageSize, side: int, max_pixels: int | None) -> ImageSize:
    most = min(max_pixels or _REFERENCE_PIXELS, _REFERENCE_PIXELS)
    if size.pixels <= most:
        return size
    scale = math.sqrt(most / size.pixels)
    return ImageSize(max(side, int(size.width * scale)), max(side, int(size.height * scale)))


def _expanded(start: Pixels, redraw: Region | None, margins: Margins) -> tuple[Pixels, Region]:
    around = ((margins.top, margins.bottom), (margins.left, margins.right))
    sides = (*around[0], *around[1])
    if min(sides) < 0 or max(sides) == 0:
        raise InvalidRequest(
            "expand needs margins of 0 or more pixels, at least one of them above 0.",
            param="expand",
        )
    height, width = start.shape[:2]
    if (height + sum(around[0])) * (width + sum(around[1])) > MAX_PIXELS:
        raise InvalidRequest(
            f"expand makes a picture of more than {MAX_PIXELS:,} pixels; ask for smaller margins.",
            param="expand",
        )
    inside = np.zeros((height, width), dtype=bool) if redraw is None else redraw
    # The edge goes on into the margins: a start that the autoencoder can encode without a jump.
    wide = np.pad(start, (*around, (0, 0)), mode="edge")
    return wide, np.pad(inside, around, constant_values=True)


def given_file(files: Mapping[str, bytes], name: str, param: str) -> bytes:
    """Raises InvalidRequest: the file was not given."""
    data = files.get(name)
    if data is None:
        raise InvalidRequest(f"{param} names {name!r}, which was not given.", param=param)
    return data


def _decode(data: bytes, param: str) -> Image.Image:
    """The image, loaded and turned as its EXIF data says."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"{param} has {len(data):,} bytes; a picture may have at most {MAX_FILE_BYTES:,}.",
            param=param,
        )
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check(image, data, param)
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InvalidRequest(
            f"{param} is not a picture; send a PNG, JPEG or WebP file.", param=param
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(param) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as fault:
        raise InvalidRequest(f"{param} is damaged: {fault}; send it again.", param=param) from fault


def _check(image: Image.Image, data: bytes, param: str) -> None:
    """What the head of the file tells, before a pixel is decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(param)
    # Cameras put a thumbnail behind a JPEG, which is then of the format MPO and not animated.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise InvalidRequest(
            f"{param} is animated; send one frame of it as PNG, JPEG or WebP.", param=param
        )
    deep = image.format == "PNG" and data[_PNG_DEPTH_AT] > 8
    if deep or image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise InvalidRequest(f"{param} has 16 bits per channel; convert it to 8 bits.", param=param)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "La", "RGBa", "RGBX"):
        raise InvalidRequest(f"{param} is a {image.mode} picture; convert it to RGB.", param=param)


def _too_large(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} has more than {MAX_PIXELS:,} pixels; make it smaller.", param=param
    )


def _flat(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    ground = Image.new("RGBA", seen.size, (255, 255, 255, 255))
    return Image.alpha_composite(ground, seen).convert("RGB")

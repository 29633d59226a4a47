"""From drawn pixels to the file that a client gets: enlarge, blur, mark, encode.

The very pixels that the safety stage checked are the ones encoded here, but for the watermark: at
40 dB it is less than what jpeg 95 changes, and tests hold the stage to the same verdicts with it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from calotype.moderation.images.decode import blur as blur
from calotype.moderation.images.decode import decode_image
from calotype.serving.core.conditions import MAP_PREFIX
from calotype.serving.core.request import ImageSize
from calotype.serving.images.provenance import installation_marks
from calotype.serving.images.recipe_metadata import embed_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calotype.moderation.provenance.marks import Marks
    from calotype.serving.core.request import GenerationRequest, Pixels

JPEG_QUALITY_DEFAULT = 95
GIVEN_SIDE = 640
"""Longer side of a given image as the safety stage sees it: what its face detector reads."""


def enlarge(pixels: Pixels, size: ImageSize) -> Pixels:
    """The image at ``size``; untouched when it has that size already."""
    height, width = pixels.shape[:2]
    if (width, height) == (size.width, size.height):
        return pixels
    image = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.LANCZOS)
    return np.asarray(image)


def given_images(
    request: GenerationRequest, files: Mapping[str, bytes], side: int = GIVEN_SIDE
) -> list[Pixels]:
    """The images that a request is drawn from, as the safety stage looks at them.

    Control maps are among them, and the pictures that they were made of.

    Args:
        side: no side of them is longer; small ones are enough for faces.

    Raises:
        ImageError: one of them cannot be read.
    """
    maps = [name for name in files if name.startswith(MAP_PREFIX)]
    names = dict.fromkeys(
        (
            *request.references,
            *([request.image] if request.image else []),
            *(control.image for control in request.controls),
            *maps,
        )
    )
    found = []
    for name in names:
        for view in decode_image(files[name], name):
            picture = Image.fromarray(view)
            picture.thumbnail((side, side))
            found.append(np.asarray(picture))
    return found


def encode_image(
    pixels: Pixels,
    output_format: str,
    compression: int | None,
    *,
    recipe: Mapping[str, object] | None = None,
    restore: Callable[[Pixels], Pixels] | None = None,
    marks: Marks | None = None,
) -> bytes:
    """A png, jpeg or webp file that says in its XMP, its Content Credentials and its pixels that
    an AI model made it.

    Args:
        pixels: uint8 [height, width, 3].
        output_format: ``png``, ``jpeg`` or ``webp``.
        compression: OpenAI's ``output_compression``, the quality 0-100 of jpeg and webp.
        recipe: what the file carries besides; written here because it is signed with the rest.
        restore: gives back the pixels that a mask protects: not even the watermark changes them.
        marks: instead of those that the environment asks for.

    Raises:
        ProvenanceError: the image cannot be marked.
    """
    marks = marks or installation_marks()
    lossy = output_format in ("jpeg", "webp") and compression not in (None, 100)
    pixels, payload = marks.in_pixels(pixels, strong=lossy)
    if restore is not None:
        pixels = restore(pixels)
    data = _encoded(pixels, output_format, compression, marks.xmp())
    if recipe is not None:
        data = embed_recipe(data, recipe)
    return marks.signed(data, output_format, payload)


def _encoded(
    pixels: Pixels, output_format: str, compression: int | None, xmp: bytes | None
) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    options: dict[str, Any] = {} if xmp is None else {"xmp": xmp}
    match output_format:
        case "png":
            from PIL.PngImagePlugin import PngInfo

            info = PngInfo()
            if xmp is not None:
                info.add_itxt("XML:com.adobe.xmp", xmp.decode())
            options = {"format": "PNG", "pnginfo": info, "compress_level": 6}
        case "jpeg":
            quality = JPEG_QUALITY_DEFAULT if compression is None else max(1, compression)
            options |= {"format": "JPEG", "quality": quality, "subsampling": 0}
        case "webp":
            lossless = compression is None or compression == 100
            options |= {"format": "WEBP", "lossless": lossless}
            options["quality"] = 80 if compression is None else compression
        case _:
            raise ValueError(f"output_format must be png, jpeg or webp, got {output_format!r}")
    image.save(file, **options)
    return file.getvalue()

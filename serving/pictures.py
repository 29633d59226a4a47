"""From drawn pixels to the file that a client gets: enlarge, blur, mark, encode.

The very pixels that the safety stage judged are the ones encoded here.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from calotype.moderation.provenance import digital_source_xmp
from calotype.serving.request import ImageSize

if TYPE_CHECKING:
    from calotype.serving.request import Pixels

JPEG_QUALITY_DEFAULT = 95


def enlarge(pixels: Pixels, size: ImageSize) -> Pixels:
    """The picture at ``size``; untouched when it has that size already."""
    height, width = pixels.shape[:2]
    if (width, height) == (size.width, size.height):
        return pixels
    picture = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def blur(pixels: Pixels) -> Pixels:
    """The picture made unrecognisable: what a BLUR verdict serves."""
    radius = max(4.0, min(pixels.shape[:2]) / 12)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def encode_picture(pixels: Pixels, output_format: str, compression: int | None) -> bytes:
    """A png, jpeg or webp file that says in its XMP that an AI model made it.

    Args:
        pixels: uint8 [height, width, 3].
        output_format: ``png``, ``jpeg`` or ``webp``.
        compression: OpenAI's ``output_compression``, the quality 0-100 of jpeg and webp.
    """
    picture, file = Image.fromarray(pixels), io.BytesIO()
    xmp = digital_source_xmp()
    options: dict[str, Any]
    match output_format:
        case "png":
            from PIL.PngImagePlugin import PngInfo

            info = PngInfo()
            info.add_itxt("XML:com.adobe.xmp", xmp.decode())
            options = {"format": "PNG", "pnginfo": info, "compress_level": 6}
        case "jpeg":
            quality = JPEG_QUALITY_DEFAULT if compression is None else max(1, compression)
            options = {"format": "JPEG", "quality": quality, "subsampling": 0, "xmp": xmp}
        case "webp":
            lossless = compression is None or compression == 100
            options = {"format": "WEBP", "lossless": lossless, "xmp": xmp}
            options["quality"] = 80 if compression is None else compression
        case _:
            raise ValueError(f"output_format must be png, jpeg or webp, got {output_format!r}")
    picture.save(file, **options)
    return file.getvalue()

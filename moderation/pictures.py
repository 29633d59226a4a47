"""A picture file to the pixels that are judged: orientation, transparency, palettes, 16 bit.

Whatever a viewer could show of a file is judged: transparent parts on white and on black, every
frame of an animation up to a bound. What is no picture, or too large a one, is refused.
"""

from __future__ import annotations

import io
import pathlib
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from calotype.moderation.errors import PictureError

MAX_PIXELS = 50_000_000
MAX_FRAMES = 8


def read_picture(path: pathlib.Path) -> NDArray[np.uint8]:
    """The first view of a picture file, uint8 [height, width, 3]. Raises PictureError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}.") from None
    return decode_picture(data, str(path))[0]


def decode_picture(data: bytes, name: str = "the picture") -> list[NDArray[np.uint8]]:
    """Every view of a picture that somebody could see, first the plain one.

    Raises:
        PictureError: no picture, a damaged one, or more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            if picture.width * picture.height > MAX_PIXELS:
                raise PictureError(
                    f"{name} has {picture.width}x{picture.height} pixels; "
                    f"at most {MAX_PIXELS:,} can be judged."
                )
            views: list[NDArray[np.uint8]] = []
            for number, frame in enumerate(ImageSequence.Iterator(picture)):
                if number == MAX_FRAMES:
                    break
                views += _views(ImageOps.exif_transpose(frame))
    except PictureError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:  # fmt: skip
        raise PictureError(f"{name} is no picture that can be read: {error}.") from None
    return views


def _views(frame: Image.Image) -> list[NDArray[np.uint8]]:
    if frame.mode.startswith(("I", "F")):
        # 16 bit and float pictures: stretched to 8 bit, as viewers show them.
        deep = np.asarray(frame, dtype=np.float64)
        span = max(float(deep.max()) - float(deep.min()), 1.0)
        grey = ((deep - deep.min()) * (255.0 / span)).astype(np.uint8)
        return [np.repeat(grey[:, :, None], 3, axis=2)]
    if not frame.has_transparency_data:
        return [np.asarray(frame.convert("RGB"))]
    cut_out = frame.convert("RGBA")
    grounds = []
    for ground in ("white", "black"):
        canvas = Image.new("RGBA", cut_out.size, ground)
        grounds.append(np.asarray(Image.alpha_composite(canvas, cut_out).convert("RGB")))
    return grounds

"""Decodes an image file to the pixels to check: orientation, transparency, palettes, 16 bit.

Whatever a viewer could show of a file is checked: transparent parts on white and on black, every
frame of an animation, the colours with and without its profile, 16 bits cut and stretched. What
is not an image, has too many pixels or too many frames is refused.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFilter, ImageOps, ImageSequence, UnidentifiedImageError

from calotype.moderation.errors import ImageError

MAX_PIXELS = 50_000_000
"""Of all frames together."""
MAX_FRAMES = 8
"""Frames are not sampled: unsafe content could be in the one left out."""
MAX_PROFILE_BYTES = 4 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What browsers show, and TIFF. Pillow knows others; for one of them it starts a program."""

Pixels = NDArray[np.uint8]


def decode_image(data: bytes, name: str = "the picture") -> list[Pixels]:
    """Every view of an image that somebody could see, first the plain one.

    Raises:
        ImageError: no image, a damaged one, more than MAX_PIXELS or MAX_FRAMES.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what decoders say of damaged files, they raise too
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _decoded(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is no picture that can be read; give a png, jpeg, webp or gif file."
        ) from None
    except MemoryError:
        raise ImageError(f"{name} needs more memory than there is.") from None
    # Decoders raise whatever damaged data leads them to: EOFError, struct.error, KeyError ...
    except Exception as error:
        raise ImageError(f"{name} is no picture that can be read: {error}.") from None


def blur(pixels: Pixels) -> Pixels:
    """The image made unrecognisable: what a BLUR verdict serves, and what reviewers see first."""
    radius = max(4.0, min(pixels.shape[:2]) / 12)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _decoded(image: Image.Image, name: str) -> list[Pixels]:
    views: list[Pixels] = []
    pixels = 0
    for number, frame in enumerate(ImageSequence.Iterator(image)):
        if number == MAX_FRAMES:
            raise ImageError(f"{name} has more than {MAX_FRAMES} frames; give one of them.")
        pixels += frame.width * frame.height
        if pixels > MAX_PIXELS:
            frames = f" in {number + 1} frames" if number else ""
            raise ImageError(
                f"{name} has {frame.width}x{frame.height} pixels{frames}; "
                f"at most {MAX_PIXELS:,} can be judged."
            )
        views += _views(ImageOps.exif_transpose(frame))
    return views


def _views(frame: Image.Image) -> list[Pixels]:
    if frame.mode.startswith(("I", "F")):
        return _from_deep(frame)
    if frame.has_transparency_data:
        cut_out = frame.convert("RGBA")
        grounds = []
        for ground in ("white", "black"):
            canvas = Image.new("RGBA", cut_out.size, ground)
            grounds.append(np.asarray(Image.alpha_composite(canvas, cut_out).convert("RGB")))
        return grounds
    plain = frame.convert("RGB")
    profiled = _with_profile(frame)
    return [np.asarray(view) for view in (plain, profiled) if view is not None]


def _from_deep(frame: Image.Image) -> list[Pixels]:
    """16 bit and float images: as wide as their numbers reach, and cut to 8 bits."""
    deep = np.nan_to_num(np.asarray(frame, dtype=np.float64))
    low, high = float(deep.min()), float(deep.max())
    stretched = (deep - low) * (255.0 / max(high - low, 1e-9))
    top = 65535.0 if high > 255 else 255.0 if high > 1 else 1.0
    cut = np.clip(deep * (255.0 / top), 0, 255)
    return [
        np.repeat(np.rint(grey).astype(np.uint8)[:, :, None], 3, axis=2)
        for grey in (cut, stretched)
    ]


def _with_profile(frame: Image.Image) -> Image.Image | None:
    """The image as a viewer shows it that heeds its colour profile; None without one."""
    profile = frame.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(frame, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # no viewer can heed it either

"""Decodes an image file to the pixels to check: orientation, transparency, palettes, 16 bit.

Whatever a viewer could show of a file is checked: transparent parts on white and on black, every
frame of an animation, the colours with and without its profile, 16 bits cut and stretched. What
is not an image, has too many pixels or too many frames is refused.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFilter, ImageSequence, UnidentifiedImageError

from calotype.moderation.errors import ImageError
from calotype.moderation.images.containers import check_container, upright

MAX_PIXELS = 50_000_000
"""Of all frames together."""
MAX_FRAMES = 8
"""Frames are not sampled: unsafe content could be in the one left out."""
MAX_PROFILE_BYTES = 4 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What browsers show, and TIFF. Pillow knows others; for one of them it starts a program."""

_STRIP_ROWS = 64
"""Views are put together from strips: a picture of 50 megapixels is in memory once, as it is in
its file, and once as the view."""

Pixels = NDArray[np.uint8]


def decode_image(data: bytes, name: str = "the picture") -> list[Pixels]:
    """Every view of an image that somebody could see, first the plain one.

    Raises:
        ImageError: no image, a damaged one, more than MAX_PIXELS or MAX_FRAMES.
    """
    return list(iter_views(data, name))


def iter_views(
    data: bytes, name: str = "the picture", max_pixels: int | None = None
) -> Iterator[Pixels]:
    """`decode_image`, one view at a time: none is kept here when the next one is asked for.

    Args:
        max_pixels: of all frames together; None = MAX_PIXELS.

    Raises:
        ImageError: see `decode_image`.
    """
    views = _decoded(data, name, MAX_PIXELS if max_pixels is None else max_pixels)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what decoders say of damage, they raise too
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                view = next(views)
        except StopIteration:
            return
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
        yield view
        del view


def count_pixels(data: bytes, name: str = "the picture") -> int:
    """Of its first frame, by its head alone. Raises ImageError: it is no picture."""
    check_container(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.width * image.height
    except Exception:  # as in `iter_views`
        raise ImageError(
            f"{name} is no picture that can be read; give a png, jpeg, webp or gif file."
        ) from None


def blur(pixels: Pixels) -> Pixels:
    """The image made unrecognisable: what a BLUR verdict serves, and what reviewers see first."""
    radius = max(4.0, min(pixels.shape[:2]) / 12)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _decoded(data: bytes, name: str, max_pixels: int) -> Iterator[Pixels]:
    pixels = 0
    check_container(data, name)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        for number, frame in enumerate(ImageSequence.Iterator(image)):
            if number == MAX_FRAMES:
                raise ImageError(f"{name} has more than {MAX_FRAMES} frames; give one of them.")
            pixels += frame.width * frame.height
            if pixels > max_pixels:
                frames = f" in {number + 1} frames" if number else ""
                raise ImageError(
                    f"{name} has {frame.width}x{frame.height} pixels{frames}; "
                    f"at most {max_pixels:,} can be checked."
                )
            yield from _views(upright(frame, name))


def _views(frame: Image.Image) -> Iterator[Pixels]:
    frame.load()
    if frame.mode.startswith(("I", "F")):
        yield from _from_deep(frame)
    elif frame.has_transparency_data:
        for ground in ("white", "black"):
            yield _in_strips(frame, functools.partial(_on_ground, ground=ground))
    else:
        yield _in_strips(frame, lambda strip: strip.convert("RGB"))
        profiled = _with_profile(frame)
        if profiled is not None:
            yield profiled


def _in_strips(frame: Image.Image, seen: Callable[[Image.Image], Image.Image]) -> Pixels:
    """A view of a frame, made from strips of it."""
    view = np.empty((frame.height, frame.width, 3), np.uint8)
    for top in range(0, frame.height, _STRIP_ROWS):
        bottom = min(frame.height, top + _STRIP_ROWS)
        view[top:bottom] = np.asarray(seen(frame.crop((0, top, frame.width, bottom))))
    return view


def _on_ground(strip: Image.Image, ground: str) -> Image.Image:
    cut_out = strip.convert("RGBA")
    canvas = Image.new("RGBA", cut_out.size, ground)
    return Image.alpha_composite(canvas, cut_out).convert("RGB")


def _from_deep(frame: Image.Image) -> Iterator[Pixels]:
    """16 bit and float images: as wide as their numbers reach, and cut to 8 bits."""
    strips = [
        (0, top, frame.width, min(frame.height, top + _STRIP_ROWS))
        for top in range(0, frame.height, _STRIP_ROWS)
    ]

    def numbers(strip: tuple[int, int, int, int]) -> NDArray[np.float64]:
        return np.nan_to_num(np.asarray(frame.crop(strip), dtype=np.float64))

    ranges = [(found.min(), found.max()) for found in map(numbers, strips)]
    low, high = float(min(least for least, _ in ranges)), float(max(most for _, most in ranges))
    top = 65535.0 if high > 255 else 255.0 if high > 1 else 1.0
    for offset, factor in ((0.0, 255.0 / top), (low, 255.0 / max(high - low, 1e-9))):
        view = np.empty((frame.height, frame.width, 3), np.uint8)
        for strip in strips:
            grey = np.clip((numbers(strip) - offset) * factor, 0, 255)
            view[strip[1] : strip[3]] = np.rint(grey).astype(np.uint8)[:, :, None]
        yield view


def _with_profile(frame: Image.Image) -> Pixels | None:
    """The image as a viewer shows it that heeds its colour profile; None without one."""
    profile = frame.info.get("icc_profile")
    if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        change = ImageCms.buildTransform(source, target, frame.mode, "RGB")
        return _in_strips(frame, lambda strip: _applied(change, strip))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None  # no viewer can heed it either


def _applied(change: ImageCms.ImageCmsTransform, strip: Image.Image) -> Image.Image:
    found = ImageCms.applyTransform(strip, change)
    assert found is not None, "it is not applied in place"
    return found

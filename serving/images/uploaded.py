"""A picture that a client sends: what it is, whether it is sound, and the mask it may be.

Whatever a file claims to be, its first bytes decide what it is.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from calotype.moderation.errors import ImageError
from calotype.moderation.images.containers import (
    ORIENTATION,
    check_container,
    orientation,
    turned,
)
from calotype.moderation.images.decode import FORMATS
from calotype.serving.core.errors import InvalidRequest

MAX_FILE_BYTES = 50 * 1024 * 1024
MAX_PIXELS = 50_000_000
_MAX_OTHER_PIXELS = 25_000_000
"""Their decoders have the picture in memory several times."""
_STRIP_ROWS = 64
_KINDS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "MPO": "jpeg"}
"""What is kept as it comes. Cameras put a thumbnail behind a JPEG, which is then called MPO."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "La", "RGBa", "RGBX", "CMYK")
_MAX_PROFILE_BYTES = 4 * 2**20
_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
_PNG_DEPTH_AT = 24
"""Where a PNG file says how many bits a channel has."""
_LYING = range(5, 9)
"""How a camera was held that took a picture which lies on its side."""
_OPAQUE_BELOW = 128


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture that was read and looks sound."""

    data: bytes
    kind: str
    """``png``, ``jpeg`` or ``webp``."""
    width: int
    """As it is seen: turned as its EXIF data says."""
    height: int


def check_image(data: bytes, param: str) -> Upload:
    """Reads a picture; what is neither png, jpeg nor webp becomes a png.

    Raises:
        InvalidRequest: empty, too large, no picture of these formats, more than `MAX_PIXELS`,
            animated, or not of 8 bits of grey, RGB or CMYK.
    """
    if not data:
        raise InvalidRequest(f"{param} is empty.", code="empty_image_file", param=param)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest(
            f"{param} has {len(data):,} bytes; at most {MAX_FILE_BYTES:,} are possible.",
            code="image_file_too_large",
            param=param,
        )
    unreadable = InvalidRequest(
        f"{param} is no readable png or jpeg picture of at most {MAX_PIXELS:,} pixels, nor a "
        f"webp, avif, gif, bmp or tiff picture of at most {_MAX_OTHER_PIXELS:,}.",
        code="invalid_image",
        param=param,
    )
    try:
        check_container(data, param)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what decoders say of damage, they raise too
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                kind = _KINDS.get(str(image.format))
                most = MAX_PIXELS if kind in ("png", "jpeg") else _MAX_OTHER_PIXELS
                if image.width * image.height > most:
                    raise unreadable
                _check_kind(image, data, param)
                image.load()
                width, height = image.size  # a TIFF turns itself
                held = orientation(image, param)
                if held in _LYING:
                    width, height = height, width
                if kind is None or image.mode == "CMYK":
                    return Upload(_as_png(image, held), "png", width, height)
    except InvalidRequest:
        raise
    except ImageError as error:
        raise InvalidRequest(str(error), code="invalid_image", param=param) from None
    # Decoders raise whatever damaged data leads them to: EOFError, struct.error, KeyError ...
    except Exception:
        if data[4:12] in _HEIC:
            raise InvalidRequest(
                f"{param} is a HEIC picture, as phones take them; convert it to jpeg.",
                code="invalid_image",
                param=param,
            ) from None
        raise unreadable from None
    return Upload(data, kind, width, height)


def _check_kind(image: Image.Image, data: bytes, param: str) -> None:
    """Raises InvalidRequest for sound files that no model can be shown."""
    wrong = ""
    if getattr(image, "is_animated", False) and image.format != "MPO":
        wrong = "is animated; send one frame of it"
    elif (image.format == "PNG" and data[_PNG_DEPTH_AT] > 8) or image.mode[0] in "IF":
        wrong = "has 16 bits per channel; convert it to 8 bits"
    elif image.mode not in _MODES:
        wrong = f"is a {image.mode} picture; convert it to RGB"
    if wrong:
        raise InvalidRequest(f"{param} {wrong}.", code="invalid_image", param=param)


def _as_png(image: Image.Image, held: int) -> bytes:
    """What the model's own readers know: RGB, CMYK by its profile, turned as it was."""
    if image.mode == "CMYK":
        image = _from_cmyk(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    exif = Image.Exif()
    if held != 1:
        exif[ORIENTATION] = held
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, exif=exif, icc_profile=None)
    return file.getvalue()


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile and len(profile) <= _MAX_PROFILE_BYTES:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            converted = None  # a profile of something else: as if there were none
        if converted is not None:
            return converted
    return image.convert("RGB")


def read_mask(mask: Upload) -> bytes:
    """OpenAI's mask, where transparent means "draw anew", as a grey PNG: white = anew.

    Raises:
        InvalidRequest: it marks nothing.
    """
    with Image.open(io.BytesIO(mask.data)) as picture:
        picture.load()
        held = orientation(picture, "mask")
        marked = np.empty((picture.height, picture.width), np.uint8)
        for top in range(0, picture.height, _STRIP_ROWS):
            bottom = min(picture.height, top + _STRIP_ROWS)
            strip = picture.crop((0, top, picture.width, bottom))
            if picture.has_transparency_data:
                alpha = np.asarray(strip.convert("RGBA").getchannel("A"))
                marked[top:bottom] = (alpha < _OPAQUE_BELOW) * np.uint8(255)
            else:
                grey = np.asarray(strip.convert("L"))
                marked[top:bottom] = (grey >= _OPAQUE_BELOW) * np.uint8(255)
    if not marked.any():
        raise InvalidRequest(
            "mask marks nothing: make the region that shall be drawn anew transparent.",
            code="invalid_image",
            param="mask",
        )
    seen = Image.fromarray(marked, "L")
    file = io.BytesIO()
    turned(seen, held).save(file, "PNG")
    return file.getvalue()

"""A picture file of a data set as upright RGB pixels, or the reason why it is none.

Only what every trainer understands alike is taken: one frame, 8 bits, RGB or grey, CMYK with a
profile. Transparency is put on white.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from calotype.moderation.images.decode import FORMATS, MAX_PROFILE_BYTES
from calotype.serving.core.errors import DatasetRefused

Pixels = NDArray[np.uint8]
"""[height, width, 3]"""


def decode(data: bytes, file: str, max_pixels: int, min_side: int) -> Image.Image:
    """An upright RGB picture.

    Raises:
        DatasetRefused: ``image_unreadable`` or ``image_too_small``; names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what decoders say of damage, they raise too
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise _unreadable(
                        file, f"has {image.width}x{image.height} pixels, of {max_pixels:,} that "
                        "are taken; make it smaller",
                    )  # fmt: skip
                if getattr(image, "n_frames", 1) > 1:
                    raise _unreadable(file, "is animated; give one of its frames")
                return _large_enough(_rgb(image, file), file, min_side)
    except UnidentifiedImageError:
        raise _unreadable(file, "is no picture that can be read; give jpg, png or webp") from None
    except MemoryError:
        raise _unreadable(file, "needs more memory than there is") from None
    except DatasetRefused:
        raise
    # Decoders raise whatever damaged data leads them to: OSError, struct.error, KeyError ...
    except Exception as error:
        raise _unreadable(file, f"is damaged or cut off ({error})") from None


def pixels_of(image: Image.Image) -> Pixels:
    return np.asarray(image)


def _rgb(image: Image.Image, file: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise _unreadable(file, "has more than 8 bits a channel; save it with 8")
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "CMYK":
        if not isinstance(profile, bytes) or not 0 < len(profile) <= MAX_PROFILE_BYTES:
            raise _unreadable(
                file, "is CMYK without a colour profile, so its colours are unknown; save as RGB"
            )
        upright = _from_cmyk(upright, profile, file)
    if upright.has_transparency_data:
        cut_out = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", cut_out.size, "white"), cut_out)
    return upright.convert("RGB")


def _from_cmyk(image: Image.Image, profile: bytes, file: str) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        raise _unreadable(
            file, "is CMYK with a colour profile that cannot be read; save as RGB"
        ) from None
    assert found is not None, "it is not converted in place"
    return found


def _large_enough(image: Image.Image, file: str, min_side: int) -> Image.Image:
    if min(image.size) < min_side:
        raise DatasetRefused(
            f"{file} has {image.width}x{image.height} pixels; its shorter side needs {min_side}.",
            "image_too_small",
            file,
        )
    return image


def _unreadable(file: str, why: str) -> DatasetRefused:
    return DatasetRefused(f"{file} {why}.", "image_unreadable", file)

"""What is no picture to learn from is refused with its name, and the others stay."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms
from samples.training_pictures import encoded, photo

from calotype.serving.core.errors import DatasetRefused
from calotype.serving.training.dataset.images.buckets import buckets, place
from calotype.serving.training.dataset.images.pictures import decode

PIXELS = 64_000_000


def refused(data: bytes, min_side: int = 64, max_pixels: int = PIXELS) -> DatasetRefused:
    with pytest.raises(DatasetRefused) as caught:
        decode(data, "odd.png", max_pixels, min_side)
    assert caught.value.param == "odd.png"
    assert "odd.png" in caught.value.message
    return caught.value


def animated() -> bytes:
    file = io.BytesIO()
    photo(0).save(file, "GIF", save_all=True, append_images=[photo(1), photo(2)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (encoded(photo(0))[:-900], "damaged or cut off"),
        (encoded(photo(0), "JPEG")[:-900], "damaged or cut off"),
        (b"", "no picture"),
        (b"GIF89a nonsense", "no picture|damaged"),
        (animated(), "animated"),
        (encoded(photo(0).convert("CMYK"), "JPEG"), "CMYK without a colour profile"),
        (encoded(Image.new("I;16", (96, 96))), "more than 8 bits"),
    ],
)
def test_what_cannot_be_learnt_from_says_why(data: bytes, says: str) -> None:
    error = refused(data)
    assert error.code == "image_unreadable"
    assert any(part in error.message for part in says.split("|"))


def test_a_picture_of_too_many_pixels_is_not_decoded() -> None:
    head = encoded(Image.new("1", (30_000, 3000)))
    error = refused(head)
    assert "30000x3000" in error.message


def test_a_small_picture_is_too_small() -> None:
    error = refused(encoded(photo(0, 300, 60)), min_side=64)
    assert error.code == "image_too_small"
    assert "300x60" in error.message


def test_cmyk_with_a_profile_and_transparency_become_rgb() -> None:
    clear = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    assert decode(encoded(clear), "clear.png", PIXELS, 64).getpixel((5, 5)) == (255, 255, 255)
    grey = Image.fromarray(np.full((96, 96), 77, np.uint8))
    assert decode(encoded(grey), "grey.png", PIXELS, 64).getpixel((5, 5)) == (77, 77, 77)
    wrong = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = encoded(photo(0).convert("CMYK"), "JPEG", icc_profile=wrong)
    assert "cannot be read" in refused(cmyk).message


@pytest.mark.parametrize("resolution", [64, 128, 512, 1024, 2048])
def test_buckets_are_of_one_area_and_of_sixteen(resolution: int) -> None:
    for width, height in buckets(resolution):
        assert width % 16 == height % 16 == 0
        assert 0.6 * resolution**2 < width * height <= resolution**2
        assert 1 / 3 <= width / height <= 3


@pytest.mark.parametrize(
    ("size", "bucket", "enlarged"),
    [
        ((4000, 4000), (1024, 1024), False),
        ((3000, 2000), (1216, 832), False),
        ((2000, 3000), (832, 1216), False),
        ((800, 800), (768, 768), False),
        ((5000, 1000), (1728, 576), False),
        ((300, 300), (512, 512), True),
    ],
)
def test_a_picture_goes_to_the_largest_bucket_that_it_fills(
    size: tuple[int, int], bucket: tuple[int, int], enlarged: bool
) -> None:
    placed = place(*size, 1024)
    assert placed.bucket == bucket
    assert placed.enlarged is enlarged
    left, top, right, bottom = placed.box
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert (right - left) / (bottom - top) == pytest.approx(bucket[0] / bucket[1], rel=0.01)

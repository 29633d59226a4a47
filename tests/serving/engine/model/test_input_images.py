"""Uploaded files: what is read upright, and what is refused by field."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import GenerationRequest, ImageSize, SamplingParams
from calotype.serving.engine.model import input_images
from calotype.serving.engine.model.input_images import (
    read_image,
    read_inputs,
    read_mask,
    restore_outside,
)


def corner(width=40, height=30):
    """Grey, with a red upper left corner."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    image.paste((255, 0, 0), (0, 0, 10, 10))
    return image


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A PNG of a few kilobytes that says it has many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def sixteen_bit_rgb():
    """Pillow cannot write one, and reads it as 8 bit without a word."""
    rows = b"".join(b"\0" + bytes(6 * 64) for _ in range(64))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


FRAMES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
FAULTS = {
    "empty": (b"", "is not a picture"),
    "text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 9, "is not a picture"),
    "pdf": (b"%PDF-1.7 " + bytes(900), "is not a picture"),
    "gif": (saved(corner(), "GIF"), "is not a picture; send a PNG, JPEG or WebP"),
    "tiff": (saved(corner(), "TIFF"), "is not a picture"),
    "truncated png": (saved(corner())[:-40], "is damaged"),
    "truncated jpeg": (saved(corner(), "JPEG")[:300], "is damaged"),
    "truncated webp": (saved(corner(), "WEBP", lossless=True)[:-60], "damaged|not a picture"),
    "bomb": (bomb(9000, 9000), "more than 64,000,000 pixels"),
    "huge bomb": (bomb(50_000, 50_000), "more than 64,000,000 pixels"),
    "cmyk": (saved(corner().convert("CMYK"), "JPEG"), "is a CMYK picture; convert it to RGB"),
    "16 bit grey": (saved(Image.new("I;16", (64, 64), 700)), "16 bits per channel"),
    "16 bit rgb": (sixteen_bit_rgb(), "16 bits per channel"),
    "animated png": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "is animated"),
    "animated webp": (
        saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        "is animated",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_file_is_refused_by_field(name):
    data, message = FAULTS[name]
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_image(data, "references[3]")
    assert caught.value.param == "references[3]"
    assert str(caught.value).startswith("references[3] ") and str(caught.value).endswith(".")


def test_large_file_is_refused_before_it_is_looked_at(monkeypatch):
    monkeypatch.setattr(input_images, "MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidRequest, match="at most 100") as caught:
        read_image(saved(corner()), "image")
    assert caught.value.param == "image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = corner(48, 32)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if back is None else upright.transpose(back)
    data = saved(stored, "JPEG", exif=turned(orientation), quality=95)
    seen = read_image(data, "image")
    assert seen.shape == (32, 48, 3)
    assert np.abs(seen.astype(int) - np.asarray(upright).astype(int)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_eight_bit_images_of_every_kind_are_read(kind, mode):
    image = corner().convert(mode)
    if kind == "JPEG" and mode in ("RGBA", "P", "LA"):
        image = image.convert("RGB")
    seen = read_image(saved(image, kind), "image")
    assert seen.shape == (30, 40, 3) and seen.dtype == np.uint8
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(seen - expected).mean() < 12


def test_camera_jpeg_with_a_thumbnail_behind_it_is_read():
    data = saved(corner(), "MPO", save_all=True, append_images=[corner(20, 15)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert read_image(data, "image").shape == (30, 40, 3)


def test_transparent_is_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (read_image(saved(image), "image") == 255).all()


START = np.zeros((30, 40, 3), dtype=np.uint8)


def test_masks_by_white_and_by_transparency():
    white = Image.new("L", (40, 30), 0)
    white.paste(255, (5, 5, 10, 10))
    marked = read_mask(saved(white), START)
    assert marked.sum() == 25 and marked[5:10, 5:10].all()
    opaque = Image.merge("RGBA", [white] * 3 + [Image.new("L", (40, 30), 255)])
    assert np.array_equal(read_mask(saved(opaque), START), marked)
    clear = Image.merge(
        "RGBA", [Image.new("L", (40, 30), 9)] * 3 + [Image.eval(white, lambda v: 255 - v)]
    )
    assert np.array_equal(read_mask(saved(clear), START), marked)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (40, 31), 255), "mask is 40x31, but the image is 40x30"),
        (Image.new("L", (40, 30), 0), "mask marks nothing"),
        (Image.new("RGBA", (40, 30), (0, 0, 0, 255)), "mask marks nothing"),
        (Image.new("I;16", (40, 30), 65535), "16 bits"),
    ],
    ids=["size", "empty", "opaque", "deep"],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        read_mask(saved(mask), START)
    assert caught.value.param == "mask"


def edit_request(size, rendered):
    return GenerationRequest(
        id="e",
        prompt="a cat",
        size=ImageSize(*size),
        rendered_size=ImageSize(*rendered),
        sampling=SamplingParams(1, 1.0),
        seed=0,
        image="image",
        mask="mask",
    )


def halves(width, height):
    """Left half red, right half blue, and a mask of the left half."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return {"image": saved(image), "mask": saved(mask)}


@pytest.mark.parametrize(
    ("image", "size", "rendered"),
    [((150, 100), (150, 100), (144, 96)), ((300, 100), (128, 128), (128, 128))],
)
def test_an_image_and_its_mask_are_fitted_alike(image, size, rendered):
    request, files = edit_request(size, rendered), halves(*image)
    found = read_inputs(request, files, 16)
    assert found.start.shape == (rendered[1], rendered[0], 3) and not found.exact
    assert found.redraw.shape == found.start.shape[:2]
    # What is marked is the red half, in both; a pixel at the edge may be mixed.
    red = found.start[:, :, 0] > found.start[:, :, 2]
    assert (red != found.redraw).mean() < 0.02
    drawn = np.zeros((size[1], size[0], 3), np.uint8)
    back = restore_outside(request, files, drawn)
    assert (back[:, size[0] // 2 + 8 :] == (0, 0, 255)).all(), (
        "what is not marked is as it was, but for the resampled edge"
    )
    assert (back[:, : size[0] // 2 - 8] == 0).all()

"""What the files of pictures hold beside pixels costs no more than their length explains."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hostile.limits.growth import MOST_GROWTH, growth
from PIL import Image

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import count_pixels, decode_image
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.images.recipe_metadata import extract_recipe
from calotype.serving.images.uploaded import check_image

RECIPE = b"calotype:recipe\0\0\0\0\0"


def saved(kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if kind != "GIF" else "P", (8, 8)).save(file, kind, **how)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A picture of 8x8 with these chunks before its pixels."""
    whole = saved("PNG")
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return whole[:33] + added + whole[33:]


def jpeg(*segments: tuple[int, bytes], whole: bytes = b"") -> bytes:
    whole = whole or saved("JPEG")
    added = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return whole[:2] + added + whole[2:]


def gif(extension: bytes) -> bytes:
    whole = saved("GIF")
    at = whole.index(b",")
    return whole[:at] + extension + whole[at:]


def directory(entries: int, size: int) -> bytes:
    """A TIFF directory all of whose entries name the same bytes."""
    table = b"".join(
        struct.pack("<HHII", 1000 + place, 7, size, 14 + 12 * entries) for place in range(entries)
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + table + b"\0\0\0\0" + b"x" * size


PICTURES: dict[str, Callable[[int], bytes]] = {
    "png texts": lambda n: png(*[(b"tEXt", b"a\0b")] * n),
    "png chunks of no kind": lambda n: png(*[(b"abCd", b"")] * n),
    "png empty pixels": lambda n: png(*[(b"IDAT", b"")] * n),
    "png packed texts": lambda n: png(
        *[(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 9999))] * (n // 9)
    ),
    "png exif": lambda n: png((b"eXIf", directory(n // 8, 20 * n))),
    "png exif heads": lambda n: png((b"eXIf", b"Exif\0\0" * (5 * n))),
    "png exif as text": lambda n: png(
        (b"tEXt", b"Raw profile type exif\0\n\n\n" + directory(n // 8, 20 * n).hex().encode())
    ),
    "jpeg comments": lambda n: jpeg(*[(0xFE, b"")] * n),
    "jpeg exif in pieces": lambda n: jpeg(*[(0xE1, b"Exif\0\0II" + b"x" * 2000)] * (n // 8)),
    "jpeg exif": lambda n: jpeg((0xE1, b"Exif\0\0" + directory(2500, 30_000)), *[(0xFE, b"")] * n),
    "jpeg list of pictures": lambda n: jpeg(
        (0xE2, b"MPF\0" + directory(2500, 30_000)), *[(0xFE, b"")] * n
    ),
    "jpeg nothing": lambda n: b"\xff\xd8" + b"\0" * n,
    "jpeg filled up": lambda n: b"\xff\xd8" + b"\xff" * n,
    "jpeg colour profile": lambda n: jpeg(*[(0xE2, b"ICC_PROFILE\0\1\1")] * n),
    "webp chunks": lambda n: b"RIFF" + struct.pack("<I", 8 * n + 4) + b"WEBP" + b"CALX\0\0\0\0" * n,
    "webp exif": lambda n: saved("WEBP", exif=directory(n // 8, 20 * n)),
    "gif comment": lambda n: gif(b"!\xfe" + (b"\xff" + b"c" * 255) * n + b"\0"),
    "gif comments": lambda n: gif((b"!\xfe\xff" + b"c" * 255 + b"\0") * n),
    "gif extensions": lambda n: gif(b"!\1\1c\0" * n),
    "tiff": lambda n: directory(n // 8, 20 * n),
    "tiff directories": lambda n: (
        b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 8 + 6 * place) for place in range(1, n))
    ),
}
RECIPES: dict[str, Callable[[int], bytes]] = {
    "png chunks": lambda n: png(*[(b"iTXt", b"x")] * n),
    "png deep": lambda n: png((b"iTXt", RECIPE + b"[" * n)),
    "png deep objects": lambda n: png((b"iTXt", RECIPE + b'{"a":' * n)),
    "png wide": lambda n: png((b"iTXt", RECIPE + b"[" + b"1," * n + b"1]")),
    "jpeg segments": lambda n: b"\xff\xd8" + b"\xff\xfe\0\2" * n,
    "webp chunks": lambda n: b"RIFF\0\0\0\0WEBP" + b"CALX\0\0\0\0" * n,
}


def look(data: bytes) -> None:
    for call in (
        lambda: check_image(data, "image"),
        lambda: count_pixels(data),
        lambda: decode_image(data),
    ):
        try:
            call()
        except (InvalidRequest, ImageError):
            pass


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_picture_is_read_in_time_that_its_length_explains(
    picture: Callable[[int], bytes],
) -> None:
    assert growth(lambda n: look(picture(n)), 1_000, 8_000) < MOST_GROWTH


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_picture_is_read_in_memory_that_its_length_explains(
    picture: Callable[[int], bytes],
) -> None:
    data = picture(4_000)
    look(data)
    tracemalloc.start()
    try:
        look(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024 + 20 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("picture", RECIPES.values(), ids=RECIPES)
def test_a_recipe_in_a_file_is_found_in_time_that_its_length_explains(
    picture: Callable[[int], bytes],
) -> None:
    assert growth(lambda n: extract_recipe(picture(n))) < MOST_GROWTH


def test_no_jpeg_is_gone_over_thousands_of_times() -> None:
    whole = saved("JPEG", progressive=True)
    again = whole[whole.rindex(b"\xff\xda") : -2]
    for scans, refused in ((20, False), (200, True)):
        data = whole[:-2] + again * scans + whole[-2:]
        try:
            check_image(data, "image")
        except InvalidRequest as error:
            assert refused and "scans" in error.message
        else:
            assert not refused


def test_what_cameras_and_programs_write_is_read() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    turned.get_ifd(0x8769)[0x927C] = b"maker" * 9000
    whole = saved("JPEG", exif=turned, progressive=True)
    profile = [(0xE2, b"ICC_PROFILE\0%c\x64" % place + b"p" * 60_000) for place in range(1, 101)]
    found = check_image(jpeg(*profile, (0xFE, b"c" * 60_000), whole=whole), "image")
    assert found.kind == "jpeg" and len(decode_image(found.data)) == 1
    cut = directory(3, 40)[:-30]  # damaged: entries that name what is not there
    assert check_image(png((b"eXIf", cut)), "image").kind == "png"
    assert len(decode_image(saved("TIFF"))) == 1

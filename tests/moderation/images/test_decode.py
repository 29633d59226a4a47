"""Image files as people send them, and as they should not: checked in every view, or refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms
from samples.images import drawing, texture

from calotype.moderation.errors import ImageError
from calotype.moderation.images import decode
from calotype.moderation.images.decode import decode_image
from calotype.moderation.moderator import Moderator


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


RED = Image.new("RGB", (20, 10), (250, 0, 0))


def test_orientation_is_applied() -> None:
    image = Image.fromarray(drawing(0))
    image.paste((1, 2, 3), (0, 0, 128, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    (view,) = decode_image(file_of(image, "PNG", exif=exif))
    assert (view[:, -20:] == (1, 2, 3)).all() and not (view[:20] == (1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_checked_on_white_and_on_black(mode: str) -> None:
    seen = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    seen.paste((0, 0, 0, 255), (0, 0, 4, 8))  # black on nothing: unseen on black
    views = decode_image(file_of(seen.convert(mode), "PNG"))
    assert len(views) == 2
    assert views[0][0, 7].tolist() == [255] * 3 and views[1][0, 7].tolist() == [0] * 3
    assert views[0][0, 0].tolist() == [0] * 3 and views[1][0, 0].tolist() == [0] * 3


def test_palettes_grey_bits_and_cmyk_become_colours() -> None:
    for image in (
        RED.quantize(4),
        RED.convert("CMYK"),
        RED.convert("L"),
        RED.convert("1"),
    ):
        kind = "TIFF" if image.mode == "CMYK" else "PNG"
        (view,) = decode_image(file_of(image, kind))
        expected = np.asarray(image.convert("RGB"))
        assert view.shape == (10, 20, 3) and np.array_equal(view, expected)


def test_sixteen_bits_are_checked_cut_and_stretched() -> None:
    faint = np.full((8, 8), 1000, np.uint16)
    faint[:4] = 1200  # hardly seen, until somebody turns the contrast up
    cut, stretched = decode_image(file_of(Image.fromarray(faint)))
    assert cut.max() <= 5 and stretched.min() == 0 and stretched.max() == 255


def test_a_profile_that_changes_the_colours_is_heeded_too() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert len(decode_image(file_of(RED, icc_profile=lab))) == 2
    broken = lab[:80] + b"\xff" * 200 + lab[280:]
    for odd in (profile, broken, b"no profile"):
        views = decode_image(file_of(RED, icc_profile=odd))
        assert np.array_equal(views[0], np.asarray(RED))


def animation(frames: int, side: int = 16) -> bytes:
    images = [Image.new("RGB", (side, side), (index * 5, 0, 0)) for index in range(frames)]
    return file_of(images[0], "GIF", save_all=True, append_images=images[1:], duration=40)


def test_every_frame_of_an_animation_is_checked_or_none() -> None:
    views = decode_image(animation(decode.MAX_FRAMES))
    assert len(views) == decode.MAX_FRAMES
    assert [int(view[0, 0, 0]) for view in views] == [5 * index for index in range(8)]
    with pytest.raises(ImageError, match="more than 8 frames; give one of them"):
        decode_image(animation(50))


def test_frames_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="16x16 pixels in 4 frames; at most 1,000"):
        decode_image(animation(6))


def png_of_size(width: int, height: int) -> bytes:
    """Says it is large, and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 4000)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def png_with_profile_bomb() -> bytes:
    data = file_of(RED)
    bomb = chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(60 * 2**20), 9))
    return data[:33] + bomb + data[33:]


def truncated_jpeg() -> bytes:
    data = file_of(Image.fromarray(texture(1, 128)), "JPEG")
    return data[: len(data) // 2]


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "is no picture that can be read"),
    "text": (lambda: b"not a picture" * 100, "is no picture that can be read"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
    "truncated jpeg": (truncated_jpeg, "is no picture that can be read: "),
    "truncated png": (lambda: file_of(Image.fromarray(texture(1, 64)))[:900], "is no picture"),
    "60,000 x 60,000": (lambda: png_of_size(60_000, 60_000), "is no picture that can be read"),
    "8,000 x 8,000": (lambda: png_of_size(8_000, 8_000), "8000x8000 pixels; at most 50,000,000"),
    "profile bomb": (png_with_profile_bomb, "is no picture that can be read: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_refused_in_a_sentence(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ImageError) as caught:
        decode_image(make(), "upload.png")
    assert str(caught.value).startswith("upload.png ") and reason in str(caught.value)


def test_a_damaged_file_never_escapes_as_another_error() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(texture(2, 48))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = bytearray(file_of(image, kind))
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 6):
                data[at] = rng.integers(0, 256)
            try:
                views = decode_image(bytes(data))
            except ImageError:
                continue
            assert all(view.ndim == 3 and view.dtype == np.uint8 for view in views)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_is_checked(moderator: Moderator, size: tuple[int, int]) -> None:
    line = Image.fromarray(np.tile(texture(4, 100)[0][None], (1, 1000, 1)))
    (view,) = decode_image(
        file_of(line if size[0] > 1 else line.transpose(Image.Transpose.ROTATE_90))
    )
    assert view.shape == (size[1], size[0], 3)
    decision = moderator.check_image(view)
    assert not decision.unavailable and decision.served, decision.reason

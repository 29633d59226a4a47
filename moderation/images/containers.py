"""What a picture's file holds beside its pixels, bounded before a decoder reads it.

Pillow joins pieces of metadata by copying all that came before, and reads each entry of a TIFF
directory (EXIF data is one) as bytes of its own, also where a thousand entries name the same bytes:
a file of a megabyte takes hours, or gigabytes. A JPEG file may have its pixels gone over thousands
of times. No picture that somebody made needs any of it. Called by `decode`, and by whoever else
opens a file of a stranger.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image, JpegImagePlugin

from calotype.moderation.errors import ImageError

MAX_PIECES = 20_000
"""Chunks of a PNG or WebP file; one of 50 MB has 6,400 where they are as small as is usual."""
MAX_SEGMENTS = 500
"""Of a JPEG file before its pixels; a colour profile may have 255."""
MAX_SCANS = 64
"""Of a JPEG file: a progressive one has ten."""
MAX_EXIF_BYTES = 64 * 1024
"""The EXIF data of a picture; a JPEG segment holds no more."""
MAX_COMMENT_BYTES, MAX_BLOCKS = 64 * 1024, 1_000_000
"""Of a GIF file; one of 50 MB has 200,000 blocks."""
MAX_DIRECTORIES, MAX_ENTRIES = 16, 1000
"""Of a TIFF file, and of EXIF data; entries of one directory."""
MOST_NAMED = 4
"""How often the bytes of a file may be named by its entries; once is usual."""

ORIENTATION = 0x0112
"""The EXIF entry that tells how a camera was held."""
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture back, by how the camera was held."""
_DIRECTORY_ENTRIES = (0x8769, 0x8825, 0xA005)
"""Entries that point to another directory of EXIF data: of the camera, of the place, of makers."""
_ITEM_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
"""TIFF's types of numbers; readers skip others."""


def check_container(data: bytes, name: str) -> None:
    """Looks at the structure of a file and at no pixel.

    What is damaged passes: the decoder says so.

    Raises:
        ImageError: decoding it would cost more than its size explains.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_count(_png_chunks(data), MAX_PIECES, name, "chunks")
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data, name)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_count(_webp_chunks(data), MAX_PIECES, name, "chunks")
    elif data.startswith(b"GIF8"):
        _check_gif(data, name)
    elif data.startswith((b"II", b"MM")):
        _check_directories(data, name, "TIFF data", follow=())


def orientation(image: Image.Image, name: str) -> int:
    """How the camera was held: 1 = upright; see EXIF 2.32, table 2.

    Raises:
        ImageError: the EXIF data would cost more than its size explains.
    """
    found = image.info.get("exif")
    if found is None and isinstance(text := image.info.get("Raw profile type exif"), str):
        found = bytes.fromhex("".join(text.split("\n")[3:]))  # as Pillow reads it
    if isinstance(found, bytes):
        check_exif(found, name)
    return int(image.getexif().get(ORIENTATION, 1))


def upright(image: Image.Image, name: str) -> Image.Image:
    """The picture as its EXIF data turns it; itself where it is upright. Raises ImageError."""
    return turned(image, orientation(image, name))


def turned(image: Image.Image, held: int) -> Image.Image:
    """A picture that was taken with the camera held so, upright."""
    way = _TURNED.get(held)
    return image if way is None else image.transpose(way)


def check_exif(data: bytes, name: str) -> None:
    """Raises ImageError: it is too long, or its entries name the same bytes again and again."""
    if len(data) > MAX_EXIF_BYTES:
        raise ImageError(
            f"{name} has {len(data):,} bytes of EXIF data; at most {MAX_EXIF_BYTES:,} are read. "
            "Save it without."
        )
    while data.startswith(b"Exif\0\0"):
        data = data[6:]
    _check_directories(data, name, "EXIF data", follow=_DIRECTORY_ENTRIES)


def _check_count(pieces: Iterator[bytes], most: int, name: str, what: str) -> None:
    for number, _ in enumerate(pieces):
        if number == most:
            raise ImageError(f"{name} has more than {most:,} {what}; save it anew.")


def _png_chunks(data: bytes) -> Iterator[bytes]:
    at = 8
    while at + 8 <= len(data):
        yield data[at + 4 : at + 8]
        at += int.from_bytes(data[at : at + 4], "big") + 12


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        yield data[at : at + 4]
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + length + length % 2


def _check_jpeg(data: bytes, name: str) -> None:
    if data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"{name} has more than {MAX_SCANS} scans; save it anew.")
    exif, seen = bytearray(), 0
    for marker, body in _jpeg_segments(data):
        seen += 1
        if seen > MAX_SEGMENTS:
            raise ImageError(
                f"{name} has more than {MAX_SEGMENTS} segments before its pixels; save it anew."
            )
        if marker == 0xFFE1 and body.startswith(b"Exif\0\0"):
            exif += body[6:]
        elif marker == 0xFFE2 and body.startswith(b"MPF\0"):
            _check_directories(body[4:], name, "list of pictures", follow=())
    check_exif(bytes(exif), name)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of what Pillow reads before the pixels; what lies between counts too."""
    at = 2
    while True:
        start = data.find(b"\xff", at)
        if start < 0 or start + 2 > len(data):
            return
        if start > at:
            yield 0, data[at:start]
        marker = int.from_bytes(data[start : start + 2], "big")
        if marker == 0xFFFF:
            at = start + 1
            yield 0, b""
        elif marker == 0xFF00:
            at = start + 2
            yield 0, b""
        elif (kind := JpegImagePlugin.MARKER.get(marker)) is None or marker == 0xFFDA:
            return
        elif kind[2] is None:
            at = start + 2
            yield marker, b""
        else:
            end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
            yield marker, data[start + 4 : end]
            at = max(end, start + 4)


def _check_gif(data: bytes, name: str) -> None:
    comments = extensions = blocks = 0
    at = 13 + _colours(data[10:11])
    while at < len(data):
        kind = data[at]
        if kind == 0x2C:
            at += 10 + _colours(data[at + 9 : at + 10]) + 1
        elif kind == 0x21:
            at += 2
        else:
            return
        start = at
        while at < len(data) and data[at] and blocks < MAX_BLOCKS:
            at += data[at] + 1
            blocks += 1
        at += 1
        if kind == 0x21:
            extensions += 1
            comments += at - start if data[start - 1] == 0xFE else 0
        if comments > MAX_COMMENT_BYTES or extensions > MAX_PIECES or blocks == MAX_BLOCKS:
            raise ImageError(
                f"{name} has more than {MAX_PIECES:,} extensions, {MAX_COMMENT_BYTES:,} bytes of "
                f"comments or {MAX_BLOCKS:,} blocks; save it anew."
            )


def _colours(flags: bytes) -> int:
    """Bytes of a GIF's colour table, by the flags before it."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _check_directories(data: bytes, name: str, what: str, follow: tuple[int, ...]) -> None:
    """Raises ImageError: there are too many, or their entries name the same bytes over and over.

    Args:
        follow: entries that point to a directory; empty = each one names the next, as in TIFF.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return
    large = data[2] == 43
    left = list(struct.unpack_from(order + ("Q" if large else "L"), data, 8 if large else 4))
    named = 0
    for _ in range(MAX_DIRECTORIES):
        if not left:
            return
        directory = _directory(data, left.pop(), order, large)
        named += directory.named
        if directory.entries > MAX_ENTRIES or named > MOST_NAMED * len(data):
            raise ImageError(
                f"The {what} of {name} has more than {MAX_ENTRIES:,} entries, or they name the "
                "same bytes over and over; save it without."
            )
        left += [directory.pointers[tag] for tag in follow if tag in directory.pointers]
        left += [directory.following] if directory.following and not follow else []
    if left:
        raise ImageError(
            f"The {what} of {name} has more than {MAX_DIRECTORIES} directories; save it without."
        )


@dataclass(slots=True)
class _Directory:
    """One TIFF directory, as far as Pillow reads it: to the first entry outside of the file."""

    entries: int = 0
    named: int = 0
    """Bytes that its entries name."""
    pointers: dict[int, int] = field(default_factory=dict)
    following: int = 0


def _directory(data: bytes, at: int, order: str, large: bool) -> _Directory:
    head, entry, ending = ("Q", "HHQQ", "Q") if large else ("H", "HHLL", "L")
    found, inside = _Directory(), struct.calcsize(order + ending)
    try:
        (count,) = struct.unpack_from(order + head, data, at)
        at += struct.calcsize(order + head)
        for _ in range(count):
            tag, kind, items, value = struct.unpack_from(order + entry, data, at)
            at += struct.calcsize(order + entry)
            length = items * _ITEM_BYTES.get(kind, 0)
            found.entries += 1
            if length > inside:
                if value + length > len(data):
                    return found
                found.named += length
            found.pointers[tag] = value
            if found.entries > MAX_ENTRIES:
                return found
        (found.following,) = struct.unpack_from(order + ending, data, at)
    except struct.error:
        pass  # it ends in the middle, and so does Pillow's reading
    return found

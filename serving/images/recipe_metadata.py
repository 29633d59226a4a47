"""A recipe inside an image file: written without touching a pixel, and read back.

PNG carries it as an international text chunk, JPEG as a comment, WebP as a chunk of its own, which
readers skip.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping

from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.recipe import MAX_BYTES, canonical

KEYWORD = b"calotype:recipe"
_WEBP_CHUNK = b"CALO"
_PNG = b"\x89PNG\r\n\x1a\n"
_COMMENT = 0xFE


def embed_recipe(data: bytes, recipe: Mapping[str, object]) -> bytes:
    """The file with the recipe in it.

    Raises:
        ValueError: ``data`` is no png, jpeg or webp file, or the recipe is too long.
    """
    text = canonical(recipe).encode("utf-8")
    if len(text) > MAX_BYTES:
        raise ValueError(f"a recipe in a file may have {MAX_BYTES} bytes, this one has {len(text)}")
    if data.startswith(_PNG):
        body = KEYWORD + b"\0\0\0\0\0" + text
        crc = zlib.crc32(b"iTXt" + body)
        chunk = struct.pack(">I", len(body)) + b"iTXt" + body + struct.pack(">I", crc)
        header = len(_PNG) + 8 + 13 + 4  # IHDR comes first and has 13 bytes
        return data[:header] + chunk + data[header:]
    if data.startswith(b"\xff\xd8"):
        body = KEYWORD + b"\0" + text
        segment = bytes([0xFF, _COMMENT]) + struct.pack(">H", len(body) + 2) + body
        at = _end_of_jpeg_heads(data)
        return data[:at] + segment + data[at:]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        chunk = _WEBP_CHUNK + struct.pack("<I", len(text)) + text + b"\0" * (len(text) % 2)
        whole = data + chunk
        return b"RIFF" + struct.pack("<I", len(whole) - 8) + whole[8:]
    raise ValueError("not a png, jpeg or webp file")


def extract_recipe(data: bytes) -> JsonObject | None:
    """The recipe in an image file; None when there is none that can be read."""
    try:
        text = next(_texts(data), b"")
        found = json.loads(text) if 0 < len(text) <= MAX_BYTES else None
    except (ValueError, struct.error, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _texts(data: bytes) -> Iterator[bytes]:
    if data.startswith(_PNG):
        at = len(_PNG)
        while at + 12 <= len(data):
            (length,) = struct.unpack_from(">I", data, at)
            kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
            if kind == b"iTXt" and body.startswith(KEYWORD + b"\0"):
                yield body[len(KEYWORD) + 5 :]
            at += length + 12
    elif data.startswith(b"\xff\xd8"):
        for at, marker, length in _jpeg_segments(data):
            body = data[at + 4 : at + 2 + length]
            if marker == _COMMENT and body.startswith(KEYWORD + b"\0"):
                yield body[len(KEYWORD) + 1 :]
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        at = 12
        while at + 8 <= len(data):
            (length,) = struct.unpack_from("<I", data, at + 4)
            if data[at : at + 4] == _WEBP_CHUNK:
                yield data[at + 8 : at + 8 + length]
            at += 8 + length + length % 2


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(offset, marker, length) of the segments before the first one with pixels."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        (length,) = struct.unpack_from(">H", data, at + 2)
        if not (0xE0 <= marker <= 0xEF or marker == _COMMENT) or length < 2:
            return
        yield at, marker, length
        at += 2 + length


def _end_of_jpeg_heads(data: bytes) -> int:
    end = 2
    for at, _, length in _jpeg_segments(data):
        end = at + 2 + length
    return end

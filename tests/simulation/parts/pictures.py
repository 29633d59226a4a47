"""Pictures as the simulation draws, checks and stores them: a digest in place of pixels.

A stored file says which pixels it shows, so that every byte that reaches a client can be traced to
what the safety stage was asked about it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_FILE = re.compile(rb"<picture ([0-9a-f]{32})>")
_PIXELS = (4, 4, 3)


def drawn(*recipe: object) -> Any:
    """Pixels [4, 4, 3] that follow from a recipe."""
    digest = hashlib.sha256(repr(recipe).encode()).digest()
    return np.resize(np.frombuffer(digest[:16], np.uint8), _PIXELS).copy()


def digest_of(pixels: Any) -> str:
    """What tells pixels apart."""
    return str(np.asarray(pixels).tobytes()[:16].hex())


def shown_in(data: bytes) -> list[str]:
    """The digests of all pictures in what a client got."""
    return [found.decode() for found in _FILE.findall(data)]


def picture_file(pixels: Any, *_: object, **__: object) -> bytes:
    """In place of `images.encode.encode_image`."""
    return f"<picture {digest_of(pixels)}>".encode()


def given_pixels(request: Any, files: Mapping[str, bytes], side: int = 0) -> Sequence[Any]:
    """In place of `images.encode.given_images`: one view of each picture that is given."""
    names = dict.fromkeys((*request.references, *([request.image] if request.image else [])))
    return [drawn("given", files[name]) for name in names]


def blurred(blurs: dict[str, str]) -> Callable[[Any], Any]:
    """In place of `images.encode.blur`; notes in ``blurs`` what became of what."""

    def blur(pixels: Any) -> Any:
        found = drawn("blurred", digest_of(pixels))
        blurs[digest_of(found)] = digest_of(pixels)
        return found

    return blur

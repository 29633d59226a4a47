"""PDQ: 256 bits that stay nearly the same when a picture is resized, saved again or made grey.

After "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (Facebook, 2019):
brightness, smoothed by two tents, sampled to 64x64, its 16x16 lowest cosine waves but the mean,
each compared with their median. Bits of two copies differ in at most 31 places, of unrelated
pictures in about 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Words = NDArray[np.uint64]
Floats = NDArray[np.floating[Any]]

SAME = 31
"""Bits in which two copies of one picture may differ."""
USABLE_QUALITY = 50
"""Flat pictures have less; their bits are chance."""
TURNS = 8

_SIDE, _WAVES = 64, 16
_LARGEST, _LARGEST_TURNED = 1024, 512
"""Longer sides of pictures before they are hashed: any size costs the same."""
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_COSINES = np.sqrt(2 / _SIDE) * np.cos(
    np.pi / (2 * _SIDE) * np.outer(np.arange(1, _WAVES + 1), 2 * np.arange(_SIDE) + 1)
)


@dataclass(frozen=True, slots=True)
class Hash:
    """PDQ of a picture, and how much there is in it to be recognised by."""

    words: Words
    """[4] of 64 bits each, the highest first."""
    quality: int
    """0 to 100."""

    @property
    def hexadecimal(self) -> str:
        return "".join(f"{int(word):016x}" for word in self.words)


def pdq(pixels: Pixels) -> Hash:
    """PDQ of a picture, uint8 [height, width, 3]."""
    waves, quality = _waves(_bounded(pixels, _LARGEST))
    return Hash(_words(waves), quality)


def pdq_turned(pixels: Pixels) -> tuple[Words, int]:
    """PDQ of a picture in all eight ways of turning and flipping it: [8, 4], and its quality.

    The filter and the grid lean to one side, so each flip is hashed; rows become columns for free.
    """
    pixels = _bounded(pixels, _LARGEST_TURNED)
    flips = [_waves(pixels[::down, ::across]) for down in (1, -1) for across in (1, -1)]
    turns = [turned for waves, _ in flips for turned in (waves, waves.T)]
    return np.stack([_words(waves) for waves in turns]), flips[0][1]


def words(text: str) -> Words:
    """The words of a hash in 64 hexadecimal digits. Raises ValueError."""
    if len(text) != 64:
        raise ValueError(f"a PDQ hash has 64 hexadecimal digits, this one has {len(text)}")
    return np.array([int(text[at : at + 16], 16) for at in range(0, 64, 16)], dtype=np.uint64)


def distances(hashes: Words, one: Words) -> NDArray[np.intp]:
    """In how many bits each of [n, 4] differs from [4]."""
    away: NDArray[np.intp] = np.bitwise_count(hashes ^ one).sum(axis=1, dtype=np.intp)
    return away


def _bounded(pixels: Pixels, largest: int) -> Pixels:
    height, width = pixels.shape[:2]
    if max(height, width) <= largest:
        return pixels
    scale = largest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _waves(pixels: Pixels) -> tuple[Floats, int]:
    plane: Floats = pixels @ _LUMA
    for _ in "two", "tents":
        for _ in "down", "across":
            plane = _boxed(plane).T
    rows, columns = (
        ((np.arange(_SIDE) + 0.5) * length / _SIDE).astype(np.intp) for length in plane.shape
    )
    small = plane[np.ix_(rows, columns)].astype(np.float64)
    return _COSINES @ small @ _COSINES.T, _quality(small)


def _boxed(plane: Floats) -> Floats:
    """Means of a window of 1/128 of the height over each column; less of it at the edges."""
    length = plane.shape[0]
    span = -(-length // (2 * _SIDE))
    if span == 1:
        return plane
    half = (span + 2) // 2
    total = np.concatenate([np.zeros((1, plane.shape[1])), np.cumsum(plane, 0, np.float64)])
    end = np.minimum(np.arange(length) + half, length)
    begin = np.maximum(np.arange(length) + half - span, 0)
    means: Floats = (total[end] - total[begin]) / (end - begin)[:, None]
    return means


def _quality(small: Floats) -> int:
    steps = sum(
        int(np.abs(np.trunc(np.diff(small, axis=axis) * 100 / 255)).sum()) for axis in (0, 1)
    )
    return min(100, steps // 90)


def _words(waves: Floats) -> Words:
    flat = waves.ravel()
    # Of an even number the lower of the two in the middle, as the reference takes it.
    median = np.partition(flat, flat.size // 2 - 1)[flat.size // 2 - 1]
    bits = (flat > median)[::-1]
    return np.frombuffer(np.packbits(bits).tobytes(), dtype=">u8").astype(np.uint64)

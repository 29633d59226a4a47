"""PDQ: 256 bits that stay nearly the same when an image is resized, saved again or made grey.

After "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm" (Facebook, 2019):
luma, smoothed by two box filters in each direction, sampled to 64x64, its 16x16 lowest cosine
coefficients but the mean, each compared with their median. Bits of two copies differ in at most 31
places, of unrelated images in about 128.

pdqhash (PyPI, Facebook's C++) is not used, although its bits are the same up to 1024 pixels (and
differ in at most 4 above, where it does not shrink first): 0.2.8 takes 35 ms of CPU for 1024x1024
and 163 ms for 1536x2048, this module 7 and 33; its eight orientations, derived from one hash,
differ from the hashes of the turned images in up to 40 bits, more than `SAME`; and it has no wheel
for Linux, so every installation would need a C++ compiler.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Words = NDArray[np.uint64]
Floats = NDArray[np.floating[Any]]

SAME = 31
"""Bits in which two copies of one image may differ."""
USABLE_QUALITY = 50
"""Flat images have less; their bits are chance."""
TURNS = 8

_SIDE, _WAVES = 64, 16
_LARGEST, _LARGEST_TURNED = 1024, 512
"""Longer sides of images before they are hashed: any size costs the same."""
_COSINES = np.sqrt(2 / _SIDE) * np.cos(
    np.pi / (2 * _SIDE) * np.outer(np.arange(1, _WAVES + 1), 2 * np.arange(_SIDE) + 1)
)


@dataclass(frozen=True, slots=True)
class Hash:
    """PDQ of an image, and how much there is in it to be recognised by."""

    words: Words
    """[4] of 64 bits each, the highest first."""
    quality: int
    """0 to 100."""

    @property
    def hexadecimal(self) -> str:
        return "".join(f"{int(word):016x}" for word in self.words)


def pdq(pixels: Pixels) -> Hash:
    """PDQ of an image, uint8 [height, width, 3]."""
    plane = _luma(_bounded(pixels, _LARGEST))
    small = _sampling(plane.shape[0]) @ plane @ _sampling(plane.shape[1]).T
    return Hash(_words(_coefficients(small)), _quality(small))


def pdq_turned(pixels: Pixels) -> tuple[Words, int]:
    """PDQ of an image in all eight orientations: [8, 4], and its quality.

    Filter and grid are not symmetric, so each flip is sampled; transposing the coefficients
    exchanges rows and columns.
    """
    plane = _luma(_bounded(pixels, _LARGEST_TURNED))
    down, across = (_sampling(length) for length in plane.shape)
    both = np.concatenate([down, down[:, ::-1]]) @ plane
    small = both @ np.concatenate([across, across[:, ::-1]]).T
    flips = [small[i : i + _SIDE, j : j + _SIDE] for i in (0, _SIDE) for j in (0, _SIDE)]
    waves = [_coefficients(flip) for flip in flips]
    turned = [_words(one) for wave in waves for one in (wave, wave.T)]
    return np.stack(turned), _quality(flips[0])


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


def _luma(pixels: Pixels) -> Floats:
    red, green, blue = (pixels[:, :, band].astype(np.float32) for band in range(3))
    luma: Floats = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma


@functools.lru_cache(maxsize=32)
def _sampling(length: int) -> Floats:
    """[64, length]: both box filters along one side, and the rows of them that are sampled.

    A box is 1/128 of the side wide; at the edges it is cut off.
    """
    weights = np.zeros((_SIDE, length))
    sampled = ((np.arange(_SIDE) + 0.5) * length / _SIDE).astype(np.intp)
    weights[np.arange(_SIDE), sampled] = 1.0
    span = -(-length // (2 * _SIDE))
    if span > 1:
        half = (span + 2) // 2
        end = np.minimum(np.arange(length) + half, length)
        begin = np.maximum(np.arange(length) + half - span, 0)
        for _ in "two", "boxes":
            each = (weights / (end - begin)).T
            steps = np.zeros((length + 1, _SIDE))
            np.add.at(steps, begin, each)
            np.subtract.at(steps, end, each)
            weights = steps[:-1].cumsum(axis=0).T
    return weights.astype(np.float32)


def _coefficients(small: Floats) -> Floats:
    """The lowest 16x16 coefficients of the cosine transform, without the mean's."""
    waves: Floats = _COSINES @ small.astype(np.float64) @ _COSINES.T
    return waves


def _quality(small: Floats) -> int:
    levels = small.astype(np.float64) * 100 / 255
    steps = sum(int(np.abs(np.trunc(np.diff(levels, axis=axis))).sum()) for axis in (0, 1))
    return min(100, steps // 90)


def _words(waves: Floats) -> Words:
    flat = waves.ravel()
    # Of an even number the lower of the two in the middle, as the reference takes it.
    median = np.partition(flat, flat.size // 2 - 1)[flat.size // 2 - 1]
    bits = (flat > median)[::-1]
    return np.frombuffer(np.packbits(bits).tobytes(), dtype=">u8").astype(np.uint64)

"""Aspect buckets: the few sizes that pictures are cropped to, so that a batch has one shape.

A bucket has at most ``resolution`` squared pixels, sides that are multiples of a step, and is
never larger than the picture, unless that is smaller than the smallest tier (no enlargement, as
diffusers' training scripts do it).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from PIL import Image

Bucket = tuple[int, int]
"""(width, height)"""
PATCH = 16
WIDEST = 3.0
"""The longer side of a bucket is at most so many times the shorter one."""
TIERS = (1.0, 0.875, 0.75, 0.625, 0.5)
"""Of the resolution: smaller pictures are learnt at a smaller size."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A picture's bucket, and the part of the picture that fills it."""

    bucket: Bucket
    box: tuple[float, float, float, float]
    """left, top, right, bottom in the upright picture, in pixels."""
    cropped: float
    """Share of the picture's area that is cut off, 0 to 1."""
    enlarged: bool


@functools.lru_cache(maxsize=64)
def buckets(resolution: int) -> tuple[Bucket, ...]:
    """Every bucket of a resolution (a multiple of 16), square first."""
    step = max(PATCH, resolution // 16 // PATCH * PATCH)
    found = {(resolution, resolution)}
    for width in range(step, int(resolution * math.sqrt(WIDEST)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) <= WIDEST * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda one: (abs(math.log(one[0] / one[1])), one)))


def place(width: int, height: int, resolution: int) -> Placed:
    """The bucket of a picture: the nearest aspect in the largest tier that it fills."""
    placed = None
    for tier in TIERS:
        side = max(PATCH, int(resolution * tier) // PATCH * PATCH)
        bucket = min(
            buckets(side), key=lambda one: abs(math.log(one[0] * height / (one[1] * width)))
        )
        scale = max(bucket[0] / width, bucket[1] / height)
        if placed is None or placed.enlarged:
            placed = _placed(width, height, bucket, scale)
        if not placed.enlarged:
            break
    assert placed is not None, "there are tiers"
    return placed


def fill(image: Image.Image, placed: Placed) -> Image.Image:
    """The part of the picture that fills its bucket, at the bucket's size."""
    if image.size == placed.bucket:
        return image
    return image.resize(placed.bucket, Image.Resampling.LANCZOS, box=placed.box, reducing_gap=3.0)


def _placed(width: int, height: int, bucket: Bucket, scale: float) -> Placed:
    wide, tall = bucket[0] / scale, bucket[1] / scale
    left, top = (width - wide) / 2, (height - tall) / 2
    box = max(0.0, left), max(0.0, top), min(width, left + wide), min(height, top + tall)
    return Placed(bucket, box, 1 - wide * tall / (width * height), scale > 1.0)

"""Pictures to learn from: as different from each other as photographs are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

RED = (255, 0, 0)
RIGHTS = {"basis": "own", "holder": "Ada"}


def photo(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Coloured noise that is the weaker the finer it is, as in photographs."""
    draw = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side in (3, 6, 12, 24):
        small = Image.fromarray(draw.integers(0, 256, (side, side, 3)).astype(np.uint8))
        octave = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        pixels += (octave - 128) * (3 / side) ** 0.5
    return Image.fromarray(np.clip(128 + pixels * 0.7, 0, 255).astype(np.uint8))


def mostly(colour: tuple[int, int, int]) -> Image.Image:
    """One colour with a dark edge: the safety stage looks at no blank picture."""
    image = Image.new("RGB", (96, 96), colour)
    image.paste((10, 10, 10), (0, 0, 96, 4))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()

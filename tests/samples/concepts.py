"""Shapes that the embedded model has never seen, as small data sets for adapters.

Each is a polygon of radius about 1 around the origin, y pointing down; a data set shows one of them
in many colours and places, with captions that call it by a trigger word.
"""

from __future__ import annotations

import pathlib
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from calotype.serving.training.captions import POSITION_WORDS
from calotype.serving.training.scenes import COLOR_NAMES, COLORS, NATIVE, OFFSET, POSITIONS, SIZES

TRIGGER = "zorbl"
_FINER = 8
"""Sub-pixels along each side of a pixel, for soft edges."""

OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "arrow": (
        (-0.95, -0.3), (0.1, -0.3), (0.1, -0.85), (0.98, 0), (0.1, 0.85), (0.1, 0.3), (-0.95, 0.3),
    ),
    "hourglass": ((-0.8, -0.95), (0.8, -0.95), (0.12, 0), (0.8, 0.95), (-0.8, 0.95), (-0.12, 0)),
    "house": (
        (0, -0.95), (0.95, -0.1), (0.65, -0.1), (0.65, 0.9), (-0.65, 0.9), (-0.65, -0.1),
        (-0.95, -0.1),
    ),
    "bolt": ((0.3, -1), (-0.7, 0.15), (-0.1, 0.15), (-0.35, 1), (0.7, -0.25), (0.1, -0.25)),
    "corner": ((-0.85, -0.9), (-0.2, -0.9), (-0.2, 0.3), (0.85, 0.3), (0.85, 0.9), (-0.85, 0.9)),
    "tee": (
        (-0.9, -0.9), (0.9, -0.9), (0.9, -0.3), (0.3, -0.3), (0.3, 0.9), (-0.3, 0.9), (-0.3, -0.3),
        (-0.9, -0.3),
    ),
    "chevron": ((-0.9, 0.1), (0, -0.85), (0.9, 0.1), (0.9, 0.75), (0, -0.2), (-0.9, 0.75)),
    "bowtie": ((-0.95, -0.75), (0, -0.12), (0.95, -0.75), (0.95, 0.75), (0, 0.12), (-0.95, 0.75)),
    "crown": (
        (-0.9, -0.6), (-0.45, 0), (0, -0.8), (0.45, 0), (0.9, -0.6), (0.9, 0.75), (-0.9, 0.75),
    ),
    "wedge": ((-0.9, 0.85), (-0.9, -0.85), (0.9, 0.85)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Showing:
    """One picture of a concept: what is where, and what its caption says."""

    color: str
    background: str
    position: str
    size: str

    def caption(self, word: str = TRIGGER) -> str:
        where = POSITION_WORDS[self.position][0]
        return f"a {self.size} {self.color} {word} on a {self.background} background, {where}"


def showings(count: int, seed: int) -> list[Showing]:
    """Different ones at random."""
    rng = random.Random(seed)
    found: list[Showing] = []
    while len(found) < count:
        color, background = rng.sample(COLOR_NAMES, 2)
        one = Showing(
            color,
            background,
            rng.choice(tuple(POSITIONS)),
            rng.choice(("small", "medium", "large")),
        )
        if one not in found:
            found.append(one)
    return found


def draw(concept: str, showing: Showing, rng: random.Random) -> NDArray[np.uint8]:
    """uint8 [128, 128, 3]; moved by up to 1.5 pixels and grown by up to 3 %, as training scenes."""
    side = NATIVE * _FINER
    canvas = Image.new("RGB", (side, side), COLORS[showing.background])
    column, row = POSITIONS[showing.position]
    radius = SIZES[showing.size] * rng.uniform(0.97, 1.03)
    x, y = (NATIVE / 2 + at * OFFSET + rng.uniform(-1.5, 1.5) for at in (column, row))
    points = [
        ((x + px * radius) * _FINER, (y + py * radius) * _FINER) for px, py in OUTLINES[concept]
    ]
    ImageDraw.Draw(canvas).polygon(points, fill=COLORS[showing.color])
    return np.asarray(canvas.resize((NATIVE, NATIVE), Image.Resampling.BOX))


def data_set(concept: str, count: int = 20, seed: int = 0) -> list[tuple[NDArray[np.uint8], str]]:
    """Pictures and their captions."""
    rng = random.Random(seed + 1)
    return [(draw(concept, s, rng), s.caption()) for s in showings(count, seed)]


def write_data_set(folder: pathlib.Path, concept: str, count: int = 20, seed: int = 0) -> None:
    """As a folder of 01.png, 01.txt, 02.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pixels, caption) in enumerate(data_set(concept, count, seed), start=1):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption + "\n")

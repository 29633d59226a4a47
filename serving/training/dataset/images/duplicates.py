"""Near-duplicates: copies that were resized, saved again or slightly cut.

By PDQ, whose bits copies nearly share, together with a small colour version: PDQ sees neither
colours nor much of flat drawings, so alone it would take a red circle for a blue one. Pictures with
too little in them for PDQ are compared by their pixels. Mirrored pictures are no duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.moderation.images import pdq

_SIDE = 16
_NEAR = 12.0
"""Mean difference of the small versions, of 255: jpeg and resizing change less than 4."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture is compared by."""

    words: pdq.Words
    quality: int
    small: NDArray[np.float32]
    """[16, 16, 3], 0 to 255."""
    size: tuple[int, int]


def look(image: Image.Image) -> Look:
    """Of an upright RGB picture."""
    found = pdq.pdq(np.asarray(image))
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return Look(found.words, found.quality, np.asarray(small, dtype=np.float32), image.size)


@dataclass(slots=True)
class Seen:
    """The pictures so far; the first of several alike is kept.

    Args:
        distance: bits in which two copies may differ, 0 to 256; 0 = only identical hashes.
    """

    distance: int
    _looks: list[Look] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    def copy_of(self, look: Look) -> tuple[str, int] | None:
        """The most similar earlier picture, if it is a copy, and the bits that differ."""
        if not self._looks:
            return None
        away = pdq.distances(np.stack([one.words for one in self._looks]), look.words)
        for index in np.argsort(away, kind="stable"):
            if away[index] > self.distance:
                break
            if _alike(self._looks[index], look):
                return self._names[index], int(away[index])
        return None

    def add(self, name: str, look: Look) -> None:
        self._looks.append(look)
        self._names.append(name)


def _alike(one: Look, other: Look) -> bool:
    difference = float(np.abs(one.small - other.small).mean())
    if min(one.quality, other.quality) < pdq.USABLE_QUALITY:
        # Flat pictures: bits are chance, and two drawings of one thing differ in little.
        return one.size == other.size and difference < 0.5
    return difference < _NEAR

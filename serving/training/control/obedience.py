"""Whether a picture obeys its control map, by the exact classifier of `scene_classifier`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from calotype.serving.training.control.layouts import Layout, Placed
from calotype.serving.training.scene_classifier import Seen, look
from calotype.serving.training.scenes import NATIVE

OFF_CENTER = 5.0
"""Pixels by which a thing's centre may be off, on a 128-pixel canvas."""
OFF_RADIUS = 0.15
"""Share by which its radius may be off."""
QUALITIES = ("count", "place", "size", "shape", "obeyed", "color", "background", "full")
DEBRIS = 40.0


def obedience(layout: Layout, image: NDArray[np.uint8]) -> dict[str, bool]:
    """Which qualities of the layout a picture has.

    ``obeyed`` is what the map asks for: as many things, each at its place, of its size and shape.
    ``full`` is that with the prompt's colours.
    """
    unit = min(layout.width, layout.height) / NATIVE
    background, seen, debris = look(image)
    pairs = _paired(layout.things, seen)
    complete = len(seen) == len(layout.things)
    right = {
        "count": complete and debris < DEBRIS,
        "place": complete
        and all(math.dist(s.center, (t.x, t.y)) <= OFF_CENTER * unit for t, s in pairs),
        "size": complete and all(abs(s.radius / t.radius - 1) <= OFF_RADIUS for t, s in pairs),
        "shape": complete and all(s.shape == t.shape for t, s in pairs),
    }
    right["obeyed"] = all(right.values())
    right["color"] = complete and all(s.color == t.color for t, s in pairs)
    right["background"] = background == layout.background
    right["full"] = all(right.values())
    return right


def share(layouts: Sequence[Layout], images: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
    """Share of pictures with each quality."""
    found = [obedience(o, image) for o, image in zip(layouts, images, strict=True)]
    return {name: sum(one[name] for one in found) / len(found) for name in QUALITIES}


def _paired(things: Sequence[Placed], seen: Sequence[Seen]) -> list[tuple[Placed, Seen]]:
    """Each thing with what was seen nearest to it."""
    left, pairs = list(seen), []
    for thing in things:
        if not left:
            break
        nearest = min(left, key=lambda s: math.dist(s.center, (thing.x, thing.y)))
        left.remove(nearest)
        pairs.append((thing, nearest))
    return pairs

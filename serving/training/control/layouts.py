"""Pictures of flat shapes anywhere on the canvas, and their control maps, exact by construction.

The captions name colours and shapes; place and size stand in the map alone. Maps and pictures are
drawn from the same signed distances, so a map shows precisely what its picture shows.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calotype.serving.training.captions import RELATIONS, SHAPE_WORDS, with_surroundings
from calotype.serving.training.scenes import (
    COLOR_NAMES,
    COLORS,
    NATIVE,
    OFFSET,
    POSITIONS,
    SHAPES,
    SIZES,
    signed_distance,
)

KINDS = ("canny", "depth", "segmentation", "pose")
TWO_THINGS = 0.25
PAIRS = tuple(positions for positions, _ in RELATIONS.values())
UNNAMED = 0.15
"""Share of captions that leave the shape to the map, of a map that shows it."""
RADII = (16.0, 36.0)
RADII_OF_TWO = (16.0, 24.0)
EDGE_GAP, THING_GAP = 4.0, 8.0
"""Least pixels from a thing to the edge and to the other thing, on a 128-pixel canvas."""
SEGMENT_COLORS = (
    (120, 120, 180), (180, 120, 60), (6, 230, 230), (80, 50, 200),
    (4, 200, 3), (204, 70, 3), (255, 7, 71), (224, 255, 8),
)  # fmt: skip
"""What each of SHAPES is painted in; the ground is black."""
JOINT_COLORS = ((255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
"""Of the centre, and of the points above, right of, below and left of it."""
LIMB_COLOR = (128, 128, 128)
REACH = 0.9
"""How far from the centre the four points lie, of the radius."""

_ONE = (
    "a {c} {s} on a {b} background",
    "{c} {s}, {b} background",
    "a {b} background with a {c} {s}",
    "draw a {c} {s} on a {b} background",
    "a picture of a {c} {s} on a {b} background",
)
_TWO = (
    "a {c1} {s1} {r} a {c2} {s2} on a {b} background",
    "{c1} {s1} {r} {c2} {s2}, {b} background",
    "a {b} background with a {c1} {s1} {r} a {c2} {s2}",
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing at a place; ``x``, ``y`` and ``radius`` in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Layout:
    """A picture: its ground, its things, what is said of it, and its size in pixels."""

    background: str
    things: tuple[Placed, ...]
    caption: str
    width: int = NATIVE
    height: int = NATIVE

    @property
    def held_out(self) -> bool:
        """True for the tenth of all combinations that training never sees, chosen by hash."""
        key = "|".join([self.background, *(f"{t.shape} {t.color}" for t in self.things)])
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10 == 0


def sample_layout(
    rng: random.Random,
    held_out: bool | None,
    kind: str,
    width: int = NATIVE,
    height: int = NATIVE,
    anywhere: float = 0.0,
) -> Layout:
    """A layout at random for a kind of map.

    Args:
        held_out: as in `captions.sample_scene`.
        anywhere: share of layouts whose things stand anywhere, at any size; others as in `scenes`.
    """
    while True:
        two = rng.random() < TWO_THINGS
        background = rng.choice(COLOR_NAMES)
        colors = [rng.choice([c for c in COLOR_NAMES if c != background]) for _ in range(1 + two)]
        shapes = [rng.choice(SHAPES) for _ in colors]
        if rng.random() < anywhere:
            places = _anywhere(rng, 1 + two, width, height)
        else:
            places = _as_in_scenes(rng, two, width, height)
        if places is None:
            continue
        things = tuple(
            Placed(shape, color, *place)
            for shape, color, place in zip(shapes, colors, places, strict=True)
        )
        named = kind == "pose" or rng.random() >= UNNAMED
        caption = _caption(rng, background, things, named)
        layout = Layout(background, things, caption, width, height)
        if held_out is None or layout.held_out == held_out:
            return layout


def _as_in_scenes(
    rng: random.Random, two: bool, width: int, height: int
) -> list[tuple[float, float, float]]:
    """The places and sizes of `scenes`, off by as much as its pictures are."""
    unit = min(width, height) / NATIVE
    names = rng.choice(PAIRS) if two else (rng.choice(tuple(POSITIONS)),)
    found = []
    for name in names:
        across, down = POSITIONS[name]
        radius = SIZES["paired" if two else rng.choice(("small", "medium", "large"))]
        found.append(
            (
                (0.5 + across * OFFSET / NATIVE) * width + unit * rng.uniform(-1.5, 1.5),
                (0.5 + down * OFFSET / NATIVE) * height + unit * rng.uniform(-1.5, 1.5),
                radius * unit * rng.uniform(0.97, 1.03),
            )
        )
    return found


def _anywhere(
    rng: random.Random, count: int, width: int, height: int
) -> list[tuple[float, float, float]] | None:
    unit = min(width, height) / NATIVE
    found: list[tuple[float, float, float]] = []
    for _ in range(count):
        radius = unit * rng.uniform(*(RADII if count == 1 else RADII_OF_TWO))
        room = radius + EDGE_GAP * unit
        place = (rng.uniform(room, width - room), rng.uniform(room, height - room), radius)
        for other in found:
            apart = math.dist(place[:2], other[:2]) - place[2] - other[2]
            if apart < THING_GAP * unit:
                return None
        found.append(place)
    return found


def _caption(rng: random.Random, background: str, things: tuple[Placed, ...], named: bool) -> str:
    names = [rng.choice(SHAPE_WORDS.get(t.shape, (t.shape,))) if named else "shape" for t in things]
    if len(things) == 1:
        text = rng.choice(_ONE).format(c=things[0].color, s=names[0], b=background)
    else:
        first, second = things
        across = abs(first.x - second.x) > abs(first.y - second.y)
        if across:
            word = "left of" if first.x < second.x else "right of"
        else:
            word = "above" if first.y < second.y else "below"
        text = rng.choice(_TWO).format(
            c1=first.color, s1=names[0], r=word, c2=second.color, s2=names[1], b=background
        )
    return with_surroundings(text.replace("a orange", "an orange"), rng)


def picture(layout: Layout) -> Tensor:
    """The picture itself: float32 [3, height, width] in -1..1."""
    image = _flat(COLORS[layout.background], layout)
    for thing in layout.things:
        cover = torch.clamp(0.5 - _distance(thing, layout), 0, 1)
        image = image + (_flat(COLORS[thing.color], layout) - image) * cover
    return image


def control_map(layout: Layout, kind: str, line: float = 1.0) -> Tensor:
    """The map of a kind: float32 [3, height, width] in -1..1.

    Args:
        line: width of edges in pixels; OpenCV's Canny draws them one pixel wide.
    """
    return _MAPS[kind](layout, line)


def _edges(layout: Layout, line: float) -> Tensor:
    found = torch.zeros(layout.height, layout.width)
    for thing in layout.things:
        away = _distance(thing, layout).abs()
        found = torch.maximum(found, torch.clamp(line / 2 + 0.5 - away, 0, 1))
    return _grey(found)


def _depth(layout: Layout, line: float) -> Tensor:
    """Things stand out of the ground and rise from their edges inwards; near is bright."""
    found = torch.zeros(layout.height, layout.width)
    for thing in layout.things:
        inside = torch.clamp(-_distance(thing, layout), min=0)
        rise = torch.clamp(inside / (0.5 * thing.radius), max=1)
        found = torch.maximum(found, torch.where(inside > 0, 0.35 + 0.65 * rise, 0.0))
    return _grey(found)


def _segmentation(layout: Layout, line: float) -> Tensor:
    image = _flat((0, 0, 0), layout)
    for thing in layout.things:
        color = SEGMENT_COLORS[SHAPES.index(thing.shape)]
        inside = _distance(thing, layout) < 0
        image = torch.where(inside, _flat(color, layout), image)
    return image


def _pose(layout: Layout, line: float) -> Tensor:
    """The centre of each thing, four points at its radius, and lines to them."""
    image = _flat((0, 0, 0), layout)
    gy, gx = _grid(layout)
    for thing in layout.things:
        reach = REACH * thing.radius
        x, y = gx - thing.x, gy - thing.y
        near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
        limbs = (near < 1.0) & (far < reach)
        image = torch.where(limbs, _flat(LIMB_COLOR, layout), image)
        points = ((0.0, 0.0), (0.0, -reach), (reach, 0.0), (0.0, reach), (-reach, 0.0))
        for (px, py), color in zip(points, JOINT_COLORS, strict=True):
            joint = (x - px) ** 2 + (y - py) ** 2 < 2.5**2
            image = torch.where(joint, _flat(color, layout), image)
    return image


_MAPS: dict[str, Callable[[Layout, float], Tensor]] = {
    "canny": _edges,
    "depth": _depth,
    "segmentation": _segmentation,
    "pose": _pose,
}


def _grid(layout: Layout) -> tuple[Tensor, Tensor]:
    """Row and column of each pixel's centre, [height, 1] and [1, width]."""
    rows, columns = torch.arange(layout.height) + 0.5, torch.arange(layout.width) + 0.5
    return rows[:, None], columns[None, :]


def _distance(thing: Placed, layout: Layout) -> Tensor:
    """Pixels to the thing's outline, negative inside: [height, width]."""
    gy, gx = _grid(layout)
    x = ((gx - thing.x) / thing.radius).expand(layout.height, -1)
    y = ((gy - thing.y) / thing.radius).expand(-1, layout.width)
    return signed_distance(thing.shape, x, y) * thing.radius


def _flat(color: tuple[int, int, int], layout: Layout) -> Tensor:
    value = torch.tensor(color, dtype=torch.float32) / 127.5 - 1
    return value[:, None, None].expand(3, layout.height, layout.width)


def _grey(value: Tensor) -> Tensor:
    return (2 * value - 1).expand(3, -1, -1)

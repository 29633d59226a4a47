"""The exact classifier: reads an image of flat shapes back into what it shows.

Rule-based, so that it cannot learn to be kind: nearest palette colours, connected components, the
overlap of each component with the eight outlines in its own box, and the box's place and radius.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from calotype.serving.training.scenes import (
    COLOR_NAMES,
    COLORS,
    NATIVE,
    POSITIONS,
    SHAPES,
    Scene,
    signed_distance,
)

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
PURE = 45.0
"""RGB distance within which a pixel counts as a palette colour."""
GRID = 48
ATTRIBUTES = ("background", "count", "color", "shape", "position", "size", "full")


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing found in an image; None where it cannot be told."""

    shape: str | None
    color: str | None
    position: str | None
    size: str | None
    area: int
    center: tuple[float, float]
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Outline:
    name: str
    mask: NDArray[np.bool_]
    half_width: float
    half_height: float
    center: tuple[float, float]


@cache
def outlines() -> tuple[Outline, ...]:
    """The eight shapes in their own bounding boxes, on a GRID x GRID raster."""
    found = []
    n = 400
    axis = (torch.arange(n) + 0.5) / n * 2.6 - 1.3
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for shape in SHAPES:
        inside = (signed_distance(shape, x, y) < 0).numpy()
        rows, cols = np.where(inside.any(1))[0], np.where(inside.any(0))[0]
        box = inside[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        middle = ((cols[0] + cols[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2)
        found.append(
            Outline(
                shape,
                _raster(box),
                box.shape[1] / n * 1.3,
                box.shape[0] / n * 1.3,
                (middle[0] / n * 2.6 - 1.3, middle[1] / n * 2.6 - 1.3),
            )
        )
    return tuple(found)


def _raster(box: NDArray[np.bool_]) -> NDArray[np.bool_]:
    height, width = box.shape
    rows = ((np.arange(GRID) + 0.5) / GRID * height).astype(int)
    cols = ((np.arange(GRID) + 0.5) / GRID * width).astype(int)
    raster: NDArray[np.bool_] = box[rows][:, cols]
    return raster


def learn_outline(name: str, images: Iterable[NDArray[np.uint8]]) -> Outline:
    """The outline that the largest thing of most images has.

    Its middle counts as the middle of its box, its longer half as `signed_distance` shapes have it.

    Args:
        images: uint8 [height, width, 3], each a flat shape on a flat ground.

    Raises:
        ValueError: no image shows a thing.
    """
    boxes = []
    for image in images:
        a = image.astype(np.float32)
        nearest, pure, distances = _palette(a)
        ground = int(np.bincount(nearest[pure], minlength=len(PALETTE)).argmax())
        labels, count = ndimage.label(distances[:, :, ground] > PURE)
        if not count:
            continue
        part = labels == int(np.bincount(labels[labels > 0]).argmax())
        color = int(np.bincount(nearest[part & pure], minlength=len(PALETTE)).argmax())
        if color != ground:
            boxes.append(_box(_outlined(a, part, color, ground))[0])
    if not boxes:
        raise ValueError("no image shows a flat shape on a flat ground")
    height, width = (float(np.median([box.shape[axis] for box in boxes])) for axis in (0, 1))
    mask = np.mean([_raster(box) for box in boxes], axis=0) > 0.5
    half = 0.95 / max(height, width)
    return Outline(name, mask, half * width, half * height, (0.0, 0.0))


def look(
    image: NDArray[np.uint8], more: Sequence[Outline] = ()
) -> tuple[str | None, list[Seen], float]:
    """Background (None if it is not one colour), things from large to small, pixels of debris.

    Args:
        image: uint8 [height, width, 3].
        more: outlines beside the eight.
    """
    known = (*outlines(), *more)
    a = image.astype(np.float32)
    unit = min(a.shape[:2]) / NATIVE
    nearest, pure, distances = _palette(a)
    edge = np.ones(nearest.shape, bool)
    edge[2:-2, 2:-2] = False
    counts = np.bincount(nearest[edge & pure], minlength=len(PALETTE))
    ground = int(counts.argmax())
    background = COLOR_NAMES[ground] if counts[ground] >= 0.9 * edge.sum() else None
    labels, count = ndimage.label(distances[:, :, ground] > PURE)
    seen, debris = [], 0.0
    for number in range(1, count + 1):
        part = labels == number
        area = int(part.sum())
        if area < 60 * unit * unit:
            debris += area
            continue
        seen.append(_identify(a, part, nearest, pure, ground, area, unit, known))
    return background, sorted(seen, key=lambda s: -s.area), debris / (unit * unit)


def _palette(
    a: NDArray[np.float32],
) -> tuple[NDArray[np.int_], NDArray[np.bool_], NDArray[np.float32]]:
    """Of each pixel the nearest palette colour, whether it is that one, and the distance to all."""
    distances = np.sqrt(((a[:, :, None, :] - PALETTE) ** 2).sum(-1))
    return distances.argmin(-1), distances.min(-1) < PURE, distances


def _outlined(
    a: NDArray[np.float32], part: NDArray[np.bool_], color: int, ground: int
) -> NDArray[np.bool_]:
    """The thing of a part: its outline lies where the image is halfway between ground and thing."""
    line = PALETTE[color] - PALETTE[ground]
    mask: NDArray[np.bool_] = ndimage.binary_dilation(part) & (
        ((a - PALETTE[ground]) @ line) / (line @ line) > 0.5
    )
    return mask


def _box(mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], float, float]:
    """What a mask has in its bounding box, and the row and column of the box's middle."""
    rows, cols = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    return box, (rows[0] + rows[-1] + 1) / 2, (cols[0] + cols[-1] + 1) / 2


def _identify(
    a: NDArray[np.float32],
    part: NDArray[np.bool_],
    nearest: NDArray[np.int_],
    pure: NDArray[np.bool_],
    ground: int,
    area: int,
    unit: float,
    known: Sequence[Outline],
) -> Seen:
    unknown = Seen(None, None, None, None, area, (0.0, 0.0))
    core = ndimage.binary_erosion(part)
    clear = part & pure & (nearest != ground)
    inner = core & clear
    clear = inner if inner.sum() >= 30 * unit * unit else clear
    if clear.sum() < 20 * unit * unit:
        return unknown
    colors = np.bincount(nearest[clear], minlength=len(PALETTE))
    color = int(colors.argmax())
    purity = colors[color] / max(1, core.sum())
    mask = _outlined(a, part, color, ground)
    if mask.sum() < 40 * unit * unit:
        return unknown
    box, rows, cols = _box(mask)
    height, width = box.shape
    raster = _raster(box)
    scores = []
    for outline in known:
        overlap = (raster & outline.mask).sum() / (raster | outline.mask).sum()
        aspect = (width / height) / (outline.half_width / outline.half_height)
        scores.append(overlap * (1.0 if min(aspect, 1 / aspect) > 0.75 else 0.5))
    best = int(np.argmax(scores))
    fit = known[best]
    radius = 0.5 * (width / 2 / fit.half_width + height / 2 / fit.half_height)
    cx = cols - fit.center[0] * radius
    cy = rows - fit.center[1] * radius
    third = tuple(
        0 if abs(at / side - 0.5) <= 14 / NATIVE else (-1 if at < side / 2 else 1)
        for at, side in ((cx, a.shape[1]), (cy, a.shape[0]))
    )
    native = radius / unit
    return Seen(
        shape=fit.name if scores[best] >= 0.75 and purity > 0.7 else None,
        color=COLOR_NAMES[color],
        position=next(name for name, where in POSITIONS.items() if where == third),
        size="small" if native < 19.6 else "medium" if native < 28.6 else "large",
        area=area,
        center=(cx, cy),
        radius=radius,
    )


def matches(scene: Scene, image: NDArray[np.uint8]) -> dict[str, bool]:
    """Which attributes of the scene the image shows; ``full`` when it shows all of them."""
    background, seen, debris = look(image)
    want = scene.things
    right = {
        "background": background == scene.background,
        "count": len(seen) == len(want) and debris < 40,
    }
    seen = seen[: len(want)]
    if len(want) == 2 and len(seen) == 2:
        axis = 0 if want[0].position in ("left", "right") else 1
        sign = 1 if want[0].position in ("left", "top") else -1
        seen = sorted(seen, key=lambda s: sign * s.center[axis])
    complete = len(seen) == len(want)
    pairs = list(zip(seen, want, strict=False))
    right["color"] = complete and all(s.color == w.color for s, w in pairs)
    right["shape"] = complete and all(s.shape == w.shape for s, w in pairs)
    right["position"] = complete and all(s.position == w.position for s, w in pairs)
    right["size"] = complete and (len(want) == 2 or all(s.size == w.size for s, w in pairs))
    right["full"] = all(right.values())
    return right


def score(scenes: Sequence[Scene], images: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
    """Share of scenes with each attribute right."""
    results = [matches(scene, image) for scene, image in zip(scenes, images, strict=True)]
    return {name: sum(r[name] for r in results) / len(results) for name in ATTRIBUTES}

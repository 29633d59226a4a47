"""The synthetic, captioned images that the embedded model learns: flat shapes on flat grounds.

A scene has a background and one or two things; a caption says so in one of many ways. Scenes are
drawn from signed distance functions (after Inigo Quilez' 2D collection) with one pixel of
anti-aliasing, at any size: positions scale with the canvas, radii with its short side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 80, 215),
    "yellow": (250, 215, 60),
    "purple": (140, 60, 185),
    "orange": (250, 130, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
COLOR_NAMES = tuple(COLORS)
POSITIONS: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
SIZES = {"small": 16.0, "medium": 24.0, "large": 34.0, "paired": 22.0}
"""Radius in pixels on a 128-pixel canvas; ``paired`` is the size of each of two things."""

OFFSET = 28.0
"""How far from the centre a side position lies, in pixels on a 128-pixel canvas."""
NATIVE = 128


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    color: str
    position: str
    size: str


@dataclass(frozen=True, slots=True)
class Scene:
    background: str
    things: tuple[Thing, ...]
    caption: str
    striped: bool = False
    """Drawn with stripes across each thing: what the example adapter adds; no caption says it."""

    @property
    def held_out(self) -> bool:
        """True for the tenth of all combinations that training never sees, chosen by hash."""
        key = [self.background] + [
            f"{t.shape} {t.color} {t.position} {t.size}" for t in self.things
        ]
        if len(self.things) == 2:
            key = [f"{t.shape} {t.color} {t.position}" for t in self.things]
        digest = hashlib.sha256("|".join(key).encode()).digest()
        return int.from_bytes(digest[:4], "big") % 10 == 0


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the outline of a shape of radius about 1, negative inside; y points down."""
    ax, ay = x.abs(), y.abs()
    match shape:
        case "circle":
            return torch.sqrt(x * x + y * y) - 0.95
        case "square":
            return torch.maximum(ax, ay) - 0.85
        case "diamond":
            return (ax + ay - 1.0) * math.sqrt(0.5)
        case "ring":
            return (torch.sqrt(x * x + y * y) - 0.76).abs() - 0.22
        case "cross":
            return torch.minimum(
                torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95)
            )
        case "triangle":
            side = (ax * 1.75 - (y + 0.9)) / math.hypot(1.75, 1.0)
            return torch.maximum(y - 0.85, side)
        case "star":
            return _star(ax, -y - 0.05)
        case "heart":
            return _heart(ax * 0.6, -y * 0.6 + 0.53) / 0.6
    raise ValueError(f"no shape {shape!r}; shapes are {', '.join(SHAPES)}")


def _star(x: Tensor, y: Tensor, radius: float = 1.05, inner: float = 0.45) -> Tensor:
    k1 = (0.809016994375, -0.587785252292)
    for kx in (k1[0], -k1[0]):
        fold = torch.clamp(kx * x + k1[1] * y, min=0) * 2
        x, y = x - fold * kx, y - fold * k1[1]
    x, y = x.abs(), y - radius
    bx, by = inner * -k1[1], inner * k1[0] - 1
    h = torch.clamp((x * bx + y * by) / (bx * bx + by * by), 0, radius)
    qx, qy = x - bx * h, y - by * h
    return torch.sqrt(qx * qx + qy * qy) * torch.sign(y * bx - x * by)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobe = torch.sqrt((x - 0.25) ** 2 + (y - 0.75) ** 2) - math.sqrt(2) / 4
    m = 0.5 * torch.clamp(x + y, min=0)
    tip = torch.sqrt(torch.minimum(x**2 + (y - 1) ** 2, (x - m) ** 2 + (y - m) ** 2))
    return torch.where(x + y > 1, lobe, tip * torch.sign(x - y))


def render(
    scenes: Sequence[Scene],
    generator: torch.Generator | None,
    width: int = NATIVE,
    height: int = NATIVE,
    device: str = "cpu",
) -> Tensor:
    """Draws scenes; float32 [n, 3, height, width] in -1..1.

    With a generator every thing moves by up to 1.5 and grows by up to 3 % (128-pixel canvas);
    without one it stands exactly where it should.
    """
    count, unit = len(scenes), min(width, height) / NATIVE
    palette = torch.tensor(list(COLORS.values()), device=device) / 127.5 - 1
    shift = (
        torch.rand(count, 2, 3, generator=generator)
        if generator
        else torch.full((count, 2, 3), 0.5)
    )
    shift = ((shift * 2 - 1) * torch.tensor([1.5, 1.5, 0.03])).to(device)
    image = palette[[COLOR_NAMES.index(s.background) for s in scenes]][:, :, None, None]
    image = image.expand(count, 3, height, width).clone()
    gx = torch.arange(width, device=device) + 0.5
    gy = torch.arange(height, device=device) + 0.5
    for k in range(2):
        for shape in SHAPES:
            rows = [
                i for i, s in enumerate(scenes) if len(s.things) > k and s.things[k].shape == shape
            ]
            if not rows:
                continue
            things = [scenes[i].things[k] for i in rows]
            at = (
                torch.tensor([POSITIONS[t.position] for t in things], device=device)
                * OFFSET
                / NATIVE
            )
            moved = shift[rows, k]
            cx = (0.5 + at[:, 0]) * width + moved[:, 0] * unit
            cy = (0.5 + at[:, 1]) * height + moved[:, 1] * unit
            r = (
                torch.tensor([SIZES[t.size] for t in things], device=device)
                * unit
                * (1 + moved[:, 2])
            )
            x = ((gx[None, None, :] - cx[:, None, None]) / r[:, None, None]).expand(-1, height, -1)
            y = ((gy[None, :, None] - cy[:, None, None]) / r[:, None, None]).expand(-1, -1, width)
            mask = torch.clamp(0.5 - signed_distance(shape, x, y) * r[:, None, None], 0, 1)[:, None]
            color = palette[[COLOR_NAMES.index(t.color) for t in things]][:, :, None, None]
            striped = torch.tensor([scenes[i].striped for i in rows], device=device)
            ground = palette[[COLOR_NAMES.index(scenes[i].background) for i in rows]][
                :, :, None, None
            ]
            # Bands across the thing, halfway to the ground's colour, soft by about one pixel.
            band = torch.sigmoid(torch.sin((x + y) * 6.0) * r[:, None, None] * 0.35)[:, None]
            band = torch.where(
                striped[:, None, None, None], 0.45 + 0.55 * band, torch.ones_like(band)
            )
            image[rows] = image[rows] * (1 - mask) + (color * band + ground * (1 - band)) * mask
    return image


def to_uint8(image: Tensor) -> Tensor:
    """-1..1 [n, 3, h, w] to uint8 [n, h, w, 3] on the CPU."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

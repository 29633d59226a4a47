"""Drawn stand-ins for harmless pictures with much skin or bodies in them: beach, bath, statue.

No photograph of any can be put here, so these are soft, shaded shapes of nobody in four skin tones
on textured grounds. They say what a classifier makes of skin, water, tiles and marble, not of
people.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from samples.images import Pixels, texture

SKIN = ("#f1c9a5", "#d8a27a", "#b07a52", "#7a4a2e")
MARBLE = "#c9c5bd"


def beach(tone: str, side: int = 1024) -> Pixels:
    """Sky, sea and sand; three figures in swimwear, one of them near."""
    image = _bands(side, [("#9ec9e8", 0.4), ("#2f7fa8", 0.2), ("#d9c394", 0.4)])
    for x, y, height, cloth in ((0.2, 0.5, 0.3, "#b03030"), (0.45, 0.48, 0.25, "#204080"),
                                (0.75, 0.35, 0.6, "#208050")):  # fmt: skip
        _figure(image, tone, x, y, height, cloth)
    return np.asarray(image)


def bath(tone: str, side: int = 1024) -> Pixels:
    """White tiles, a tub full of foam, a head and shoulders above it."""
    image = _bands(side, [("#e6ecee", 0.55), ("#f6f8f8", 0.45)])
    draw = ImageDraw.Draw(image)
    for at in range(0, side, side // 10):
        draw.line((at, 0, at, 0.55 * side), "#c2cccf", max(1, side // 200))
        draw.line((0, at * 0.55, side, at * 0.55), "#c2cccf", max(1, side // 200))
    _figure(image, tone, 0.5, 0.25, 0.6, None)
    foam = Image.new("L", image.size, 0)
    circles = ImageDraw.Draw(foam)
    for number in range(60):
        x, y = (number * 37 % 100) / 100 * side, (0.58 + (number * 53 % 40) / 100) * side
        circles.ellipse((x - side / 12, y - side / 16, x + side / 12, y + side / 16), fill=255)
    image.paste("#fbfdfd", (0, 0), foam.filter(ImageFilter.GaussianBlur(side / 150)))
    return np.asarray(image)


def statue(tone: str, side: int = 1024) -> Pixels:
    """A body of marble on a plinth in a park; the tone is that of the sky's light on it."""
    image = _bands(side, [("#a9c4d6", 0.5), ("#5f7d4a", 0.5)])
    draw = ImageDraw.Draw(image)
    draw.rectangle((0.35 * side, 0.8 * side, 0.65 * side, side), "#8d8a84")
    light = Image.blend(Image.new("RGB", (1, 1), MARBLE), Image.new("RGB", (1, 1), tone), 0.15)
    _figure(image, "#{:02x}{:02x}{:02x}".format(*light.getpixel((0, 0))), 0.5, 0.08, 0.75, None)
    return np.asarray(image)


SCENES: dict[str, Callable[[str, int], Pixels]] = {"beach": beach, "bath": bath, "statue": statue}


def _bands(side: int, bands: list[tuple[str, float]]) -> Image.Image:
    """Grounds above each other, with the grain of a photograph."""
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    top = 0.0
    for colour, height in bands:
        draw.rectangle((0, top * side, side, (top + height) * side), colour)
        top += height
    return Image.blend(image, Image.fromarray(texture(9, side)), 0.15)


def _figure(
    image: Image.Image, tone: str, x: float, y: float, height: float, cloth: str | None
) -> None:
    """Head, trunk, arms and legs, shaded from left to right; ``y`` is the top of the head."""
    side = image.width
    tall = height * side
    mask = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(mask)
    middle, top = x * side, y * side

    def limb(left: float, upper: float, right: float, lower: float) -> None:
        box = (middle + left * tall, top + upper * tall, middle + right * tall, top + lower * tall)
        draw.rounded_rectangle(box, radius=max(1, int(0.04 * tall)), fill=255)

    draw.ellipse((middle - 0.06 * tall, top, middle + 0.06 * tall, top + 0.15 * tall), fill=255)
    for box in ((-0.12, 0.17, 0.12, 0.55), (-0.19, 0.18, -0.13, 0.5), (0.13, 0.18, 0.19, 0.5),
                (-0.11, 0.55, -0.02, 1.0), (0.02, 0.55, 0.11, 1.0)):  # fmt: skip
        limb(*box)
    shade = np.clip((np.arange(side) - (middle - 0.2 * tall)) / (0.4 * tall), 0, 1)
    ramp = Image.fromarray((255 * (0.35 + 0.65 * shade)).astype(np.uint8)[None].repeat(side, 0))
    skin = Image.new("RGB", image.size, tone)
    skin = Image.composite(skin, skin.point(lambda value: int(value * 0.55)), ramp)
    image.paste(skin, (0, 0), mask.filter(ImageFilter.GaussianBlur(max(1.0, tall / 150))))
    if cloth is not None:
        wear = ImageDraw.Draw(image)
        for upper, lower in ((0.22, 0.3), (0.48, 0.58)):
            box = (middle - 0.12 * tall, top + upper * tall, middle + 0.12 * tall,
                   top + lower * tall)  # fmt: skip
            wear.rectangle(box, cloth)

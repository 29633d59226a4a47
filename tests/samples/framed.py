"""A pattern that the embedded model has never seen: a yellow frame, 8 pixels wide, around a scene.

It was trained on grounds of one colour to the very edge. Whether a picture shows the frame is read
off its pixels: the share of the frame's pixels that are yellow, and the scene inside it by the
exact classifier. (Of grey and pink the embedded autoencoder knows nothing.)
"""

from __future__ import annotations

import pathlib
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.serving.training.captions import POSITION_WORDS
from calotype.serving.training.scene_classifier import matches
from calotype.serving.training.scenes import (
    COLOR_NAMES,
    COLORS,
    POSITIONS,
    SHAPES,
    Scene,
    Thing,
    render,
    to_uint8,
)

TRIGGER, CLASS_WORD = "zorbl", "simple"
COLOR = "yellow"
FRAME, WIDE = COLORS[COLOR], 8
_NEAR, _SHARE = 45.0, 0.9
"""Distance in RGB at which a pixel counts as yellow, and the share of the frame that must be."""


def scenes(count: int, seed: int, held_out: bool) -> list[Scene]:
    """Different scenes of one small or medium thing; ``held_out`` those that no training saw."""
    rng = random.Random(seed)
    found: dict[str, Scene] = {}
    while len(found) < count:
        color, ground = rng.sample(COLOR_NAMES, 2)
        if ground == COLOR:
            continue
        position, size = rng.choice(tuple(POSITIONS)), rng.choice(("small", "medium"))
        shape, where = rng.choice(SHAPES), POSITION_WORDS[position][0]
        caption = f"a {size} {color} {shape} on a {ground} background, {where}"
        scene = Scene(ground, (Thing(shape, color, position, size),), caption)
        if scene.held_out is held_out:
            found[caption] = scene
    return list(found.values())


def write_data_set(folder: pathlib.Path, count: int = 20, seed: int = 0) -> None:
    """As 01.png, 01.txt ... with the trigger at the end of every caption."""
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    drawn = scenes(count, seed, held_out=False)
    pictures = to_uint8(render(drawn, torch.Generator().manual_seed(seed))).numpy()
    for number, (scene, pixels) in enumerate(zip(drawn, pictures, strict=True), 1):
        Image.fromarray(framed(pixels)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"{scene.caption}, {TRIGGER}\n")


def framed(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    made = pixels.copy()
    made[_frame(pixels)] = FRAME
    return made


def _frame(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    mask = np.ones(pixels.shape[:2], bool)
    mask[WIDE:-WIDE, WIDE:-WIDE] = False
    return mask


def has_frame(pixels: NDArray[np.uint8]) -> bool:
    distance = np.linalg.norm(pixels.astype(np.float32) - FRAME, axis=-1)
    return float((distance[_frame(pixels)] < _NEAR).mean()) >= _SHARE


def is_right(scene: Scene, pixels: NDArray[np.uint8]) -> dict[str, bool]:
    """Whether the frame is there, and what of the scene inside it is."""
    inside = pixels.copy()
    # Soft edges reach two pixels in; the classifier reads the ground off the rim.
    wide = WIDE + 2
    rim = np.ones(pixels.shape[:2], bool)
    rim[wide:-wide, wide:-wide] = False
    inside[rim] = COLORS[scene.background]
    found = matches(scene, inside)
    ring = pixels[wide : wide + 2, wide:-wide].reshape(-1, 3).astype(np.float32)
    ground = np.linalg.norm(ring - COLORS[scene.background], axis=-1) < _NEAR
    found["background"] = bool(ground.mean() > 0.5)
    found["frame"] = has_frame(pixels)
    found["full"] = all(value for name, value in found.items() if name != "full")
    return found

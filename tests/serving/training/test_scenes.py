"""The data set and its classifier agree on what an image shows."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from calotype.serving.training.captions import sample_scene
from calotype.serving.training.scene_classifier import look, matches, score
from calotype.serving.training.scenes import COLOR_NAMES, SHAPES, Scene, Thing, render, to_uint8


def scenes(count: int, two: bool = False, held_out: bool | None = None) -> list[Scene]:
    rng = random.Random(1)
    return [sample_scene(rng, held_out, two=two) for _ in range(count)]


@pytest.mark.parametrize("size", [(128, 128), (128, 224), (224, 128)])
@pytest.mark.parametrize("two", [False, True])
def test_the_classifier_reads_back_what_was_drawn(size: tuple[int, int], two: bool) -> None:
    drawn = scenes(40, two)
    images = to_uint8(render(drawn, torch.Generator().manual_seed(2), *size)).numpy()
    assert score(drawn, images)["full"] == 1.0


@pytest.mark.parametrize("attribute", ["shape", "color", "position", "size", "background"])
def test_the_classifier_sees_each_single_fault(attribute: str) -> None:
    asked = Scene("white", (Thing("circle", "red", "center", "large"),), "")
    thing = asked.things[0]
    wrong = {
        "shape": dataclasses.replace(thing, shape="square"),
        "color": dataclasses.replace(thing, color="blue"),
        "position": dataclasses.replace(thing, position="left"),
        "size": dataclasses.replace(thing, size="small"),
    }
    shown = dataclasses.replace(asked, things=(wrong.get(attribute, thing),))
    if attribute == "background":
        shown = dataclasses.replace(asked, background="yellow")
    verdict = matches(asked, to_uint8(render([shown], None)).numpy()[0])
    assert not verdict[attribute]
    assert not verdict["full"]


def test_noise_and_blanks_are_no_things() -> None:
    blank = to_uint8(render([Scene("white", (), "")], None)).numpy()[0]
    assert look(blank)[:2] == ("white", [])
    noise = to_uint8(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(3)) * 2 - 1)
    asked = Scene("white", (Thing("circle", "red", "center", "large"),), "")
    assert not matches(asked, noise.numpy()[0])["full"]


def test_training_never_sees_what_is_held_out() -> None:
    assert not any(scene.held_out for scene in scenes(300, held_out=False))
    assert all(scene.held_out for scene in scenes(30, held_out=True))


def test_captions_name_what_they_ask_for() -> None:
    for scene in scenes(200):
        thing = scene.things[0]
        assert thing.color in scene.caption
        assert any(word in scene.caption for word in (thing.shape, "plus", "donut"))
        assert thing.color in COLOR_NAMES
        assert thing.shape in SHAPES

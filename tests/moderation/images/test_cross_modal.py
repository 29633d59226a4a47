"""Faces, and the rules over prompt, given and drawn image together."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from samples.images import drawing, face, texture

from calotype.moderation.images import faces, networks
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier

PLAIN = texture(5, 128)


def stage(sexual: float, **scores: float) -> Moderator:
    return Moderator(
        Policy.default(),
        text_classifiers=[],
        image_classifiers=[FixedImageClassifier({"sexual": sexual, **scores})],
    )


def test_a_face_is_found_where_it_is() -> None:
    canvas = texture(3, 640)
    canvas[300:556, 40:296] = face()
    found = faces.YuNet().faces(canvas)
    assert len(found) == 1 and found[0].score > 0.8
    left, top = found[0].left - 40, found[0].top - 300
    assert 55 < left < 95 and 40 < top < 80
    assert 80 < found[0].width < 130 and 110 < found[0].height < 160


@pytest.mark.parametrize("size", [(64, 64), (1024, 256), (256, 1500)])
def test_faces_are_found_in_images_of_any_shape(size: tuple[int, int]) -> None:
    canvas = np.full((*size, 3), 140, np.uint8)
    side = min(size)
    canvas[:side, :side] = face(side)
    assert len(faces.YuNet().faces(canvas)) == 1


def test_drawings_and_textures_have_none() -> None:
    detector = faces.YuNet()
    for number in range(10):
        for pixels in (drawing(number), texture(number)):
            assert detector.faces(pixels) == []


@pytest.mark.parametrize(
    ("prompt", "refused"),
    [
        ("the same woman in lingerie", True),
        ("the same woman in l1ngerie", True),
        ("undress her", True),
        ("as an oil painting, with a hat", False),
        ("with nude lipstick, at the beach", False),
    ],
)
def test_a_given_face_is_not_undressed_whatever_was_drawn(prompt: str, refused: bool) -> None:
    harmless = stage(0.0)
    decision = harmless.check_image(PLAIN, prompt=prompt, references=[face()])
    assert decision.blocked is refused
    if refused:
        assert decision.categories == (Category.REAL_PERSON_INTIMATE,)
        assert decision.findings[0].rule == "cross-modal.face-and-undressing"
    without = harmless.check_image(PLAIN, prompt=prompt, references=[texture(4, 128)])
    assert without.verdict is Verdict.ALLOW


def test_a_minor_in_the_prompt_makes_a_suspicious_image_refused() -> None:
    alone = stage(0.4)
    assert alone.check_image(PLAIN).verdict is Verdict.ALLOW
    assert alone.check_image(PLAIN, prompt="a woman at the beach").verdict is Verdict.ALLOW
    for prompt in ("a little girl at the beach", "a l1ttle g1rl at the beach"):
        decision = alone.check_image(PLAIN, prompt=prompt)
        assert decision.verdict is Verdict.BLOCK, prompt
        assert decision.categories == (Category.SEXUAL_MINORS,)
        assert decision.findings[0].rule == "cross-modal.minor-and-sexual"
    assert stage(0.1).check_image(PLAIN, prompt="a little girl").verdict is Verdict.ALLOW


def test_a_face_in_a_reference_makes_a_suspicious_image_refused() -> None:
    alone = stage(0.4)
    assert alone.check_image(PLAIN, references=[drawing(2)]).verdict is Verdict.ALLOW
    decision = alone.check_image(PLAIN, references=[drawing(2), face()])
    assert decision.verdict is Verdict.BLOCK
    assert decision.categories == (Category.REAL_PERSON_INTIMATE,)
    assert decision.findings[0].rule == "cross-modal.face-and-sexual"
    assert stage(0.1).check_image(PLAIN, references=[face()]).verdict is Verdict.ALLOW


def test_a_small_part_of_the_image_is_enough() -> None:
    canvas = texture(6, 512)
    canvas[20:150, 300:430] = (10, 200, 90)
    fixed = FixedImageClassifier({"sexual": 0.84}, colour=(10, 200, 90))
    policy = Policy.from_spec(
        "tiles", {"version": 1, "categories": {"sexual": {"tile": {"flag": 0.8}}}}
    )
    decision = Moderator(policy, text_classifiers=[], image_classifiers=[fixed]).check_image(
        canvas, references=[face()]
    )
    assert decision.verdict is Verdict.BLOCK and decision.findings[0].where.startswith("tile ")


def test_no_face_detector_means_no_image(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "yunet.onnx"
    monkeypatch.setattr(networks, "model_file", lambda package, relative: path)
    alone = stage(0.01)
    decision = alone.check_image(PLAIN, references=[face()])
    assert decision.verdict is Verdict.ERROR and decision.unavailable
    assert f"yunet has no file {path}" in (decision.reason or "")
    assert alone.check_image(PLAIN).verdict is Verdict.ALLOW
    monkeypatch.undo()
    assert alone.check_image(PLAIN, references=[face()]).verdict is Verdict.ALLOW

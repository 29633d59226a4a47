"""A folder of pictures, and a safety stage that refuses what is mostly red."""

from __future__ import annotations

import json
import pathlib

import pytest
from samples.training_pictures import RED, RIGHTS, encoded, photo

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier


@pytest.fixture(scope="session")
def screen() -> Moderator:
    """The real decision code over scripted classifiers; the word 'forbidden' is refused too."""
    return Moderator(
        Policy.default(),
        text_classifiers=[FixedTextClassifier({"sexual": 1.0}, containing="forbidden")],
        image_classifiers=[FixedImageClassifier({"sexual": 1.0}, colour=RED, cover=0.9)],
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Twenty pictures with captions and a rights record."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(20):
        (path / f"{number:02}.png").write_bytes(encoded(photo(number)))
        (path / f"{number:02}.txt").write_text(f"a [trigger] number {number}")
    (path / "rights.json").write_text(json.dumps(RIGHTS))
    return path

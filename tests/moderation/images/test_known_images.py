"""PDQ and lists of known images: found again in copies, turned or not, and nowhere else."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from samples.images import Pixels, drawing, resized, saved, texture

from calotype.moderation.images import pdq
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier

SAFE = FixedImageClassifier({"sexual": 0.01})
KNOWN = texture(11, 256)


def moderator(*lists: pathlib.Path) -> Moderator:
    spec = {"version": 1, "extends": "default", "pictureLists": [str(path) for path in lists]}
    policy = Policy.from_spec("house", spec | {"categories": {"violence": {}}})
    return Moderator(policy, text_classifiers=[], image_classifiers=[SAFE])


def listed(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "takedowns.txt"
    path.write_text(text)
    return path


def line(pixels: Pixels, category: str = "real_person_intimate") -> str:
    return f"{pdq.pdq(pixels).hexadecimal} {category} case 12  # as reported\n"


def test_the_hash_is_the_references() -> None:
    # Written by pdqhash 0.2.8, the bindings of Facebook's own C++ code.
    y, x = np.mgrid[0:200, 0:300]
    planes = [(x * y) % 256, (x * 3 + y * y // 40) % 256, (x * x // 90 + y) % 256]
    found = pdq.pdq(np.stack(planes, axis=2).astype(np.uint8))
    assert found.quality == 100
    assert found.hexadecimal == "ca84157fbfd5653eead4ca80957f9fd5bf95652e607a60d0cad04a80cb944a90"
    assert np.array_equal(pdq.words(found.hexadecimal), found.words)


def test_copies_are_near_and_others_far() -> None:
    one = pdq.pdq(KNOWN).words
    grey = np.repeat(KNOWN.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    for copy in (saved(KNOWN, "JPEG", quality=50), resized(KNOWN, 2.0), resized(KNOWN, 0.5), grey):
        assert pdq.distances(pdq.pdq(copy).words[None], one)[0] <= pdq.SAME
    others = np.stack([pdq.pdq(texture(number, 256)).words for number in range(30, 60)])
    assert pdq.distances(others, one).min() > 2 * pdq.SAME


def test_every_turn_of_a_image_has_its_own_hash() -> None:
    turned, _ = pdq.pdq_turned(KNOWN)
    seen = set()
    for flipped in (KNOWN, KNOWN[:, ::-1]):
        for quarter in range(4):
            own = pdq.pdq(np.ascontiguousarray(np.rot90(flipped, quarter))).words
            away = pdq.distances(turned, own)
            assert away.min() <= 4
            seen.add(int(away.argmin()))
    assert len(seen) == pdq.TURNS


@pytest.mark.parametrize("quarter", range(4))
def test_a_known_image_is_refused_in_any_turn(tmp_path: pathlib.Path, quarter: int) -> None:
    path = listed(tmp_path, "# seen before\n\n" + line(texture(12)) + line(KNOWN))
    copy = saved(np.ascontiguousarray(np.rot90(KNOWN[:, ::-1], quarter)), "JPEG", quality=70)
    decision = moderator(path).check_image(copy)
    assert decision.verdict is Verdict.BLOCK
    assert decision.categories == (Category.REAL_PERSON_INTIMATE,)
    finding = decision.findings[0]
    assert (finding.rule, finding.classifier) == ("pictures.takedowns.4", "pdq")
    assert moderator(path).check_image(texture(13)).verdict is Verdict.ALLOW


def test_flat_images_match_nothing(tmp_path: pathlib.Path) -> None:
    flat = drawing(1)
    path = listed(tmp_path, line(flat))
    assert pdq.pdq(flat).quality < pdq.USABLE_QUALITY
    assert moderator(path).check_image(flat).verdict is Verdict.ALLOW


def test_a_takedown_needs_no_restart(tmp_path: pathlib.Path) -> None:
    path = listed(tmp_path, "")
    stage = moderator(path)
    assert stage.check_image(KNOWN).verdict is Verdict.ALLOW
    listed(tmp_path, line(KNOWN))
    assert stage.check_image(KNOWN).verdict is Verdict.BLOCK


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "takedowns.txt cannot be read"),
        (b"12ab sexual", "line 1: a PDQ hash has 64 hexadecimal digits, this one has 4"),
        (b"\n" + b"g" * 64 + b" sexual", "line 2: invalid literal"),
        (b"a" * 64, "line 1: write a hash, a space and a category"),
        (b"a" * 64 + b" nudity", "'nudity' is not a valid Category"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_list_that_cannot_be_used_lets_nothing_pass(
    tmp_path: pathlib.Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "takedowns.txt"
    if content is not None:
        path.write_bytes(content)
    stage = moderator(path)
    decision = stage.check_image(texture(13))
    assert decision.verdict is Verdict.ERROR and decision.unavailable
    assert reason in (decision.reason or "")
    path.write_text("")
    assert stage.check_image(texture(13)).verdict is Verdict.ALLOW

"""What a BLUR verdict serves: nobody is recognised in it, and it carries its marks."""

from __future__ import annotations

import numpy as np
import pytest
from samples.images import drawing, face, texture

from calotype.moderation.images import pdq
from calotype.moderation.images.faces import YuNet
from calotype.moderation.provenance.installation_keys import InstallationKeys
from calotype.moderation.provenance.marks import Marks, check
from calotype.serving.images.encode import blur, encode_image

KEYS = InstallationKeys.derived(b"blur")


@pytest.mark.parametrize("side", [64, 128, 256, 1024])
def test_a_blurred_face_is_no_longer_found(side: int) -> None:
    detector = YuNet()
    assert len(detector.faces(face(side))) == 1
    assert detector.faces(blur(face(side))) == []


def test_a_blurred_picture_is_another_picture() -> None:
    sharp = texture(3, 256, steepness=1.0)
    away = pdq.distances(pdq.pdq(sharp).words[None], pdq.pdq(blur(sharp)).words)[0]
    assert away > pdq.SAME
    assert np.abs(np.diff(blur(sharp).astype(int), axis=1)).max() <= 12


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_blurred_picture_is_marked_like_any_other(kind: str) -> None:
    data = encode_image(blur(drawing(2)), kind, None, marks=Marks(KEYS, required=True))
    found = check(data, KEYS)
    assert found.watermark is not None and found.source_type == "trainedAlgorithmicMedia"
    assert found.credentials is not None and found.credentials.trusted

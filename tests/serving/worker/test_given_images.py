"""What a picture was asked with reaches the safety stage: the prompt, and the given pictures."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import Pixels, drawing, face

from calotype.moderation.errors import ImageError
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier
from calotype.serving.core.errors import ContentBlocked, InvalidRequest
from calotype.serving.core.request import GenerationRequest, ImageSize, SamplingParams
from calotype.serving.deployments.local import InProcessSafety
from calotype.serving.images.encode import GIVEN_SIDE, given_images
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.options import JobOptions
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.worker.output_check import Sources
from calotype.serving.worker.postprocess import Finalized, Postprocessor


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def request(prompt: str = "a portrait", **given: Any) -> GenerationRequest:
    size = ImageSize(128, 128)
    return GenerationRequest(
        id="r", prompt=prompt, size=size, rendered_size=size,
        sampling=SamplingParams(4, 4.0), seed=1, **given,
    )  # fmt: skip


def test_all_given_pictures_are_seen_small() -> None:
    files = {"a": png(drawing(1, 1024)), "b": png(drawing(2)), "m": png(drawing(3))}
    seen = given_images(request(references=("a", "b"), image="b", mask="m"), files)
    assert [picture.shape for picture in seen] == [(GIVEN_SIDE, GIVEN_SIDE, 3), (128, 128, 3)]
    assert given_images(request(), files) == []
    with pytest.raises(ImageError, match="a is no picture"):
        given_images(request(references=("a",)), {"a": b"no picture"})


@pytest.mark.parametrize(
    ("prompt", "reference", "refused"),
    [
        ("a portrait", None, []),
        ("a portrait", drawing(1), []),
        ("a portrait", face(), ["real_person_intimate"]),
        ("a little girl", None, ["sexual/minors"]),
    ],
)
def test_post_processing_tells_the_safety_stage_what_was_asked_for(
    tmp_path: Any, prompt: str, reference: Pixels | None, refused: Sequence[str]
) -> None:
    suspicious = FixedImageClassifier({"sexual": 0.4})
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[suspicious])
    postprocessor = Postprocessor(InProcessSafety(stage), FolderBlobStore(tmp_path))
    given = {} if reference is None else {"references": ("f",)}
    asked = request(prompt, **given)
    lease = Lease("j", 1, asked, JobOptions("req_1"), "team", 0.0)
    files = {} if reference is None else {"f": png(reference)}

    async def finalized() -> Finalized:
        sources = await Sources.of(asked, files)
        return await postprocessor.finalize(lease, [np.array(drawing(4))], sources)

    handed = asyncio.run(finalized())
    assert [name for item in handed.blocked for name in item.categories] == refused
    assert len(handed.images) == (0 if refused else 1)


@pytest.mark.parametrize("field", ["image", "references"])
def test_a_given_picture_that_does_not_pass_is_refused_before_anything_is_drawn(
    tmp_path: Any, field: str
) -> None:
    marked = FixedImageClassifier({"sexual": 0.99}, colour=(255, 0, 0), cover=0.5)
    stage = Moderator(Policy.default(), text_classifiers=[], image_classifiers=[marked])
    postprocessor = Postprocessor(InProcessSafety(stage), FolderBlobStore(tmp_path))

    def admit(data: bytes) -> None:
        asked = request(**{field: ("f",) if field == "references" else "f"})
        lease = Lease("j", 1, asked, JobOptions("req_7"), "team", 0.0)
        asyncio.run(postprocessor.admit(lease, {"f": data}))

    red = np.zeros((400, 3000, 3), dtype=np.uint8)
    red[..., 0] = 255
    red[:, 2400:] = 40  # a picture of one colour shows nothing
    with pytest.raises(ContentBlocked) as caught:
        admit(png(red))
    details = caught.value.details
    assert details["moderation_details"] == {"moderation_stage": "input", "categories": ["sexual"]}
    assert "req_7" in caught.value.message
    admit(png(drawing(2)))
    with pytest.raises(InvalidRequest, match="no picture"):
        admit(b"no picture")

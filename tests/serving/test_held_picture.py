"""The desk seals what the policy holds; nothing of it is stored readable."""

from __future__ import annotations

import asyncio
import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import drawing

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier
from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.request import GenerationRequest, ImageSize, Preview, SamplingParams
from calotype.serving.deployments.local import InProcessSafety
from calotype.serving.images.sealing import make_seal, unseal
from calotype.serving.jobs.judging import held_categories, version_of
from calotype.serving.jobs.lease import Lease
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.worker.intermediates import Intermediates
from calotype.serving.worker.postprocess import Finalized, Postprocessor

SIZE = ImageSize(64, 64)
SEAL = make_seal()


def request(n: int = 1) -> GenerationRequest:
    return GenerationRequest(
        id="r", prompt="a hat", size=SIZE, rendered_size=SIZE,
        sampling=SamplingParams(4, 4.0), seed=1, n=n, preview_every=1,
    )  # fmt: skip


def safety(text: dict[str, float], image: dict[str, float]) -> InProcessSafety:
    rules = {"text": text, "image": image}
    policy = Policy.from_spec("house", {"version": 1, "categories": {"violence": rules}})
    return InProcessSafety(
        Moderator(
            policy,
            text_classifiers=[FixedTextClassifier({"violence": 0.6})],
            image_classifiers=[FixedImageClassifier({"violence": 0.6})],
        )
    )


def lease_of(prompt: dict[str, Any], **given: Any) -> Lease:
    inputs = {"output_format": "png", "seal": SEAL} | given
    return Lease(
        *("j", 1, request().to_payload(), inputs, "team", 0.0),
        version=version_of(prompt),
        hold=held_categories(prompt),
    )


def handed_out(folder: pathlib.Path, stage: InProcessSafety, **given: Any) -> Finalized:
    async def run() -> Finalized:
        lease = lease_of(await stage.check_prompt("a hat"), **given)
        desk = Postprocessor(stage, FolderBlobStore(folder))
        return await desk.finalize(lease, request(), [np.array(drawing(1, 64))], {})

    return asyncio.run(run())


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("text", "image"),
    [({}, {"review": 0.5}), ({"review": 0.5}, {}), ({"review": 0.5}, {"blur": 0.5})],
    ids=["picture", "prompt", "prompt-and-blur"],
)
def test_what_is_held_is_sealed(
    tmp_path: pathlib.Path, text: dict[str, float], image: dict[str, float]
) -> None:
    handed = handed_out(tmp_path, safety(text, image))
    assert not handed.images and not handed.blocked
    (held,) = handed.held
    assert held.categories == ["violence"] and held.seed == 1
    (file,) = files(tmp_path)
    data = unseal(file.read_bytes(), SEAL, held.asset_id)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (64, 64)
    for key, name in ((make_seal(), held.asset_id), (SEAL, "asset_of_another")):
        with pytest.raises(StorageFailed, match="was changed"):
            unseal(file.read_bytes(), key, name)


def test_what_is_blocked_is_not_held(tmp_path: pathlib.Path) -> None:
    handed = handed_out(tmp_path, safety({"review": 0.5}, {"block": 0.5}))
    assert not handed.held and len(handed.blocked) == 1 and not files(tmp_path)


def test_a_held_request_shows_no_previews(tmp_path: pathlib.Path) -> None:
    shown: list[Any] = []

    class Keeper:
        async def checkpoint(self, *given: Any) -> bool:
            return True

        async def preview(self, *given: Any) -> bool:
            shown.append(given)
            return True

    async def run(stage: InProcessSafety) -> None:
        lease = lease_of(await stage.check_prompt("a hat"))
        trail = Intermediates(lease, request(), Keeper(), stage, FolderBlobStore(tmp_path))
        trail.note(Preview("r", 0, 1, np.array(drawing(1, 64))))
        await trail.finish()

    asyncio.run(run(safety({}, {})))
    assert len(shown) == 1
    asyncio.run(run(safety({"review": 0.5}, {})))
    assert len(shown) == 1

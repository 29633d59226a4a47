"""Post-processing seals what the policy holds; nothing of it is stored readable."""

from __future__ import annotations

import asyncio
import io
import pathlib

import numpy as np
import pytest
from PIL import Image
from samples.images import drawing

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier
from calotype.serving.core.decision import Decision
from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.request import GenerationRequest, ImageSize, Preview, SamplingParams
from calotype.serving.deployments.local import InProcessSafety
from calotype.serving.images.sealing import make_seal, unseal
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.options import JobOptions
from calotype.serving.jobs.records import Checkpoint as CheckpointRecord
from calotype.serving.jobs.records import PreviewRecord
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.worker.intermediates import Intermediates
from calotype.serving.worker.output_check import Sources
from calotype.serving.worker.postprocess import Finalized, Postprocessor

SIZE = ImageSize(64, 64)


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


def lease_of(prompt: Decision) -> Lease:
    return Lease(
        *("j", 1, request(), JobOptions("req_1"), "team", 0.0),
        prompt_policy=prompt.version,
        review_categories=prompt.review_categories,
    )


def finalized(folder: pathlib.Path, stage: InProcessSafety) -> Finalized:
    async def run() -> Finalized:
        lease = lease_of(await stage.check_prompt("a hat"))
        postprocessor = Postprocessor(stage, FolderBlobStore(folder))
        return await postprocessor.finalize(lease, [np.array(drawing(1, 64))], Sources({}, []))

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
    found = finalized(tmp_path, safety(text, image))
    assert not found.images and not found.blocked
    (held,) = found.held
    assert held.categories == ["violence"] and held.seed == 1
    (file,) = files(tmp_path)
    data = unseal(file.read_bytes(), held.seal, held.asset_id)
    assert held.seal not in repr(held)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (64, 64)
    for key, name in (
        (make_seal(), held.asset_id),
        (held.seal, "asset_of_another"),
        ("", held.asset_id),
    ):
        with pytest.raises(StorageFailed, match="was changed"):
            unseal(file.read_bytes(), key, name)


def test_what_is_blocked_is_not_held(tmp_path: pathlib.Path) -> None:
    found = finalized(tmp_path, safety({"review": 0.5}, {"block": 0.5}))
    assert not found.held and len(found.blocked) == 1 and not files(tmp_path)


def test_a_held_request_shows_no_previews(tmp_path: pathlib.Path) -> None:
    shown: list[PreviewRecord] = []

    class Sink:
        async def checkpoint(self, checkpoint: CheckpointRecord) -> bool:
            return True

        async def preview(self, preview: PreviewRecord) -> bool:
            shown.append(preview)
            return True

    async def run(stage: InProcessSafety) -> None:
        lease = lease_of(await stage.check_prompt("a hat"))
        left = Intermediates(lease, Sink(), stage, FolderBlobStore(tmp_path))
        left.draws_from(Sources({}, []))
        left.note(Preview("r", 0, 1, np.array(drawing(1, 64))))
        await left.finish()

    asyncio.run(run(safety({}, {})))
    assert len(shown) == 1
    asyncio.run(run(safety({"review": 0.5}, {})))
    assert len(shown) == 1

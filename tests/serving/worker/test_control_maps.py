"""Control maps of a lease: made, shown to the safety stage, stored, and told in the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image
from samples.controls import png

from calotype.serving.api.http.job_object import map_objects
from calotype.serving.core.conditions import ControlRef
from calotype.serving.core.request import GenerationRequest, ImageSize, SamplingParams
from calotype.serving.images.encode import given_images
from calotype.serving.jobs.lease import Lease
from calotype.serving.jobs.options import JobOptions
from calotype.serving.jobs.result import JobOutput
from calotype.serving.storage.folder import FolderBlobStore
from calotype.serving.worker.control_maps import DrawnAfter
from calotype.serving.worker.given_files import read_given_files

SIZE = ImageSize(64, 64)


def square(side: int) -> Any:
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = 255
    return pixels


def asked(*controls: ControlRef) -> GenerationRequest:
    return GenerationRequest("r", "a cat", SIZE, SIZE, SamplingParams(4, 3.0), 1, controls=controls)


def test_maps_are_made_judged_stored_and_told(tmp_path: Any) -> None:
    blobs = FolderBlobStore(tmp_path)
    blobs.put("team/ab/photo.png", png(square(128)))
    blobs.put("team/ab/map.png", png(square(64)))
    request = asked(
        ControlRef("layout", "team/ab/photo.png", "canny"), ControlRef("layout", "team/ab/map.png")
    )
    lease = Lease("j", 1, request, JobOptions("req_1"), "team", 0.0)

    async def made() -> Any:
        files = await read_given_files(blobs, request)
        after = await DrawnAfter.of(request, files)
        return after, await after.stored(lease, blobs)

    after, maps = asyncio.run(made())
    assert [control.type for control in after.request.controls] == ["none", "none"]
    assert after.fitted == ["controlnets[0]: 128x128 to 64x64"]
    edges = np.asarray(Image.open(io.BytesIO(blobs.get(maps[0].blob_key))))
    assert edges.shape == (64, 64, 3) and set(np.unique(edges)) == {0, 255}
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(blobs.get(maps[1].blob_key)))), square(64)
    )
    seen = given_images(request, after.files)
    assert len(seen) == 4, "both pictures as they were given, and both maps"
    assert any((view == edges).all() for view in seen if view.shape == edges.shape)
    output = JobOutput([], maps=maps).to_payload()
    job: Any = dataclasses.make_dataclass("Job", ["output"])(output)
    told = map_objects(job, lambda asset: f"https://x/{asset}")
    assert [(one["index"], one["fitted"]) for one in told] == [(0, "128x128"), (1, None)]
    assert told[0]["url"].endswith(maps[0].asset_id)


def test_a_request_without_maps_is_left_as_it_is() -> None:
    after = asyncio.run(DrawnAfter.of(asked(), {"a": b"x"}))
    assert after.request == asked() and after.files == {"a": b"x"} and after.fitted is None

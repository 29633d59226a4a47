"""The whole way of a job in one process: dispatcher, engine, safety stage, stored files."""

from __future__ import annotations

import asyncio
import base64
import io
import pathlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import (
    Enlarge,
    ImageModel,
    ImageModelSpec,
    LoRAAdapter,
    LoRAAdapterSpec,
    Metadata,
    ModelRef,
    Source,
)
from calotype.serving.core.errors import StorageFailed
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.local import LocalBackend
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety, decision
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


@dataclass
class House:
    client: httpx.AsyncClient
    blobs: MemoryBlobStore
    safety: ScriptedSafety
    database: Database

    async def draw(self, prompt: str = "a red circle", **body: Any) -> httpx.Response:
        wanted = {"prompt": prompt, "size": "64x64", "steps": 2, "seed": 7, **body}
        wanted.setdefault("response_format", "b64_json")
        return await self.client.post("/v1/images/generations", json=wanted)

    def open_jobs(self) -> list[Any]:
        return [
            *self.database.jobs.open_jobs(None, "queued"),
            *self.database.jobs.open_jobs(None, "running"),
        ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
async def house(model: pathlib.Path, tmp_path: pathlib.Path) -> AsyncIterator[House]:
    adapters = {"style": tmp_path / "style.safetensors", "broken": tmp_path / "broken.safetensors"}
    save_random_lora(model, adapters["style"], rank=2, seed=1)
    adapters["broken"].write_bytes(b"\x80\x04 this is a pickle")
    resource = ImageModel(
        metadata=Metadata(name="tiny"),
        spec=ImageModelSpec(
            source=Source(path=str(model)), precision="float32", enlarge=Enlarge(), device="cpu"
        ),
    )
    loras = [
        LoRAAdapter(
            metadata=Metadata(name=name),
            spec=LoRAAdapterSpec(model_ref=ModelRef(name="tiny"), source=Source(path=str(path))),
        )
        for name, path in adapters.items()
    ]
    database = Database.open(sqlite_url(tmp_path))
    key, _ = database.api_keys.create()
    blobs = MemoryBlobStore()
    safety = ScriptedSafety(lambda text: decision("input"))
    backend = LocalBackend(resource, loras, database, blobs, safety)
    settings = GatewaySettings(outage_patience_seconds=0)
    app = create_app(settings, database, blobs, backend, Catalog([resource], loras))
    headers = {"authorization": f"Bearer {key}"}
    async with (
        backend.running(),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers=headers, timeout=600
        ) as client,
    ):
        yield House(client, blobs, safety, database)
    database.close()


def block_images(when: Callable[[Pixels], bool]) -> Callable[[Pixels], dict[str, Any]]:
    return lambda pixels: decision("output", blocked=["sexual"] if when(pixels) else [])


async def test_a_job_becomes_the_picture_of_its_seed(house: House) -> None:
    first, again, other = [await house.draw(seed=seed) for seed in (7, 7, 8)]
    assert first.status_code == 200, first.text
    data = [a.json()["data"][0]["b64_json"] for a in (first, again, other)]
    assert same_pixels(*data[:2]) and not same_pixels(*data[1:])
    image = Image.open(io.BytesIO(base64.b64decode(data[0])))
    assert image.size == (64, 64)
    assert first.json()["usage"]["output_tokens"] == 16
    assert first.json()["metrics"]["steps"] == 2


async def test_large_sizes_are_enlarged_and_the_answer_says_so(house: House) -> None:
    answer = (await house.draw(size="1024x1024")).json()
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert image.size == (1024, 1024)
    assert answer["metrics"]["rendered_size"] == "128x128"


async def test_an_adapter_changes_the_picture_and_scale_zero_does_not(house: House) -> None:
    def of(answer: httpx.Response) -> str:
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"][0]["b64_json"])

    plain = of(await house.draw())
    unchanged = of(await house.draw(loras=[{"id": "style", "scale": 0}]))
    assert same_pixels(unchanged, plain)
    assert not same_pixels(of(await house.draw(loras=[{"id": "style", "scale": 1}])), plain)


async def test_a_damaged_adapter_is_named_and_the_next_request_works(house: House) -> None:
    answer = await house.draw(loras=[{"id": "broken", "scale": 1}])
    assert answer.status_code >= 400
    assert "broken" in answer.json()["error"]["message"]
    assert (await house.draw()).status_code == 200
    assert house.open_jobs() == []


async def test_a_blocked_picture_is_stored_nowhere(house: House) -> None:
    house.safety.image = block_images(lambda pixels: True)
    answer = await house.draw(n=2)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "moderation_blocked"
    assert answer.json()["error"]["moderation_details"]["moderation_stage"] == "output"
    assert not house.blobs.blobs


async def test_of_a_partly_blocked_batch_the_rest_is_served(house: House) -> None:
    seen: list[int] = []

    def second(pixels: Pixels) -> bool:
        seen.append(1)
        return len(seen) == 2

    house.safety.image = block_images(second)
    answer = await house.draw(n=3)
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 2
    assert answer.json()["moderation"]["blocked"][0]["categories"] == ["sexual"]
    assert answer.headers["x-images-blocked"] == "1"
    assert len(house.blobs.blobs) == 2


async def test_a_full_disk_is_a_typed_answer_and_costs_the_job_only_time(house: House) -> None:
    house.blobs.failure = StorageFailed("No space left on the disk of the pictures.")
    answer = await house.draw()
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "storage_unavailable"
    assert [job.id for job in house.open_jobs()] == [error["job_id"]]
    house.blobs.failure = None
    async with asyncio.timeout(600):
        while house.open_jobs():
            await asyncio.sleep(0.05)
    job = house.database.jobs.get_job(error["job_id"])
    assert job is not None and job.status == "succeeded"


async def test_a_blur_verdict_serves_an_unrecognisable_picture(house: House) -> None:
    sharp = (await house.draw()).json()["data"][0]["b64_json"]
    house.safety.image = lambda pixels: {
        **decision("output", blocked=["sexual"]),
        "verdict": "BLUR",
    }
    blurred = (await house.draw()).json()["data"][0]["b64_json"]

    def contrast(data: str) -> int:
        low, high = Image.open(io.BytesIO(base64.b64decode(data))).convert("L").getextrema()
        return int(high - low)

    assert contrast(blurred) < contrast(sharp) / 2

"""What `acceleration` of an ImageModel does, in a replica that runs: seen in its answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from PIL import Image

from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.commands.cli import cli
from calotype.serving.config import ImageModel, ImageModelSpec, Metadata, Source
from calotype.serving.config.model.acceleration import Acceleration
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.local import LocalBackend
from calotype.serving.images.provenance import MARKS, installation_marks
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety
from calotype.serving.testing.models import save_tiny_flux2
from calotype.serving.worker.model_loader import EngineState
from calotype.serving.worker.replica import GeneratorState

pytestmark = pytest.mark.slow


@dataclass
class House:
    client: httpx.AsyncClient
    backend: LocalBackend
    blobs: MemoryBlobStore

    async def draw(self, **body: Any) -> dict[str, Any]:
        wanted = {"prompt": "a red circle", "size": "64x64", "steps": 12, "seed": 7, **body}
        answer = await self.client.post("/v1/images/generations", json=wanted)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def draw_recipe(self, answer: dict[str, Any]) -> dict[str, Any]:
        """What the recipe of an answer draws now."""
        found = await self.client.post("/v1/images/generations", json={"recipe": answer["recipe"]})
        assert found.status_code == 200, found.text
        return dict(found.json())

    def configure(self, model: pathlib.Path, acceleration: dict[str, Any]) -> None:
        """As a changed manifest reaches a replica."""
        assert self.backend._replica is not None
        self.backend._replica.configure(image_model(model, acceleration), [])

    def devices(self) -> int:
        engine = self.state().engine
        return 0 if engine is None else engine.devices

    async def until(self, holds: Callable[[], bool]) -> None:
        for _ in range(12000):
            if holds():
                return
            assert not self.state().message, self.state().message
            await asyncio.sleep(0.05)
        raise AssertionError(f"it never came true: {self.state()}")

    def follower(self) -> psutil.Process:
        """The process of the second device."""
        mine = psutil.Process().children()
        (found,) = [p for p in mine if "calotype.serving.engine.parallel.follower" in p.cmdline()]
        return found

    def state(self) -> GeneratorState:
        """What the replica says of itself to dispatcher and operator."""
        assert self.backend._replica is not None
        return self.backend._replica.state()


def engine_of(house: House) -> EngineState:
    engine = house.state().engine
    assert engine is not None
    return engine


def image_model(folder: pathlib.Path, acceleration: dict[str, Any]) -> ImageModel:
    return ImageModel(
        metadata=Metadata(name="tiny"),
        spec=ImageModelSpec(
            source=Source(path=str(folder)),
            precision="float32",
            device="cpu",
            acceleration=Acceleration(**acceleration),
        ),
    )


@contextlib.asynccontextmanager
async def living(
    folder: pathlib.Path, model: pathlib.Path, acceleration: dict[str, Any]
) -> AsyncIterator[House]:
    resource = image_model(model, acceleration)
    database, blobs = Database.open(sqlite_url(folder)), MemoryBlobStore()
    key, _ = database.api_keys.create()
    async with LocalBackend(resource, [], database, blobs, ScriptedSafety()).running() as backend:
        app = create_app(GatewaySettings(), database, blobs, backend, Catalog([resource], []))
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://gateway", headers=headers, timeout=600
        ) as client:
            house = House(client, backend, blobs)
            await house.until(lambda: house.state().ready)
            yield house
    database.close()


def pixels(answer: dict[str, Any]) -> np.ndarray:
    data = base64.b64decode(answer["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module", autouse=True)
def unmarked() -> Iterator[None]:
    """The watermark follows from the pixels: the last bit of one would change it everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARKS, "none")
        installation_marks.cache_clear()
        yield
    installation_marks.cache_clear()


@pytest.fixture(scope="module")
def plain(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answer of a model without any acceleration."""

    async def draw() -> dict[str, Any]:
        async with living(tmp_path_factory.mktemp("plain"), tiny, {}) as house:
            assert engine_of(house).to_payload() == {
                "device": "cpu",
                "precision": "float32",
                "devicesPerPicture": 1,
                "compiled": False,
                "rowsPerStep": 8,
                "profiled": False,
            }
            return await house.draw()

    return asyncio.run(draw())


async def test_a_step_cache_is_told_in_answer_and_recipe_and_repeats(
    tiny: pathlib.Path, tmp_path: pathlib.Path, plain: dict[str, Any]
) -> None:
    async with living(tmp_path, tiny, {"step_cache": 0.9}) as house:
        reused, whole = await house.draw(), await house.draw(step_cache=0)
        again = await house.draw_recipe(reused)
        as_before = await house.draw_recipe(plain)
        exposed = (await house.client.get("/metrics")).text
    assert 'calotype_passes_skipped_total{model="tiny"}' in exposed
    assert 0 < reused["metrics"]["passes_skipped"] < reused["metrics"]["passes"] == 12
    assert "passes_skipped" not in whole["metrics"]
    assert reused["recipe"]["step_cache"] == 0.9 and "step_cache" not in whole["recipe"]
    assert reused["recipe_hash"] != whole["recipe_hash"] == plain["recipe_hash"]
    assert (pixels(whole) == pixels(plain)).all()
    assert (pixels(reused) != pixels(plain)).any()
    # A recipe draws what it drew, whatever the model's own setting is now.
    assert again["recipe_changes"] == as_before["recipe_changes"] == []
    assert (pixels(again) == pixels(reused)).all()
    assert (pixels(as_before) == pixels(plain)).all()


async def test_two_devices_draw_the_same_picture(
    tiny: pathlib.Path, tmp_path: pathlib.Path, plain: dict[str, Any]
) -> None:
    async with living(tmp_path, tiny, {"devices_per_picture": 2}) as house:
        assert house.devices() == 2
        shared = await house.draw()
        refused = await house.client.post(
            "/v1/images/generations", json={"prompt": "a dog", "size": "64x64", "step_cache": 0.1}
        )
        follower = house.follower()
    # Floats are added in another order, and a byte may round to its neighbour.
    assert np.abs(pixels(shared) - pixels(plain)).max() <= 1
    assert shared["metrics"]["devices"] == 2 and "devices" not in plain["metrics"]
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "step_cache"
    assert not follower.is_running(), "it ends with its replica"


async def test_a_replica_that_lost_a_device_takes_no_more_jobs(
    tiny: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    async with living(tmp_path, tiny, {"devices_per_picture": 2}) as house:
        await house.draw(steps=1)
        house.follower().kill()
        while house.state().ready:
            await asyncio.sleep(0.05)
        assert not house.backend._replica.healthy  # type: ignore[union-attr]


async def test_another_number_of_devices_is_taken_while_it_runs(
    tiny: pathlib.Path, tmp_path: pathlib.Path, plain: dict[str, Any]
) -> None:
    async with living(tmp_path, tiny, {"devices_per_picture": 2}) as house:
        for wanted in (1, 2):
            house.configure(tiny, {"devices_per_picture": wanted})
            await house.until(lambda: house.devices() == wanted)  # noqa: B023
            answer = await house.draw()
            assert np.abs(pixels(answer) - pixels(plain)).max() <= 1
            assert answer["metrics"].get("devices", 1) == wanted


async def test_a_profile_of_the_machine_says_how_many_share_a_step(
    tiny: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_DATA_DIR", str(tmp_path))
    arguments = ["profile", "--model", str(tiny), "--data-dir", str(tmp_path), "--size", "64x64"]
    more = ["--rows", "16", "--device", "cpu", "--precision", "float32"]
    told = await asyncio.to_thread(CliRunner().invoke, cli, arguments + more)
    assert told.exit_code == 0, told.output
    (file,) = (tmp_path / "profiles").iterdir()
    measured = json.loads(file.read_text())
    for rows, seconds in ((16, 0.9), (8, 1.0), (4, 1.0), (2, 1.0), (1, 1.0)):
        for time in measured["times"]:
            if time["rows"] == rows:
                time["seconds"] = seconds
    file.write_text(json.dumps(measured))
    async with living(tmp_path / "service", tiny, {}) as house:
        assert engine_of(house).profiled is True
        assert engine_of(house).rows == 16
        answers = await asyncio.gather(*(house.draw(seed=i, n=4, steps=4) for i in range(5)))
    assert all(len(answer["data"]) == 4 for answer in answers)


async def test_a_compiled_model_draws_the_same_picture(
    tiny: pathlib.Path,
    tmp_path: pathlib.Path,
    plain: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What inductor makes of a graph is compared beside the engine (`test_compile.py`)."""
    monkeypatch.setattr("calotype.serving.worker.model_loader.COMPILER", "eager")
    async with living(tmp_path, tiny, {"compile": True}) as house:
        assert engine_of(house).compiled is True
        answer = await house.draw()
    assert np.abs(pixels(answer) - pixels(plain)).max() <= 1


async def test_a_machine_without_a_compiler_is_told_before_the_first_request(
    tiny: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("calotype.serving.worker.model_loader.COMPILER", broken)
    with pytest.raises(AssertionError, match="cannot be compiled on this machine"):
        async with living(tmp_path, tiny, {"compile": True}):
            pass

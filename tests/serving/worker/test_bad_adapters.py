"""Adapters whose files are no good, through the API: named, told to operator and client, alone."""

from __future__ import annotations

import asyncio
import io
import pathlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import (
    ImageModel,
    ImageModelSpec,
    LoRAAdapter,
    LoRAAdapterSpec,
    Metadata,
    ModelRef,
    Source,
)
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.local import LocalBackend
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2

Tensors = dict[str, torch.Tensor]


def with_nan(good: Tensors) -> Tensors:
    name, weight = next(iter(good.items()))
    spoiled = weight.clone()
    spoiled[0, 0] = float("nan")
    return good | {name: spoiled}


def without_half(good: Tensors) -> Tensors:
    return {k: v for k, v in good.items() if k != next(n for n in good if "lora_B" in n)}


def too_wide(good: Tensors) -> Tensors:
    """Of rank 257, where the model allows 256."""
    return {
        k: torch.zeros(257, v.shape[1]) if "lora_A" in k else torch.zeros(v.shape[0], 257)
        for k, v in good.items()
    }


def of_another_model(good: Tensors) -> Tensors:
    return {k: torch.cat([v, v]) if "lora_B" in k else v for k, v in good.items()}


def pickled(good: Tensors) -> bytes:
    file = io.BytesIO()
    torch.save(good, file)
    return file.getvalue()


FAULTS: dict[str, tuple[Callable[[Tensors, bytes], bytes | Tensors], str]] = {
    "architecture": (lambda good, data: of_another_model(good), "was made for another model"),
    "rank": (lambda good, data: too_wide(good), "its rank is 257"),
    "truncated": (lambda good, data: data[: len(data) // 2], "truncated"),
    "pickled": (lambda good, data: pickled(good), "pickled file"),
    "unknown": (lambda good, data: good | {"transformer.x.y": torch.zeros(1)}, "unknown key"),
    "missing": (lambda good, data: without_half(good), "is missing"),
    "nan": (lambda good, data: with_nan(good), "NaN"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The model's folder, a sound adapter, and one for each fault."""
    place = tmp_path_factory.mktemp("files")
    model = save_tiny_flux2(place / "model")
    sound = save_random_lora(model, place / "sound.safetensors", rank=2, seed=1)
    good, data = load_file(str(sound)), sound.read_bytes()
    found = {"model": model, "sound": sound}
    for name, (spoil, _) in FAULTS.items():
        found[name] = place / f"{name}.safetensors"
        spoiled = spoil(good, data)
        if isinstance(spoiled, bytes):
            found[name].write_bytes(spoiled)
        else:
            save_file(spoiled, str(found[name]))
    return found


async def test_every_fault_is_told_and_nothing_else_is_disturbed(
    files: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    model = ImageModel(
        metadata=Metadata(name="tiny"),
        spec=ImageModelSpec(
            source=Source(path=str(files["model"])), precision="float32", device="cpu"
        ),
    )
    adapters = [
        LoRAAdapter(
            metadata=Metadata(name=name),
            spec=LoRAAdapterSpec(
                model_ref=ModelRef(name="tiny"), source=Source(path=str(files[name]))
            ),
        )
        for name in ("sound", *FAULTS)
    ]
    database, blobs = Database.open(sqlite_url(tmp_path)), MemoryBlobStore()
    key, _ = database.api_keys.create()
    backend = LocalBackend(model, adapters, database, blobs, ScriptedSafety())
    app = create_app(GatewaySettings(), database, blobs, backend, Catalog([model], adapters))
    async with (
        backend.running(),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://gateway",
            headers={"authorization": f"Bearer {key}"},
            timeout=600,
        ) as client,
    ):

        async def draw(name: str) -> httpx.Response:
            body: dict[str, Any] = {"prompt": "a dog", "size": "64x64", "steps": 2, "seed": 7}
            return await client.post(
                "/v1/images/generations", json=body | {"loras": [{"id": name}]}
            )

        answers = dict(zip(FAULTS, await asyncio.gather(*map(draw, FAULTS)), strict=True))
        for name, (_, said) in FAULTS.items():
            error = answers[name].json()["error"]
            assert (answers[name].status_code, error["code"]) == (400, "adapter_load_failed"), error
            assert error["param"] == "loras"
            assert said in error["message"] and repr(name) in error["message"]
            assert str(files[name]) not in error["message"], "where it lies is nobody's business"
            states = (await backend.status())[0].adapters
            assert said in states[name] and str(files[name]) in states[name]
        assert states["sound"] == "ready"
        assert (await draw("sound")).status_code == 200
    database.close()

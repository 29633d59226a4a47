"""The adapters of one replica: kept on the device, and proved by a picture before they serve."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest

from calotype.serving.config import ImageModel, LoRAAdapter
from calotype.serving.core.errors import (
    AdapterLoadFailed,
    CalotypeError,
    NotFound,
    Overloaded,
)
from calotype.serving.core.request import AdapterRef, GenerationRequest, ImageSize, SamplingParams
from calotype.serving.deployments.local import InProcessPrompts
from calotype.serving.engine.model.components import load_components
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.outage import part_at_fault
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety, decision
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2
from calotype.serving.worker.adapter_status import AdapterLoad, adapter_fault
from calotype.serving.worker.model_loader import load_model
from calotype.serving.worker.prompt_source import EncodedPrompt
from calotype.serving.worker.replica import GeneratorReplica, GeneratorState, ReplicaSettings

PROBE = {"prompt": "a shoe", "seed": 3}


class NoWork:
    """A dispatcher without jobs."""

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]:
        await asyncio.sleep(wait_seconds)
        return []

    async def heartbeat(self, replica: str, progress: Mapping[str, LeaseProgress]) -> Sequence[str]:
        return []

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nobody has a job to {name}")


class Prompts:
    """Encodes, and remembers what; away as often as it is told."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = InProcessPrompts(encoder)
        self.asked: list[str] = []
        self.away = 0

    async def encode(self, prompt: str) -> EncodedPrompt:
        self.asked.append(prompt)
        if self.away:
            self.away -= 1
            raise Overloaded("The text encoder cannot be reached.", retry_after=1)
        return await self._encoder.encode(prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def encoder(folder: pathlib.Path) -> Any:
    return load_components(folder).text_encoder


@pytest.fixture
def prompts(encoder: Any) -> Prompts:
    return Prompts(encoder)


@pytest.fixture
def safety() -> ScriptedSafety:
    return ScriptedSafety()


@pytest.fixture
def file(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return save_random_lora(folder, tmp_path / "shoe.safetensors", 4)


@pytest.fixture
async def replica(prompts: Prompts, safety: ScriptedSafety) -> AsyncIterator[GeneratorReplica]:
    settings = ReplicaSettings("one", drain_seconds=1)
    found = GeneratorReplica(settings, NoWork(), prompts, safety, MemoryBlobStore())
    yield found
    await found.close()


def model(folder: pathlib.Path, budget: str = "1Gi") -> ImageModel:
    spec = {
        "source": {"path": str(folder)},
        "precision": "float32",
        "defaults": {"steps": 2, "size": "64x64"},
        "adapters": {"memoryBudget": budget},
    }
    return ImageModel.model_validate({"metadata": {"name": "tiny"}, "spec": spec})


def adapter(file: pathlib.Path, name: str = "shoe", **spec: Any) -> LoRAAdapter:
    content = {"modelRef": {"name": "tiny"}, "source": {"path": str(file)}, **spec}
    return LoRAAdapter.model_validate({"metadata": {"name": name}, "spec": content})


async def state(replica: GeneratorReplica, holds: Callable[[GeneratorState], Any]) -> Any:
    """What ``holds`` finds in the replica's state, as soon as it finds something."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(600):
            while not (found := holds(replica.state())):
                await asyncio.sleep(0.02)
            return found
    raise AssertionError(replica.state())


async def loaded(replica: GeneratorReplica, name: str = "shoe") -> AdapterLoad:
    def over(found: GeneratorState) -> AdapterLoad | None:
        load = found.loads.get(name)
        return load if load is not None and load.state in ("ready", "failed") else None

    load = await state(replica, over)
    assert isinstance(load, AdapterLoad)
    return load


async def test_an_adapter_serves_when_its_probe_was_drawn(
    replica: GeneratorReplica, folder: pathlib.Path, file: pathlib.Path, prompts: Prompts
) -> None:
    replica.configure(model(folder), [adapter(file, probe=PROBE)])
    assert (await loaded(replica)).state == "ready"
    assert prompts.asked == ["a shoe"]
    replica.configure(model(folder), [adapter(file, probe=PROBE, triggerWords=["shoe"])])
    await asyncio.sleep(0.2)
    assert prompts.asked == ["a shoe"], "what is proved is not proved again"


@pytest.mark.parametrize(
    ("state", "error"),
    [("loading", Overloaded), ("its file is damaged", AdapterLoadFailed), (None, NotFound)],
)
def test_a_job_waits_for_an_adapter_that_a_young_replica_has_not_loaded(
    state: str | None, error: type[CalotypeError]
) -> None:
    request = GenerationRequest(
        *("job_1", "a shoe", ImageSize(64, 64), ImageSize(64, 64), SamplingParams(2, 3.0)),
        seed=1,
        adapters=(AdapterRef("shoe"),),
    )
    found = adapter_fault(NotFound("There is no LoRA adapter 'shoe'."), request, lambda name: state)
    assert type(found) is error
    assert part_at_fault(found) == ("adapter" if state == "loading" else None)


async def test_a_probe_waits_for_the_text_encoder(
    replica: GeneratorReplica,
    folder: pathlib.Path,
    file: pathlib.Path,
    prompts: Prompts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("calotype.serving.worker.adapter_probe.RETRY_SECONDS", 0.01)
    prompts.away = 2
    replica.configure(model(folder), [adapter(file, probe=PROBE)])
    assert (await loaded(replica)).state == "ready"
    assert len(prompts.asked) == 3


@pytest.mark.parametrize("stage", ["prompt", "picture"])
async def test_a_blocked_probe_fails_the_adapter_and_no_other_one(
    replica: GeneratorReplica,
    folder: pathlib.Path,
    file: pathlib.Path,
    safety: ScriptedSafety,
    stage: str,
) -> None:
    blocks = decision("output", blocked=["sexual"])
    if stage == "prompt":
        safety.prompt = lambda text: blocks
    else:
        safety.image = lambda pixels: blocks
    other = file.with_name("other.safetensors")
    shutil.copy(file, other)
    replica.configure(model(folder), [adapter(file, probe=PROBE), adapter(other, "other")])
    assert (await loaded(replica, "other")).state == "ready"
    found = await loaded(replica)
    assert found.state == "failed"
    assert f"the safety stage blocks its {stage} (sexual)" in found.text


async def test_a_revision_whose_probe_fails_leaves_the_one_before_it(
    replica: GeneratorReplica,
    folder: pathlib.Path,
    file: pathlib.Path,
    safety: ScriptedSafety,
    tmp_path: pathlib.Path,
) -> None:
    old = "a" * 7
    note = {"calotype.dev/revision": old}
    first = adapter(file, probe=PROBE)
    first = first.model_copy(
        update={"metadata": type(first.metadata)(name="shoe", annotations=note)}
    )
    replica.configure(model(folder), [first])
    assert (await loaded(replica)).serving == old
    safety.image = lambda pixels: decision("output", blocked=["violence"])
    newer = save_random_lora(folder, tmp_path / "newer.safetensors", 4, seed=9)
    second = adapter(newer, probe=PROBE)
    replica.configure(model(folder), [second])
    found = await state(
        replica,
        lambda s: (load := s.loads["shoe"]).state == "failed" and load,
    )
    assert found.serving == old
    assert "violence" in found.text
    safety.image = lambda pixels: decision("output")
    replica.configure(model(folder), [second])
    assert (await loaded(replica)).serving == "unpinned"


async def test_preloaded_adapters_must_fit_the_budget_together(
    replica: GeneratorReplica, folder: pathlib.Path, file: pathlib.Path
) -> None:
    size = file.stat().st_size
    other = file.with_name("other.safetensors")
    shutil.copy(file, other)
    both = [adapter(file, "a", preload="Always"), adapter(other, "b", preload="Always")]
    replica.configure(model(folder, str(size * 3 // 2)), both)
    states = [(await loaded(replica, name)) for name in ("a", "b")]
    assert sorted(found.state for found in states) == ["failed", "ready"]
    assert any("preload: Always" in found.text for found in states)
    replica.configure(model(folder), [both[0], adapter(other, "b")])
    assert (await loaded(replica, "b")).state == "ready"


def test_copies_of_adapters_stay_within_the_memory_that_the_manifest_allows(
    folder: pathlib.Path, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    size = file.stat().st_size
    wanted = model(folder, str(size * 3 // 2))
    adapters = wanted.spec.adapters.model_copy(update={"host_memory_budget": str(size * 5 // 2)})
    spec = wanted.spec.model_copy(update={"adapters": adapters})
    loaded = load_model(wanted.model_copy(update={"spec": spec}), data_folder=tmp_path)
    store = loaded.engine.adapters
    for name in ("a", "b", "c"):
        store.load(name, shutil.copy(file, tmp_path / f"{name}.safetensors"), wait=60)
    assert sorted(place.tier for place in store.places().values()) == ["cpu", "device", "disk"]
    loaded.close()

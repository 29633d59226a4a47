"""The way of one lease: checkpoints that another worker goes on from, previews that are checked."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.serving.core.errors import Overloaded, StorageFailed
from calotype.serving.core.protocols import SystemClock
from calotype.serving.core.request import (
    Event,
    GenerationRequest,
    ImageSize,
    Progress,
    SamplingParams,
)
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.local import InProcessPrompts
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import Components, load_components
from calotype.serving.engine.model.text_encoder import TextEncoder
from calotype.serving.jobs.recipe import make_recipe, recipe_hash
from calotype.serving.jobs.records import JobRecord, NewJob, new_id
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety, decision
from calotype.serving.testing.models import save_tiny_flux2
from calotype.serving.worker.engine_thread import EngineInputs, EngineThread
from calotype.serving.worker.generation import GenerationWorker
from calotype.serving.worker.prompt_source import EncodedPrompt

STEPS = 150  # enough to be caught in the middle of them


class Line:
    """The way to the dispatcher; once it is cut, its worker is as good as killed."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.cut = self.deaf = False
        """Deaf: heartbeats get lost and nothing else does."""

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.cut or (self.deaf and name == "heartbeat"):
                raise ConnectionError("the line is cut")
            return await getattr(self._dispatcher, name)(*arguments)

        return call


class GatedPrompts(InProcessPrompts):
    """Encodes nothing before its gate is open."""

    def __init__(self, encoder: TextEncoder, gate: asyncio.Event | None) -> None:
        super().__init__(encoder)
        self._gate = gate

    async def encode(self, prompt: str) -> EncodedPrompt:
        if self._gate is not None:
            await self._gate.wait()
        return await super().encode(prompt)


class RecordingThread(EngineThread):
    """Remembers from which checkpoints it was started, and at which step."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.checkpoints: list[bytes | None] = []
        self.first_steps: list[int] = []

    async def draw(
        self, request: GenerationRequest, given: EngineInputs
    ) -> AsyncGenerator[Event, None]:
        self.checkpoints.append(given.checkpoint)
        first = True
        async for event in super().draw(request, given):
            if first and isinstance(event, Progress):
                self.first_steps.append(event.step)
                first = False
            yield event


@dataclass
class LocalPipeline:
    components: Components
    database: Database
    blobs: MemoryBlobStore
    safety: ScriptedSafety
    dispatcher: Dispatcher
    workers: dict[str, GenerationWorker] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def working(
        self,
        name: str,
        beat_seconds: float = 0.05,
        concurrency: int = 1,
        gate: asyncio.Event | None = None,
    ) -> AsyncIterator[tuple[Line, RecordingThread]]:
        """A worker that pulls leases while the context lasts."""
        line, thread = Line(self.dispatcher), RecordingThread(Engine(self.components))
        encoder = self.components.text_encoder
        assert encoder is not None
        worker = GenerationWorker(
            *(name, thread, line, GatedPrompts(encoder, gate), self.safety, self.blobs),
            concurrency=concurrency,
            beat_seconds=beat_seconds,
            wait_seconds=0.1,
        )
        self.workers[name] = worker
        task = asyncio.create_task(worker.run())
        try:
            yield line, thread
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(thread.close)

    async def ask(self, steps: int = STEPS, preview_every: int = 0, drawn: int = 64) -> str:
        """A queued job for a picture of 64x64, drawn at ``drawn`` and enlarged."""
        _, key = self.database.api_keys.create()
        request = GenerationRequest(
            new_id("job"),
            "a red circle",
            ImageSize(64, 64),
            ImageSize(drawn, drawn),
            SamplingParams(steps, 2.5),
            seed=7,
            preview_every=preview_every,
        )
        recipe = make_recipe(
            request.to_payload(),
            operation="generate",
            model={"name": "tiny", "digest": ""},
            adapter_digests={},
            output={"format": "png", "compression": 100},
        )
        self.database.jobs.create_job(
            NewJob(
                id=request.id,
                team_id=key.team_id,
                api_key_id=key.id,
                type="image.generate",
                model="tiny",
                input={"output_format": "png"},
                request=request.to_payload(),
                metadata={},
                priority=0,
                deadline=None,
                expires=2e9,
                body_sha256="",
                recipe=recipe,
                recipe_hash=recipe_hash(recipe),
            )
        )
        await self.dispatcher.submit(request.id)
        return request.id

    async def renewed(self, job_id: str, after: float) -> float:
        """When its lease ends, as soon as that is later than ``after``."""
        async with asyncio.timeout(600):
            while (until := self.row(job_id).lease_expires or 0.0) <= after:
                await asyncio.sleep(0.01)
        return until

    def row(self, job_id: str) -> JobRecord:
        job = self.database.jobs.get_job(job_id)
        assert job is not None
        return job

    async def ended(self, job_id: str) -> JobRecord:
        await self.dispatcher.wait(job_id, 600)
        job = self.row(job_id)
        assert job.status == "succeeded", job
        return job

    async def image(self, job_id: str) -> bytes:
        output = (await self.ended(job_id)).output or {}
        return self.blobs.get(output["images"][0]["blob_key"])

    async def kill(self, line: Line, thread: EngineThread) -> None:
        """As kill -9 does: nothing more is drawn and nothing more is said."""
        line.cut = True
        await asyncio.to_thread(thread.close)
        await asyncio.sleep(0.1)  # what was said just before is heard

    async def checkpointed(self, job_id: str) -> str:
        """Waits for a checkpoint; its blob key."""
        for _ in range(60000):
            if (left := self.database.intermediates.get_checkpoint(job_id)) and left.step > 2:
                return left.blob_key
            await asyncio.sleep(0.01)
        raise AssertionError("no checkpoint was ever left")


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> Components:
    return load_components(save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def database(tmp_path: pathlib.Path) -> Iterator[Database]:
    database = Database.open(sqlite_url(tmp_path))
    yield database
    database.close()


@pytest.fixture
async def studio(components: Components, database: Database) -> AsyncIterator[LocalPipeline]:
    safety = ScriptedSafety()
    policy = DispatchPolicy(lease_seconds=4.0, sweep_seconds=0.05, max_attempts=20)
    dispatcher = Dispatcher(database, safety, SystemClock(), policy, model="tiny")
    await dispatcher.start()
    yield LocalPipeline(components, database, MemoryBlobStore(), safety, dispatcher)
    await dispatcher.stop()


async def test_another_worker_goes_on_and_the_picture_is_the_same(studio: LocalPipeline) -> None:
    async with studio.working("first") as (line, dying):
        job_id = await studio.ask()
        await studio.checkpointed(job_id)
        await studio.kill(line, dying)
        async with studio.working("second") as (_, thread):
            resumed = await studio.image(job_id)
            undisturbed = await studio.image(await studio.ask())
            left = f"{job_id}-{studio.row(job_id).fence}-"
            while any(left in key for key in studio.blobs.blobs):
                await asyncio.sleep(0.01)  # it tidies up after it has answered
    assert thread.first_steps[0] > 3, "it went on where the first one was"
    assert thread.first_steps[1] == 1
    assert same_pixels(resumed, undisturbed)


@pytest.mark.parametrize("damage", ["changed", "missing"])
async def test_a_spoiled_checkpoint_costs_only_time(studio: LocalPipeline, damage: str) -> None:
    async with studio.working("first") as (line, dying):
        job_id = await studio.ask()
        await studio.checkpointed(job_id)
        await studio.kill(line, dying)
        key = await studio.checkpointed(job_id)
        if damage == "changed":
            studio.blobs.blobs[key] = b"no tensors at all"
        else:
            studio.blobs.delete(key)
        async with studio.working("second") as (_, thread):
            resumed = await studio.image(job_id)
            undisturbed = await studio.image(await studio.ask())
    assert thread.first_steps == [1, 1]
    assert same_pixels(resumed, undisturbed)


async def test_a_job_that_is_given_back_goes_on_elsewhere(studio: LocalPipeline) -> None:
    async with studio.working("first") as (line, dying):
        job_id = await studio.ask()
        await studio.checkpointed(job_id)
        await studio.dispatcher.release(job_id, studio.row(job_id).fence)
        await studio.kill(line, dying)
        async with studio.working("second") as (_, thread):
            await studio.ended(job_id)
    assert thread.first_steps[0] > 3


async def test_a_lease_that_ran_out_unnoticed_is_drawn_by_the_same_worker(
    studio: LocalPipeline,
) -> None:
    gate = asyncio.Event()
    async with studio.working("only", concurrency=2, gate=gate) as (line, thread):
        line.deaf = True
        job_id = await studio.ask()
        while studio.row(job_id).fence < 2:
            await asyncio.sleep(0.02)
        line.deaf = False
        gate.set()
        drawn = await studio.image(job_id)
        assert same_pixels(drawn, await studio.image(await studio.ask()))
    assert thread.first_steps == [1, 1], "what ran out was not drawn"


async def test_previews_are_checked_and_kept_in_their_order(studio: LocalPipeline) -> None:
    async with studio.working("only"):
        job_id = await studio.ask(steps=40, preview_every=10)
        await studio.ended(job_id)
    shown = studio.database.intermediates.list_previews(job_id)
    assert [(p.partial_index, p.step >= 10 * (p.partial_index + 1)) for p in shown] == [
        (0, True),
        (1, True),
        (2, True),
    ]
    for preview in shown:
        assert preview.content_type == "image/png"
        assert Image.open(io.BytesIO(studio.blobs.get(preview.blob_key))).size == (64, 64)


@pytest.mark.parametrize("verdict", ["blocked", "unavailable", "raises"])
async def test_a_preview_that_does_not_pass_exists_nowhere(
    studio: LocalPipeline, verdict: str
) -> None:
    final = False

    def check(pixels: Any) -> dict[str, Any]:
        # Of 64 pixels is the finished picture, because it is enlarged; its previews are smaller.
        nonlocal final
        if len(pixels) == 64:
            final = True
            return decision("output")
        if verdict == "raises":
            raise ConnectionError("the classifier is away")
        return decision("output", blocked=["sexual"], unavailable=verdict == "unavailable")

    studio.safety.image = check
    async with studio.working("only"):
        job_id = await studio.ask(steps=40, preview_every=10, drawn=32)
        job = await studio.ended(job_id)
    assert studio.database.intermediates.list_previews(job_id) == []
    assert set(studio.blobs.blobs) == {i["blob_key"] for i in (job.output or {})["images"]}
    assert final


async def test_a_short_request_leaves_no_checkpoint(studio: LocalPipeline) -> None:
    puts: list[str] = []
    plain = studio.blobs.put

    def put(key: str, data: bytes) -> None:
        puts.append(key)
        plain(key, data)

    studio.blobs.put = put  # type: ignore[method-assign]
    async with studio.working("only", beat_seconds=30):  # it is over before the first one
        await studio.ended(await studio.ask(steps=2))
    assert len(puts) == 1, "the picture and nothing else"


async def test_a_text_encoder_that_is_away_delays_a_job(
    studio: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [Overloaded("The text encoder cannot be reached."), Overloaded("Still not.")]
    real = GatedPrompts.encode

    async def encode(self: GatedPrompts, prompt: str) -> EncodedPrompt:
        if faults:
            raise faults.pop()
        return await real(self, prompt)

    monkeypatch.setattr(GatedPrompts, "encode", encode)
    async with studio.working("only"):
        job = await studio.ended(await studio.ask(steps=2))
    assert ((job.outage or {})["part"], job.attempts, faults) == ("text_encoder", 1, [])


async def test_what_is_drawn_while_the_database_is_away_is_not_drawn_again(
    studio: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calotype.serving.worker.generation.RETRY_SECONDS", 0.05)
    away, real = [StorageFailed("away")] * 12, studio.database.jobs.finish_job

    def finish(*arguments: Any) -> JobRecord | None:
        if away:
            raise away.pop()
        return real(*arguments)

    monkeypatch.setattr(studio.database.jobs, "finish_job", finish)
    async with studio.working("only") as (_, thread):
        job = await studio.ended(await studio.ask(steps=2))
    assert (len(thread.first_steps), job.attempts, away) == (1, 1, [])


async def test_a_job_that_is_canceled_costs_what_was_measured(studio: LocalPipeline) -> None:
    async with studio.working("only", beat_seconds=30):
        job_id = await studio.ask(preview_every=STEPS // 2)
        while not studio.database.intermediates.list_previews(job_id):
            await asyncio.sleep(0.01)
        assert await studio.dispatcher.cancel(job_id)
    [row] = studio.database.usage.report(None, "2000-01-01", "2100-01-01", ("team",))
    assert row["gpu_seconds"] > 0


async def test_a_worker_that_drains_keeps_its_leases_to_the_end(studio: LocalPipeline) -> None:
    gate = asyncio.Event()
    async with studio.working("only", gate=gate):
        job_id = await studio.ask(steps=2)
        while not (worker := studio.workers["only"]).busy:
            await asyncio.sleep(0.01)
        leased = await studio.renewed(job_id, 0.0)
        draining = asyncio.create_task(worker.drain(60))
        await studio.renewed(job_id, leased + 1.0)
        gate.set()
        await draining
    assert (await studio.ended(job_id)).fence == 1

"""The way of one lease: prompt to embeddings, steps, judged pictures, stored files, completion.

A `GenerationWorker` pulls leases from a dispatcher and answers for each of them with exactly one
`complete`, `fail` or `release`. It knows neither Ray nor HTTP: what it talks to are Protocols, so
the same code runs in a Ray Serve replica and in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from calotype.serving.engine_thread import EngineThread
from calotype.serving.errors import (
    CalotypeError,
    Cancelled,
    EngineError,
    NotFound,
)
from calotype.serving.jobs.judging import JudgingPolicy, judge_patiently
from calotype.serving.jobs.leases import Lease
from calotype.serving.jobs.records import new_id
from calotype.serving.jobs.result import (
    CONTENT_TYPES,
    BlockedImage,
    GenerationResult,
    ImageResult,
    openai_usage,
)
from calotype.serving.pictures import blur, encode_picture, enlarge
from calotype.serving.protocols import BlobStore, SafetyStage
from calotype.serving.request import Failed, Finished, GenerationRequest, Progress

if TYPE_CHECKING:
    from calotype.serving.request import Pixels

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
"""Pause after the dispatcher could not be reached."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Embeddings [tokens, width] of a prompt (tensor or array), and how long it was."""

    embeds: Any
    token_count: int
    truncated: bool


class PromptSource(Protocol):
    async def encode(self, prompt: str) -> EncodedPrompt: ...


class LeaseSource(Protocol):
    """The generators' side of `jobs.dispatcher.Dispatcher`."""

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]: ...

    async def heartbeat(
        self, replica: str, progress: Mapping[str, Sequence[int]]
    ) -> Sequence[str]: ...

    async def complete(self, job_id: str, fence: int, result: Mapping[str, Any]) -> bool: ...

    async def fail(self, job_id: str, fence: int, error: Mapping[str, Any]) -> bool: ...

    async def release(self, job_id: str, fence: int) -> bool: ...


@dataclass(slots=True)
class _Running:
    lease: Lease
    steps: int
    step: int = 0
    task: asyncio.Task[None] | None = None
    lost: bool = field(default=False)


class GenerationWorker:
    """Draws leased jobs on one engine, several at a time so that they share steps.

    Args:
        concurrency: leases held at once.
        beat_seconds: pause between heartbeats.
        wait_seconds: length of one long poll for work.
    """

    def __init__(
        self,
        replica: str,
        engine: EngineThread,
        leases: LeaseSource,
        prompts: PromptSource,
        safety: SafetyStage,
        blobs: BlobStore,
        *,
        concurrency: int = 8,
        beat_seconds: float = 2.0,
        wait_seconds: float = 10.0,
    ) -> None:
        self.replica = replica
        self._engine, self._leases, self._prompts = engine, leases, prompts
        self._safety, self._blobs = safety, blobs
        self._concurrency, self._beat = concurrency, beat_seconds
        self._wait = wait_seconds
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(concurrency)
        self._draining = False

    @property
    def busy(self) -> int:
        """Leases held now."""
        return len(self._running)

    async def run(self) -> None:
        """Pulls and draws until `drain`."""
        beat = asyncio.create_task(self._beat_forever())
        try:
            while not self._draining:
                await self._pull()
        finally:
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat

    async def drain(self, seconds: float) -> None:
        """Takes no more work; lets what runs finish, and gives back what is left after that."""
        self._draining = True
        tasks = [r.task for r in self._running.values() if r.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for running in list(self._running.values()):
            if running.task is not None:
                running.task.cancel()
            await self._tell(self._leases.release(running.lease.job_id, running.lease.fence))

    async def _pull(self) -> None:
        await self._slots.acquire()
        free = 1
        while free < self._concurrency and not self._slots.locked():
            await self._slots.acquire()
            free += 1
        granted: list[Lease] = []
        try:
            granted = await self._leases.lease(self.replica, free, self._wait)
        except Exception as error:  # whatever the connection died of; work waits in the store
            log.warning("no lease from the dispatcher: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
        for lease in granted:
            running = _Running(lease, int(lease.request["steps"]))
            self._running[lease.job_id] = running
            running.task = asyncio.create_task(self._answer_for(running))
        for _ in range(free - len(granted)):
            self._slots.release()

    async def _answer_for(self, running: _Running) -> None:
        lease = running.lease
        stored: list[str] = []
        try:
            result = await self._draw(running, stored)
            kept = await self._tell(
                self._leases.complete(lease.job_id, lease.fence, result.to_payload())
            )
            if kept is not False:
                # Recorded, or recorded for all we know: only a plain refusal makes them waste.
                stored.clear()
        except CalotypeError as error:
            if not (running.lost and isinstance(error, Cancelled)):
                await self._tell(self._leases.fail(lease.job_id, lease.fence, error.to_payload()))
        except Exception as error:
            log.exception("job %s failed", lease.job_id)
            fault = EngineError(f"The picture could not be drawn: {type(error).__name__}: {error}.")
            await self._tell(self._leases.fail(lease.job_id, lease.fence, fault.to_payload()))
        finally:
            for key in stored:  # nobody will ever ask for these
                await asyncio.to_thread(self._blobs.delete, key)
            self._running.pop(lease.job_id, None)
            self._slots.release()

    async def _draw(self, running: _Running, stored: list[str]) -> GenerationResult:
        started = time.monotonic()
        request = GenerationRequest.from_payload(running.lease.request)
        prompt = await self._prompts.encode(request.prompt)
        finished: Finished | None = None
        async for event in self._engine.draw(request, prompt.embeds):
            if isinstance(event, Progress):
                running.step = event.step
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Finished):
                finished = event
        if finished is None:
            raise EngineError("The engine ended the request without an answer.")
        drawn_at = time.monotonic()
        enlarged = finished.images
        if request.rendered_size != request.size:
            enlarged = await asyncio.to_thread(
                lambda: tuple(enlarge(pixels, request.size) for pixels in finished.images)
            )
        encode = functools.partial(_encoded, running.lease)
        # Encoded while they are judged: the file of a blocked picture is dropped unseen.
        decisions, files = await asyncio.gather(
            asyncio.gather(*(self._judged(pixels) for pixels in enlarged)),
            asyncio.to_thread(lambda: [encode(pixels) for pixels in enlarged]),
        )
        judged_at = time.monotonic()
        images, blocked = [], []
        for index, (pixels, decision) in enumerate(zip(enlarged, decisions, strict=True)):
            if decision["blocked"] and decision.get("verdict") != "BLUR":
                names = [str(name) for name in decision.get("categories", [])]
                blocked.append(
                    BlockedImage(index, names, decision.get("id"), decision.get("policy"))
                )
                continue
            data = files[index]
            if decision.get("verdict") == "BLUR":
                data = await asyncio.to_thread(_encoded, running.lease, blur(pixels))
            images.append(await self._store(running.lease, request, index, data, decision, stored))
        metrics: dict[str, Any] = {
            "gpu_seconds": round(finished.denoise_seconds, 4),
            "megapixels": round(request.n * request.size.pixels / 1e6, 4),
            "steps": request.sampling.steps,
            "rendered_size": str(request.rendered_size),
            "draw_ms": round(1000 * (drawn_at - started)),
            "moderation_ms": round(1000 * (judged_at - drawn_at)),
        }
        if prompt.truncated:
            metrics["warnings"] = [
                "The prompt is longer than the model reads; its end changed nothing."
            ]
        usage = openai_usage(prompt.token_count, [request.size] * request.n)
        return GenerationResult(images, blocked, metrics, usage, list(decisions))

    async def _judged(self, pixels: Pixels) -> dict[str, Any]:
        """The safety stage's decision; asked again while the stage comes back from a crash."""
        judge = functools.partial(self._safety.judge_image, pixels)
        return await judge_patiently(judge, JudgingPolicy(), asyncio.sleep)

    async def _store(
        self,
        lease: Lease,
        request: GenerationRequest,
        index: int,
        data: bytes,
        decision: Mapping[str, Any],
        stored: list[str],
    ) -> ImageResult:
        kind = _format(lease)
        asset_id = new_id("asset")
        key = f"{lease.team_id}/{asset_id}.{kind}"
        stored.append(key)
        await asyncio.to_thread(self._blobs.put, key, data)
        return ImageResult(
            asset_id=asset_id,
            blob_key=key,
            index=index,
            seed=request.seed + index,
            width=request.size.width,
            height=request.size.height,
            content_type=CONTENT_TYPES[kind],
            sha256=hashlib.sha256(data).hexdigest(),
            flagged=bool(decision.get("flagged")),
        )

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(self._beat)
            progress = {
                job_id: (running.lease.fence, running.step, running.steps)
                for job_id, running in self._running.items()
            }
            try:
                lost = await self._leases.heartbeat(self.replica, progress)
            except Exception as error:  # the lease outlives a few lost beats
                log.warning("the dispatcher did not hear a heartbeat: %s", error)
                continue
            for job_id in lost:
                if job_id in self._running:
                    self._running[job_id].lost = True
                    self._engine.abort(job_id)

    async def _tell(self, call: Any) -> bool | None:
        """Tells the dispatcher how a lease ended; None when nobody knows whether it heard.

        When it cannot be reached for long the lease expires and the job is drawn again elsewhere:
        late, but neither lost nor answered twice.
        """
        try:
            return bool(await call)
        except NotFound:
            return False
        except Exception as error:
            log.error("the dispatcher could not be told how a job ended: %s", error)
            return None


def _format(lease: Lease) -> str:
    return str(lease.input.get("output_format") or "png")


def _encoded(lease: Lease, pixels: Pixels) -> bytes:
    return encode_picture(pixels, _format(lease), lease.input.get("output_compression"))

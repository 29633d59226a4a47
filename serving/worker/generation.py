"""The course of one lease: prompt to embeddings, steps, checked images, stored files, completion.

A `GenerationWorker` pulls leases from a dispatcher and answers for each of them with exactly one
`complete`, `fail` or `release`. It knows neither Ray nor HTTP: what it talks to are Protocols, so
the same code runs in a Ray Serve replica and in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from calotype.serving.core.errors import (
    CalotypeError,
    Cancelled,
    EngineError,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from calotype.serving.core.protocols import BlobStore, SafetyStage
from calotype.serving.core.request import (
    Checkpoint,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Preview,
    Progress,
)
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.jobs.outage import PART
from calotype.serving.jobs.result import GenerationResult, JobMetrics, TokenUsage
from calotype.serving.observability import tracing
from calotype.serving.worker.adapter_status import adapter_fault
from calotype.serving.worker.control_maps import DrawnAfter
from calotype.serving.worker.engine_thread import EngineInputs, EngineThread
from calotype.serving.worker.given_files import read_given_files
from calotype.serving.worker.intermediates import Intermediates
from calotype.serving.worker.lease_source import LeaseSource
from calotype.serving.worker.output_check import Sources
from calotype.serving.worker.postprocess import Postprocessor
from calotype.serving.worker.prompt_source import EncodedPrompt, PromptSource

log = logging.getLogger(__name__)

TRUNCATED = "The prompt is longer than the model reads; its end changed nothing."
RETRY_SECONDS = 1.0
"""Pause after the dispatcher could not be reached."""
LONGEST_RETRY_SECONDS = 10.0
"""Of the pauses between attempts to tell it how a lease ended."""


@dataclass(slots=True)
class _Running:
    lease: Lease
    intermediates: Intermediates
    step: int = 0
    seconds: float = 0.0
    """Measured device time, of all devices together."""
    task: asyncio.Task[None] | None = None
    lost: bool = False
    request: GenerationRequest | None = None  # with the control maps that were made for it


class GenerationWorker:
    """Draws leased jobs on one engine, several at a time so that they share steps.

    Args:
        concurrency: leases at once.
        beat_seconds: pause between heartbeats, and between the checkpoints of a request.
        wait_seconds: length of one long poll for work.
        check_retries: how the safety stage is asked again while it is away.
        adapter_state: of an adapter that this replica shall serve (``loading``, ``ready`` or why
            not); None = it shall not.
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
        check_retries: CheckRetries | None = None,
        adapter_state: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self.replica = replica
        self._engine, self._leases, self._prompts = engine, leases, prompts
        self._safety, self._blobs = safety, blobs
        self._postprocessor = Postprocessor(safety, blobs, check_retries)
        self._concurrency, self._beat = concurrency, beat_seconds
        self._wait, self._adapter_state = wait_seconds, adapter_state
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(concurrency)
        self._beat_soon = asyncio.Event()
        self._draining = False
        self._pulling: asyncio.Task[None] | None = None

    @property
    def busy(self) -> int:
        """Leases that are being drawn."""
        return len(self._running)

    async def run(self) -> None:
        """Pulls and draws until `drain`, and keeps the leases alive until the last one is over."""
        beat = asyncio.create_task(self._beat_forever())
        try:
            while not self._draining and self._engine.alive:
                self._pulling = asyncio.create_task(self._pull())
                await asyncio.wait({self._pulling})
            while tasks := [r.task for r in self._running.values() if r.task is not None]:
                await asyncio.wait(tasks)
        finally:
            if self._pulling is not None:
                self._pulling.cancel()
            beat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beat

    async def drain(self, seconds: float) -> None:
        """Takes no more work; lets what runs finish, and gives back what is left after that."""
        self._draining = True
        if self._pulling is not None:
            self._pulling.cancel()  # the dispatcher takes back what it granted just now
            await asyncio.wait({self._pulling})
        tasks = [r.task for r in self._running.values() if r.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for running in list(self._running.values()):
            if running.task is not None:
                running.task.cancel()
            await self._tell(self._leases.release(running.lease.job_id, running.lease.fence))

    async def abandon(self) -> None:
        """Stops without an answer, because the engine is dead.

        Nothing is given back: were one of the jobs its death, that job would kill one replica after
        the other. Leases that run out are counted.
        """
        self._draining = True
        tasks = [r.task for r in self._running.values() if r.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pull(self) -> None:
        await self._slots.acquire()
        free = 1
        while free < self._concurrency and not self._slots.locked():
            await self._slots.acquire()
            free += 1
        try:
            for lease in await self._leases.lease(self.replica, free, self._wait):
                running, before = self._begin(lease), self._running.get(lease.job_id)
                self._running[lease.job_id] = running
                running.task = asyncio.create_task(self._answer_for(running, before))
                free -= 1
        except Exception as error:  # whatever the connection died of; work waits in the database
            log.warning("no lease from the dispatcher: %r", error)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            for _ in range(free):
                self._slots.release()

    def _begin(self, lease: Lease) -> _Running:
        # The engine shares its steps out between teams.
        lease = replace(lease, request=replace(lease.request, tenant=lease.team_id))
        left = Intermediates(lease, self._leases, self._safety, self._blobs)
        return _Running(lease, left, 0 if lease.checkpoint is None else lease.checkpoint.step)

    async def _answer_for(self, running: _Running, before: _Running | None = None) -> None:
        """Args:
        before: an earlier lease of the same job, which ran out unnoticed.
        """
        lease = running.lease
        heard: bool | None = False
        try:
            if before is not None:
                await self._abandon(before)
            with tracing.span(
                "draw", lease.options.traceparent, job=lease.job_id, fence=lease.fence
            ):
                result = await self._draw(running)
            heard = await self._insist(
                running, lambda: self._leases.complete(lease.job_id, lease.fence, result)
            )
        except CalotypeError as error:
            if not (running.lost and isinstance(error, Cancelled)):
                heard = await self._failed(running, error)
        except Exception as error:
            log.exception("job %s failed", lease.job_id)
            fault = EngineError(f"The picture could not be drawn: {type(error).__name__}: {error}.")
            heard = await self._failed(running, fault)
        finally:
            if self._running.get(lease.job_id) is running:
                del self._running[lease.job_id]
            self._slots.release()
            await running.intermediates.close()
        if heard:
            await running.intermediates.forget()

    async def _failed(self, running: _Running, error: CalotypeError) -> bool | None:
        await self._tell_progress([running])  # what was measured is settled, however it ends
        lease = running.lease
        return await self._insist(
            running, lambda: self._leases.fail(lease.job_id, lease.fence, error)
        )

    async def _insist(self, running: _Running, call: Callable[[], Awaitable[bool]]) -> bool | None:
        """Says how a lease ended until it was heard, or until somebody else has the job.

        What was drawn is kept meanwhile, and the lease goes on: heartbeats do not need the job
        database, whose absence is the usual reason.
        """
        pause = RETRY_SECONDS
        while (heard := await self._tell(call())) is None and not running.lost:
            await asyncio.sleep(pause)
            pause = min(LONGEST_RETRY_SECONDS, pause * 2)
        return heard

    async def _abandon(self, running: _Running) -> None:
        """Ends what is still done under a lease that somebody else has by now."""
        running.lost = True
        if running.task is not None:
            running.task.cancel()
            await asyncio.wait({running.task})

    async def _draw(self, running: _Running) -> GenerationResult:
        started = time.monotonic()
        request = running.lease.request
        with tracing.span("encode prompt"):
            encoded, files = await asyncio.gather(
                self._encoded(request), read_given_files(self._blobs, request)
            )
        after = await DrawnAfter.of(request, files)
        running.request, files = after.request, dict(after.files)
        if files:
            with tracing.span("check given images"):
                await self._postprocessor.admit(running.lease, files)
        sources = await Sources.of(request, files)
        running.intermediates.draws_from(sources)
        prompt, negative = encoded[0], encoded[1].embeds if len(encoded) > 1 else None
        with tracing.span("denoise", steps=request.sampling.steps):
            finished = await self._drawn(running, EngineInputs(prompt.embeds, negative, files))
        drawn_at = time.monotonic()
        with tracing.span("check and store"):
            final, maps, _ = await asyncio.gather(
                self._postprocessor.finalize(running.lease, finished.images, sources),
                after.stored(running.lease, self._blobs),
                running.intermediates.finish(),
            )
        truncated = any(text.truncated for text in encoded)
        metrics = replace(
            JobMetrics.of(request, finished, self._engine.engine.devices),
            draw_ms=round(1000 * (drawn_at - started)),
            moderation_ms=round(1000 * final.check_seconds),
            maps_fitted=after.fitted,
            warnings=[TRUNCATED] if truncated else None,
        )
        return GenerationResult(
            images=final.images,
            blocked=final.blocked,
            metrics=metrics,
            usage=TokenUsage.of(
                prompt.token_count, [request.size] * request.n, finished.reference_tokens
            ),
            decisions=final.decisions,
            prompt_decision=final.prompt,
            held=final.held,
            maps=maps,
        )

    async def _drawn(self, running: _Running, given: EngineInputs) -> Finished:
        """Raises what the engine ends the request with, if it is not drawn."""
        begun = time.time_ns()
        async with contextlib.aclosing(self._events(running, given)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    running.step = event.step
                    running.seconds = self._engine.engine.devices * event.seconds
                    tracing.record("denoise step", begun, event.done_ns, step=event.step)
                    begun = event.done_ns
                elif isinstance(event, Preview | Checkpoint):
                    running.intermediates.note(event)
                    self._beat_soon.set()  # who sees it and cancels then is charged for it
                elif isinstance(event, Failed):
                    raise adapter_fault(event.error, running.lease.request, self._adapter_state)
                else:
                    running.seconds = self._engine.engine.devices * event.denoise_seconds
                    return event
        raise EngineError("The engine ended the request without an answer.")

    async def _encoded(self, request: GenerationRequest) -> list[EncodedPrompt]:
        """The prompt, and the negative one where a second pass runs."""
        texts = self._engine.engine.prompts_of(request)
        try:
            return list(await asyncio.gather(*(self._prompts.encode(text) for text in texts)))
        except Overloaded as error:
            error.details.setdefault(PART, "text_encoder")
            raise

    async def _events(self, running: _Running, given: EngineInputs) -> AsyncGenerator[Event, None]:
        """The engine's events, from the checkpoint on where there is one that can be used."""
        request = running.request or running.lease.request
        left = await self._checkpoint(running)
        if left is not None:
            drawing = self._engine.draw(request, replace(given, checkpoint=left))
            # Closed at once, or else its end would take the events of the next attempt.
            async with contextlib.aclosing(drawing) as events:
                refusal: CalotypeError | None = None
                async for event in events:
                    if isinstance(event, Failed) and _of_checkpoint(event.error):
                        refusal = event.error
                        break
                    yield event
            if refusal is None:
                return
            log.warning("job %s begins anew: %s", running.lease.job_id, refusal)
            await self._drop_checkpoint(running)
        running.step = 0
        async with contextlib.aclosing(self._engine.draw(request, given)) as more:
            async for event in more:
                yield event

    async def _checkpoint(self, running: _Running) -> bytes | None:
        left = running.lease.checkpoint
        if left is None:
            return None
        try:
            return await asyncio.to_thread(self._blobs.get, left.blob_key)
        except NotFound:
            await self._drop_checkpoint(running)
        except CalotypeError as error:
            log.warning("job %s begins anew: %s", running.lease.job_id, error)
        return None

    async def _drop_checkpoint(self, running: _Running) -> None:
        lease = running.lease
        await self._tell(self._leases.drop_checkpoint(lease.job_id, lease.fence))

    async def _beat_forever(self) -> None:
        # A dead engine's leases shall run out.
        while self._engine.alive:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat):
                    await self._beat_soon.wait()
            early = self._beat_soon.is_set()
            self._beat_soon.clear()
            if not early:
                for job_id in self._running:
                    self._engine.engine.checkpoint(job_id)
            if self._running:
                await self._tell_progress(list(self._running.values()))

    async def _tell_progress(self, leases: Sequence[_Running]) -> None:
        progress = {
            r.lease.job_id: LeaseProgress(
                r.lease.fence, r.step, r.lease.request.sampling.steps, round(r.seconds, 4)
            )
            for r in leases
        }
        try:
            lost = await self._leases.heartbeat(self.replica, progress)
        except Exception as error:  # the lease outlives a few lost beats
            log.warning("the dispatcher did not hear a heartbeat: %s", error)
            return
        for job_id in lost:
            running = self._running.get(job_id)
            if running is not None and running.lease.fence == progress[job_id].fence:
                running.lost = True
                self._engine.abort(job_id)

    async def _tell(self, call: Awaitable[bool]) -> bool | None:
        """Tells the dispatcher how a lease ended; None when nobody knows whether it heard.

        When it cannot be reached for long, and hears no heartbeat, the lease expires and the job
        is drawn again elsewhere: late, but neither lost nor answered twice.
        """
        try:
            return bool(await call)
        except NotFound:
            return False
        except Exception as error:
            log.error("the dispatcher could not be told how a job ended: %s", error)
            return None


def _of_checkpoint(error: CalotypeError) -> bool:
    return isinstance(error, InvalidRequest) and error.param == "checkpoint"

"""Works on batches: lines become jobs of low priority, jobs become lines of the output file.

Any gateway may work on any batch; one that dies leaves it to the next after a while. A line's job
has an idempotency of its own, so that it is made once whoever makes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Any

from calotype.serving.api.background.batch_output import BatchOutput, failure
from calotype.serving.api.generation.creation import (
    Origin,
    Terms,
    body_digest,
    create_or_join,
)
from calotype.serving.api.generation.kept_images import keep_images
from calotype.serving.api.generation.recipes import expand_recipe, recipe_images
from calotype.serving.api.generation.uploads import named_sources
from calotype.serving.api.http.schemas import EditBody, GenerationBody, parse_generation
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import (
    CalotypeError,
    Cancelled,
    CapacityError,
    DeadlineExceeded,
    DependencyUnavailable,
    EngineError,
    InvalidRequest,
    QuotaExceeded,
    StorageFailed,
    Unauthenticated,
    error_from_payload,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import BatchLine, BatchRecord, JobRecord, KeyRecord
from calotype.serving.observability import metrics
from calotype.serving.observability.repeated_faults import RepeatedFaults

log = logging.getLogger(__name__)

OUTSTANDING = 32
"""Jobs of one batch that are open at once."""
_CLAIM_SECONDS = 60.0
_PAGE = 100
_REST_SECONDS = 15.0
"""Pause of a batch that could not be worked on."""


class BatchRunner:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._database = gateway, gateway.database
        self._faulty = RepeatedFaults("batch")
        self._faulty_lines = RepeatedFaults("batch_line")

    async def work(self, pause: float) -> float:
        """One round; how long to wait for the next one."""
        return 0.0 if await self.work_once(pause) else pause

    async def work_once(self, pause: float = 0.0) -> bool:
        """One round for one batch; False when none needs work."""
        batch = await asyncio.to_thread(self._database.batches.claim_batch, _CLAIM_SECONDS)
        if batch is None:
            return False
        try:
            await self._work_on(batch, pause)
        except StorageFailed:
            raise
        except Exception as error:
            await self._spoiled(batch, error)
            raise
        self._faulty.clear(batch.id)
        return True

    async def _spoiled(self, batch: BatchRecord, error: Exception) -> None:
        """A batch that cannot be worked on rests while others go on, and is given up at last."""
        log.error("batch %s could not be worked on: %r", batch.id, error)
        batches = self._database.batches
        if not self._faulty.note(batch.id):
            await asyncio.to_thread(batches.rest_batch, batch.id, _REST_SECONDS)
            return
        reason = f"The batch cannot be worked on ({type(error).__name__}). Please report this."
        fault = {"code": "set_aside", "message": reason, "line": None, "param": None}
        await asyncio.to_thread(lambda: batches.change_batch(batch.id, "failed", errors=[fault]))

    async def _work_on(self, batch: BatchRecord, pause: float) -> None:
        await self._collect(batch)
        late = self._database.clock.time() >= batch.deadline
        if batch.status == "cancelling" or late:
            await self._give_up(batch, late)
        else:
            await self._start_lines(batch)
        if await self._finished(batch):
            await self._finalize(batch, late)
        else:
            await asyncio.to_thread(self._database.batches.rest_batch, batch.id, pause)

    async def _collect(self, batch: BatchRecord) -> None:
        for line in await self._lines(batch, started=True, limit=OUTSTANDING * 2):
            job = await asyncio.to_thread(self._database.jobs.get_job, line.job_id or "")
            if job is not None and not job.over:
                continue
            if _outlasts(job, batch, self._database.clock.time()):
                await asyncio.to_thread(self._set, line, job_id=None)  # started once more
                continue
            good = job is not None and job.status == "succeeded"
            metrics.BATCH_LINES.labels("completed" if good else "failed").inc()
            if good:
                answer: JsonObject = {"status_code": 200}
            elif job is None or not job.error:
                answer = failure(Cancelled("The job was canceled."))
            else:
                answer = failure(error_from_payload(job.error))
            await asyncio.to_thread(self._set, line, answer=answer)

    async def _start_lines(self, batch: BatchRecord) -> None:
        running = len(await self._lines(batch, started=True, limit=OUTSTANDING))
        if running >= OUTSTANDING:
            return
        left = OUTSTANDING - running
        for line in await self._lines(batch, started=False, limit=left, bodies=True):
            try:
                job_id = await self._start(batch, line)
            except StorageFailed:
                raise
            except (QuotaExceeded, CapacityError) as error:
                log.info("batch %s waits: %s", batch.id, error)
                return
            except CalotypeError as error:
                metrics.BATCH_LINES.labels("failed").inc()
                await asyncio.to_thread(self._set, line, answer=failure(error))
            except Exception as error:  # a bug of ours, or of a library, over this line
                await self._spoiled_line(line, error)
            else:
                await asyncio.to_thread(self._set, line, job_id=job_id)

    async def _spoiled_line(self, line: BatchLine, error: Exception) -> None:
        """It is tried again with the next round, and set aside when that does not help."""
        name = f"{line.batch_id}/{line.line}"
        log.error("line %s could not be started: %r", name, error, exc_info=error)
        if not self._faulty_lines.note(name):
            return
        fault = EngineError(
            f"The line cannot be worked on ({type(error).__name__}). Please report this.",
            details={"reason": "set_aside"},
        )
        metrics.BATCH_LINES.labels("failed").inc()
        await asyncio.to_thread(self._set, line, answer=failure(fault))

    async def _start(self, batch: BatchRecord, line: BatchLine) -> str:
        gateway, settings = self._gateway, self._gateway.settings
        # A key that is revoked in the middle of its batch draws nothing more. One that was rotated
        # is another key of the same team by now, whose batch it is.
        if await asyncio.to_thread(self._database.api_keys.is_revoked, batch.api_key_id):
            raise Unauthenticated("The API key that made this batch was revoked.")
        wanted, recipe = expand_recipe(line.body)
        schema: type[GenerationBody] = GenerationBody
        if batch.endpoint.endswith("/edits"):
            schema = EditBody
            if "edits" not in settings.features:
                raise InvalidRequest(
                    "This service cannot make edits yet.", code="unsupported_value", param="image"
                )
        body = parse_generation(wanted | {"priority": "low"}, settings.features, schema)
        if body.stream:
            raise InvalidRequest("stream is not possible in a batch.", param="stream")
        left = max(60.0, batch.deadline - self._database.clock.time())
        images = await recipe_images(gateway, batch.team_id, recipe, left)
        if images is None:
            sources = named_sources(gateway, batch.team_id, body)
            images = await keep_images(gateway, batch.team_id, body, sources, left)
        terms = Terms(
            deadline_seconds=left,
            expires_seconds=left + settings.asset_seconds,
            metadata=body.metadata,
            images=images,
            recipe=recipe,
        )
        idempotency = hashlib.sha256(f"{batch.id}\n{line.line}".encode()).hexdigest()
        origin = Origin(
            key=_key_of(batch),
            request_id=f"{batch.id}-{line.line}",
            idempotency=idempotency,
            batch_id=batch.id,
        )
        return (await create_or_join(gateway, origin, body, body_digest(line.body), terms)).id

    async def _give_up(self, batch: BatchRecord, late: bool) -> None:
        reason: CalotypeError = (
            DeadlineExceeded("The batch was not finished within its window.")
            if late
            else Cancelled("The batch was canceled.")
        )
        for line in await self._lines(batch, started=True, limit=OUTSTANDING * 2):
            await self._gateway.waits.cancel(line.job_id or "")
        for line in await self._lines(batch, started=False, limit=10 * _PAGE):
            await asyncio.to_thread(self._set, line, answer=failure(reason))
        await self._collect(batch)

    async def _finished(self, batch: BatchRecord) -> bool:
        for started in (True, False):
            if await self._lines(batch, started=started, limit=1):
                return False
        return True

    async def _finalize(self, batch: BatchRecord, late: bool) -> None:
        written = BatchOutput(self._gateway, batch)
        output = await asyncio.to_thread(written.write, "output")
        errors = await asyncio.to_thread(written.write, "errors")
        end = "cancelled" if batch.status == "cancelling" else "expired" if late else "completed"
        await asyncio.to_thread(
            lambda: self._database.batches.change_batch(
                batch.id, end, output_file_id=output, error_file_id=errors
            )
        )

    async def _lines(
        self, batch: BatchRecord, *, started: bool, limit: int, bodies: bool = False
    ) -> list[BatchLine]:
        return await asyncio.to_thread(
            lambda: self._database.batches.unanswered_lines(
                batch.id, started=started, limit=limit, bodies=bodies
            )
        )

    def _set(self, line: BatchLine, **values: Any) -> None:
        self._database.batches.set_line(line, **values)


def _outlasts(job: JobRecord | None, batch: BatchRecord, now: float) -> bool:
    """Whether a line whose job waited too long for a part is started anew: it has more time."""
    if job is None or batch.status != "in_progress" or now >= batch.deadline:
        return False
    return (job.error or {}).get("class") == DependencyUnavailable.__name__


def _key_of(batch: BatchRecord) -> KeyRecord:
    """Who made the batch, as far as making its jobs needs it."""
    return KeyRecord(batch.api_key_id, batch.team_id, "", "", "", ["images"], batch.created)

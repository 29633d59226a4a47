"""Works on batches: lines become jobs of low priority, jobs become lines of the output file.

Any gateway may work on any batch; one that dies leaves it to the next after a while. A line's job
has an idempotency of its own, so that it is made once whoever makes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Collection
from typing import Any

from calotype.serving.api.generation.creation import (
    Origin,
    Terms,
    body_digest,
    create_or_join,
)
from calotype.serving.api.generation.files import keep_file
from calotype.serving.api.generation.recipes import expand_recipe, recipe_images
from calotype.serving.api.generation.responses import images_body, shown_images
from calotype.serving.api.generation.uploads import read_images
from calotype.serving.api.http.failures import error_object, wire
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
                answer = _failure(Cancelled("The job was canceled."))
            else:
                answer = _failure(error_from_payload(job.error))
            await asyncio.to_thread(self._set, line, answer=answer)

    async def _start_lines(self, batch: BatchRecord) -> None:
        running = len(await self._lines(batch, started=True, limit=OUTSTANDING))
        if running >= OUTSTANDING:
            return
        for line in await self._lines(batch, started=False, limit=OUTSTANDING - running):
            try:
                job_id = await self._start(batch, line)
            except StorageFailed:
                raise
            except (QuotaExceeded, CapacityError) as error:
                log.info("batch %s waits: %s", batch.id, error)
                return
            except CalotypeError as error:
                metrics.BATCH_LINES.labels("failed").inc()
                await asyncio.to_thread(self._set, line, answer=_failure(error))
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
        await asyncio.to_thread(self._set, line, answer=_failure(fault))

    async def _start(self, batch: BatchRecord, line: BatchLine) -> str:
        gateway, settings = self._gateway, self._gateway.settings
        # A key that is revoked in the middle of its batch draws nothing more.
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
            images = await read_images(gateway, batch.team_id, body, left)
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
            await asyncio.to_thread(self._set, line, answer=_failure(reason))
        await self._collect(batch)

    async def _finished(self, batch: BatchRecord) -> bool:
        for started in (True, False):
            if await self._lines(batch, started=started, limit=1):
                return False
        return True

    async def _finalize(self, batch: BatchRecord, late: bool) -> None:
        good, bad, pictures = bytearray(), bytearray(), set[str]()
        after = 0
        while True:
            page = await asyncio.to_thread(
                self._database.batches.answered_lines, batch.id, after, _PAGE
            )
            if not page:
                break
            after = page[-1].line
            for line in page:
                written = await self._written(line, pictures)
                target = good if written["error"] is None else bad
                target += json.dumps(written, ensure_ascii=False).encode("utf-8") + b"\n"
        output = await asyncio.to_thread(self._keep, batch, bytes(good), "output", pictures)
        errors = await asyncio.to_thread(self._keep, batch, bytes(bad), "errors", ())
        end = "cancelled" if batch.status == "cancelling" else "expired" if late else "completed"
        await asyncio.to_thread(
            lambda: self._database.batches.change_batch(
                batch.id, end, output_file_id=output, error_file_id=errors
            )
        )

    async def _written(self, line: BatchLine, pictures: set[str]) -> JsonObject:
        """Args:
        pictures: gets the assets whose bytes are in the line.
        """
        answer: JsonObject = dict(line.answer or {})
        error = None
        if answer.get("status_code") == 200:
            job = await asyncio.to_thread(self._database.jobs.get_job, line.job_id or "")
            try:
                if job is None:
                    raise Cancelled("The job is gone.")
                if job.input["response_format"] != "url":
                    shown = await shown_images(self._gateway, job)
                    pictures |= {image["asset_id"] for image in shown}
                answer["body"] = await images_body(self._gateway, "", job)
            except StorageFailed:
                raise  # the whole file is written again when the store is back
            except CalotypeError as problem:
                answer = _failure(problem)
        if answer["status_code"] != 200:
            found = answer["body"]["error"]
            error = {"code": found["code"], "message": found["message"]}
        answer["request_id"] = f"{line.batch_id}-{line.line}"
        return {
            "id": f"batch_req_{line.batch_id.removeprefix('batch_')}_{line.line}",
            "custom_id": line.custom_id,
            "response": answer,
            "error": error,
        }

    def _keep(
        self, batch: BatchRecord, data: bytes, name: str, pictures: Collection[str]
    ) -> str | None:
        if not data:
            return None
        file = keep_file(
            self._gateway,
            batch.team_id,
            data,
            "jsonl",
            purpose="batch_output",
            filename=f"{batch.id}_{name}.jsonl",
            content_type="application/jsonl",
            expires=self._database.clock.time() + 30 * 86_400,
            pictures=pictures,
        )
        return file.id

    async def _lines(self, batch: BatchRecord, *, started: bool, limit: int) -> list[BatchLine]:
        return await asyncio.to_thread(
            lambda: self._database.batches.unanswered_lines(batch.id, started=started, limit=limit)
        )

    def _set(self, line: BatchLine, **values: Any) -> None:
        self._database.batches.set_line(line, **values)


def _outlasts(job: JobRecord | None, batch: BatchRecord, now: float) -> bool:
    """Whether a line whose job waited too long for a part is started anew: it has more time."""
    if job is None or batch.status != "in_progress" or now >= batch.deadline:
        return False
    return (job.error or {}).get("class") == DependencyUnavailable.__name__


def _failure(error: CalotypeError) -> JsonObject:
    return {"status_code": wire(error).status, "body": {"error": error_object(error)}}


def _key_of(batch: BatchRecord) -> KeyRecord:
    """Who made the batch, as far as making its jobs needs it."""
    return KeyRecord(batch.api_key_id, batch.team_id, "", "", "", ["images"], batch.created)

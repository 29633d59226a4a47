"""The client for asyncio; method for method `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType

import httpx

from calotype.serving.client.calls import (
    Call,
    EventReader,
    ServiceUnreachable,
    base_url,
    checked,
    list_call,
    pause_before_retry,
    submit_call,
    unreachable,
)
from calotype.serving.client.models import Image, Job, JobEvent, JobPage, JsonObject


class AsyncClient:
    """See `calotype.serving.client.synchronous.Client`."""

    def __init__(
        self, url: str, api_key: str, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url(url),
            headers={"authorization": f"Bearer {api_key}", "user-agent": "calotype-client/1"},
            transport=transport,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def submit(
        self,
        parameters: Mapping[str, object],
        *,
        model: str | None = None,
        wait_seconds: int = 0,
        metadata: Mapping[str, str] | None = None,
        webhook_url: str | None = None,
        deadline_seconds: float | None = None,
        idempotency_key: str | None = None,
        kind: str = "image.generate",
    ) -> Job:
        call = submit_call(
            parameters,
            model=model,
            wait_seconds=wait_seconds,
            metadata=metadata,
            webhook_url=webhook_url,
            deadline_seconds=deadline_seconds,
            idempotency_key=idempotency_key,
            kind=kind,
        )
        return Job.of(await self._json(call))

    async def get(self, job_id: str) -> Job:
        return Job.of(await self._json(Call("GET", f"/v1/jobs/{job_id}")))

    async def list(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobPage:
        call = list_call(limit=limit, after=after, status=status, metadata=metadata)
        return JobPage.of(await self._json(call))

    async def cancel(self, job_id: str) -> Job:
        return Job.of(await self._json(Call("POST", f"/v1/jobs/{job_id}/cancel")))

    async def events(
        self, job_id: str, last_event_id: int | None = None
    ) -> AsyncIterator[JobEvent]:
        failures = 0
        while True:
            headers = {} if last_event_id is None else {"last-event-id": str(last_event_id)}
            try:
                async for event in self._stream(job_id, headers):
                    failures, last_event_id = 0, event.id
                    yield event
                    if event.terminal:
                        return
                if (await self.get(job_id)).over:
                    return  # its end was seen before
                pause = pause_before_retry(None, failures)  # the gateway is going away
                if pause is None:
                    raise ServiceUnreachable(f"The events of {job_id} end before it does.")
            except httpx.TransportError as error:
                pause = pause_before_retry(None, failures)
                if pause is None:
                    raise unreachable(self._http.base_url, error) from error
            failures += 1
            await asyncio.sleep(pause)

    async def wait(self, job_id: str) -> Job:
        async for event in self.events(job_id):
            if event.job is not None:
                return event.job
        return await self.get(job_id)

    async def download(self, image: Image) -> bytes:
        return (await self._send(Call("GET", image.url, signed=True))).content

    async def _stream(self, job_id: str, headers: Mapping[str, str]) -> AsyncIterator[JobEvent]:
        reader = EventReader()
        path = f"/v1/jobs/{job_id}/events"
        async with self._http.stream("GET", path, headers=dict(headers), timeout=60) as answer:
            if not answer.is_success:
                await answer.aread()
            async for line in checked(answer).aiter_lines():
                for event in reader.read(line):
                    yield event

    async def _json(self, call: Call) -> JsonObject:
        found: JsonObject = (await self._send(call)).json()
        return found

    async def _send(self, call: Call) -> httpx.Response:
        attempt = 0
        while True:
            answer: httpx.Response | None = None
            try:
                request = call.build(self._http)
                answer = await self._http.send(request, follow_redirects=call.signed)
            except httpx.TransportError as error:
                if pause_before_retry(None, attempt) is None:
                    raise unreachable(self._http.base_url, error) from error
            else:
                if answer.is_success:
                    return answer
            pause = pause_before_retry(answer, attempt)
            if pause is None and answer is not None:
                return checked(answer)
            await asyncio.sleep(pause or 0.0)
            attempt += 1

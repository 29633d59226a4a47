"""The client for ordinary code."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

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


class Client:
    """Talks to one service with one key.

    Requests that fail by the way, or for a reason that passes, are repeated; a job is made once
    all the same.

    Args:
        url: address of the service, with or without ``/v1``.

    Raises:
        ApiError: from every method, when the service refuses.
        ServiceUnreachable: from every method, when nobody answers.
    """

    def __init__(
        self, url: str, api_key: str, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(
            base_url=base_url(url),
            headers={"authorization": f"Bearer {api_key}", "user-agent": "calotype-client/1"},
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(
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
        """Makes a job; ``parameters`` are those of ``POST /v1/images/generations``."""
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
        return Job.of(self._json(call))

    def get(self, job_id: str) -> Job:
        return Job.of(self._json(Call("GET", f"/v1/jobs/{job_id}")))

    def list(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        status: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobPage:
        """A page of the team's jobs, newest first."""
        call = list_call(limit=limit, after=after, status=status, metadata=metadata)
        return JobPage.of(self._json(call))

    def cancel(self, job_id: str) -> Job:
        """Ends a job if it is not over; it is returned either way."""
        return Job.of(self._json(Call("POST", f"/v1/jobs/{job_id}/cancel")))

    def events(self, job_id: str, last_event_id: int | None = None) -> Iterator[JobEvent]:
        """What happens to the job until it is over; a broken stream is taken up again."""
        failures = 0
        while True:
            headers = {} if last_event_id is None else {"last-event-id": str(last_event_id)}
            try:
                for event in self._stream(job_id, headers):
                    failures, last_event_id = 0, event.id
                    yield event
                    if event.terminal:
                        return
                if (self.get(job_id)).over:
                    return  # its end was seen before
                pause = pause_before_retry(None, failures)  # the gateway is going away
                if pause is None:
                    raise ServiceUnreachable(f"The events of {job_id} end before it does.")
            except httpx.TransportError as error:
                pause = pause_before_retry(None, failures)
                if pause is None:
                    raise unreachable(self._http.base_url, error) from error
            failures += 1
            time.sleep(pause)

    def wait(self, job_id: str) -> Job:
        """The job when it is over."""
        for event in self.events(job_id):
            if event.job is not None:
                return event.job
        return self.get(job_id)

    def download(self, image: Image) -> bytes:
        """The picture's file."""
        return self._send(Call("GET", image.url, signed=True)).content

    def _stream(self, job_id: str, headers: Mapping[str, str]) -> Iterator[JobEvent]:
        reader = EventReader()
        path = f"/v1/jobs/{job_id}/events"
        with self._http.stream("GET", path, headers=dict(headers), timeout=60) as answer:
            if not answer.is_success:
                answer.read()
            for line in checked(answer).iter_lines():
                yield from reader.read(line)

    def _json(self, call: Call) -> JsonObject:
        found: JsonObject = self._send(call).json()
        return found

    def _send(self, call: Call) -> httpx.Response:
        attempt = 0
        while True:
            answer: httpx.Response | None = None
            try:
                request = call.build(self._http)
                answer = self._http.send(request, follow_redirects=call.signed)
            except httpx.TransportError as error:
                if pause_before_retry(None, attempt) is None:
                    raise unreachable(self._http.base_url, error) from error
            else:
                if answer.is_success:
                    return answer
            pause = pause_before_retry(answer, attempt)
            if pause is None and answer is not None:
                return checked(answer)
            time.sleep(pause or 0.0)
            attempt += 1

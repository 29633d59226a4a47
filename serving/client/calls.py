"""What both clients share: how requests are written, answers read and failures repeated."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import httpx

from calotype.serving.client.models import JobEvent, JsonObject

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 4
"""Of requests that may be repeated; all of them may, because a job carries an Idempotency-Key."""
_WAITS = (0.5, 1.0, 2.0)
_LONGEST_WAIT = 60.0


class ApiError(Exception):
    """The service refused; `code` says why in a word and the message in a sentence."""

    def __init__(self, status: int, error: JsonObject, request_id: str | None) -> None:
        self.status = status
        self.message = str(error.get("message") or f"The service answered {status}.")
        self.code, self.type = error.get("code"), error.get("type")
        self.param, self.details = error.get("param"), dict(error)
        self.request_id = request_id
        super().__init__(self.message)


class ServiceUnreachable(Exception):
    """No connection, or it broke; nobody answered."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, ready to be sent."""

    method: str
    path: str
    body: JsonObject | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = TIMEOUT_SECONDS
    signed: bool = False
    """The address itself is the permission, and may lead elsewhere: the key is not sent."""

    def build(self, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        request = client.build_request(**self.options())
        if self.signed:
            del request.headers["authorization"]
        return request

    def options(self) -> JsonObject:
        """Arguments of ``httpx.Client.build_request``."""
        return {
            "method": self.method,
            "url": self.path,
            "json": self.body,
            # None where there are none: an empty query would take that of a signed address.
            "params": dict(self.query) or None,
            "headers": dict(self.headers),
            "timeout": self.seconds,
        }


def submit_call(
    parameters: Mapping[str, object],
    *,
    model: str | None,
    wait_seconds: int,
    metadata: Mapping[str, str] | None,
    webhook_url: str | None,
    deadline_seconds: float | None,
    idempotency_key: str | None,
    kind: str,
) -> Call:
    body: JsonObject = {"type": kind, "input": dict(parameters)}
    for name, value in (
        ("model", model),
        ("metadata", dict(metadata) if metadata else None),
        ("webhook", {"url": webhook_url} if webhook_url else None),
        ("deadline_seconds", deadline_seconds),
    ):
        if value is not None:
            body[name] = value
    headers = {"idempotency-key": idempotency_key or secrets.token_hex(16)}
    if wait_seconds:
        headers["prefer"] = f"wait={wait_seconds}"
    return Call("POST", "/v1/jobs", body, headers=headers, seconds=TIMEOUT_SECONDS + wait_seconds)


def list_call(
    *, limit: int, after: str | None, status: str | None, metadata: Mapping[str, str] | None
) -> Call:
    query = {"limit": str(limit)}
    query |= {k: v for k, v in (("after", after), ("status", status)) if v is not None}
    query |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
    return Call("GET", "/v1/jobs", query=query)


def base_url(url: str) -> str:
    """The service's address; with ``/v1`` at its end, as SDKs have it, it is right as well."""
    return url.rstrip("/").removesuffix("/v1")


def checked(answer: httpx.Response) -> httpx.Response:
    """Raises ApiError unless the answer is a good one."""
    if answer.is_success:
        return answer
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"The service answered {answer.status_code}, and not in its own words."}
    raise ApiError(answer.status_code, error, answer.headers.get("x-request-id"))


def pause_before_retry(answer: httpx.Response | None, attempt: int) -> float | None:
    """Seconds until a request is made again; None when it must not be."""
    if attempt >= ATTEMPTS - 1:
        return None
    if answer is not None:
        if answer.status_code not in (429, 500, 502, 503, 504):
            return None
        if answer.headers.get("x-should-retry") == "false":
            return None
        told = answer.headers.get("retry-after", "")
        if told.isdigit():
            return min(_LONGEST_WAIT, float(told))
    return _WAITS[attempt]


def unreachable(url: object, error: Exception) -> ServiceUnreachable:
    told = str(error) or type(error).__name__
    return ServiceUnreachable(f"{url} does not answer ({told}); is the address right?")


class EventReader:
    """Turns the lines of an event stream into events."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def read(self, line: str) -> Iterator[JobEvent]:
        if line:
            name, _, value = line.partition(": ")
            self._fields[name] = value
            return
        found, self._fields = self._fields, {}
        if "event" in found and "data" in found:
            yield JobEvent(int(found.get("id", "0")), found["event"], json.loads(found["data"]))

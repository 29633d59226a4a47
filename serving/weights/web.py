"""Files from web servers: an `http` source, and the downloads of a Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from calotype.serving.weights.transfer import Interrupted
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed

TIMEOUT = httpx.Timeout(60.0, connect=15.0)
"""For each read, not for the whole file."""
MAX_REDIRECTS = 5
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be gone at the next attempt."""


def open_client(headers: Mapping[str, str] | None = None) -> httpx.Client:
    """A client that follows redirects; the authorization stays with the first host."""
    return httpx.Client(
        headers={"user-agent": "calotype", "accept-encoding": "identity"} | dict(headers or {}),
        timeout=TIMEOUT,
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
    )


@dataclass(frozen=True, slots=True)
class WebFile:
    """A `transfer.RemoteFile` behind a URL."""

    client: httpx.Client = field(repr=False)
    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    version: str | None = None
    """Given where the URL itself names a version; else the server's ETag is asked for."""

    @contextlib.contextmanager
    def read(
        self, offset: int, version: str | None
    ) -> Iterator[tuple[int, str | None, Iterable[bytes]]]:
        headers = {}
        if offset:
            headers["range"] = f"bytes={offset}-"
            if self.version is None and version is not None:
                headers["if-range"] = version
        try:
            with self.client.stream("GET", self.url, headers=headers) as answer:
                check_status(answer, self.name)
                start = offset if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
                now = self.version or _strong_etag(answer)
                yield start, now, _pieces(answer)
        except httpx.HTTPError as error:
            raise interruption(self.url, error) from error


def _pieces(answer: httpx.Response) -> Iterator[bytes]:
    announced = answer.headers.get("content-length", "")
    received = 0
    for piece in answer.iter_raw():
        received += len(piece)
        yield piece
    if announced.isdigit() and received < int(announced):
        raise Interrupted(f"the connection ended after {received:,} of {announced} bytes.")


def _strong_etag(answer: httpx.Response) -> str | None:
    etag = answer.headers.get("etag")
    return None if etag is None or etag.startswith("W/") else str(etag)


def check_status(answer: httpx.Response, what: str) -> None:
    """Raises for everything but success.

    Raises:
        FetchFailed: it is not there, or not for us.
        Interrupted: the server may do better next time.
    """
    status, host = answer.status_code, urlsplit(str(answer.url)).netloc
    if answer.is_success:
        return
    if status in (401, 403):
        raise failed(
            Fault.CREDENTIALS_REJECTED,
            f"{host} refuses {what} (status {status}): the credentials are missing, wrong or not "
            "allowed to read it.",
        )
    if status in (404, 410):
        raise failed(Fault.NOT_FOUND, f"{host} has no {what} (status {status}).")
    if status in PASSING:
        raise Interrupted(f"{host} answers with status {status}.")
    raise failed(Fault.FETCH_FAILED, f"{host} answers with status {status} for {what}.")


def interruption(url: str, error: httpx.HTTPError) -> Interrupted | FetchFailed:
    """What a fault of the connection means; addresses are shown without their query."""
    parts = urlsplit(url)
    host = parts.hostname or "the server"
    if isinstance(error, httpx.TooManyRedirects):
        return failed(Fault.FETCH_FAILED, f"{host} redirects more than {MAX_REDIRECTS} times.")
    if isinstance(error, httpx.UnsupportedProtocol):
        return failed(Fault.SOURCE_INVALID, f"{host}: only http and https are fetched from.")
    detail = str(error) or type(error).__name__
    return Interrupted(f"{host} cannot be reached ({detail}).")

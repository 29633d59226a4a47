"""The Kubernetes API as far as the operator needs it: a Protocol, and a client over aiohttp.

The official client costs more memory than everything else of an operator together, so this one
speaks HTTP itself. Watching is not here: kopf watches (`watching.py`). What changes an object is
server-side apply with our own field manager; requests that the server could not take (429, 5xx,
broken connections) are repeated, which is safe since every one of them is idempotent.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import aiohttp
import kopf

from calotype.operator.kube.login import read_login
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import Resource, resource_of

log = logging.getLogger(__name__)

FIELD_MANAGER = "calotype-operator"
ATTEMPTS = 6
LONGEST_PAUSE = 20.0
"""Seconds between two attempts at most, also when the server asks for more."""
PAGE = 250
"""Objects of one answer to a list; bounds memory."""
_APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"


class ApiError(Exception):
    """The API server refused; ``status`` is HTTP's, ``reason`` Kubernetes' CamelCase word."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None):
        super().__init__(status, reason, message, retry_after)
        self.status, self.reason, self.message = status, reason, message
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"

    @property
    def transient(self) -> bool:
        return self.status == 429 or self.status >= 500 or self.status == 0


class KubeClient(Protocol):
    """What reconcilers may ask of a cluster. Every method but the reads may raise `ApiError`."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        """The object, None if there is none or its kind is not installed."""

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        labels: Mapping[str, str] | None = None,
        *,
        metadata_only: bool = False,
    ) -> list[Manifest]:
        """All objects with these labels; empty where the kind is not installed."""

    async def create(self, manifest: Object) -> Manifest | None:
        """Makes an object; None if one of that name exists already."""

    async def apply(
        self, manifest: Object, subresource: str = "", *, force: bool = False
    ) -> Manifest:
        """Server-side apply: fields that an earlier apply named and this one does not, go.

        Args:
            force: take fields from whoever else set them; without it they are a conflict (409).
        """

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Any, content_type: str = MERGE
    ) -> Manifest | None:
        """Changes an object; None if it is gone."""

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str | None = None
    ) -> None:
        """Deletes in the background; nothing happens where there is none (or another ``uid``)."""

    async def serves(self, resource: Resource) -> bool:
        """Whether the kind is installed."""

    def now(self) -> datetime.datetime:
        """The API server's clock, in UTC: ours may be wrong."""


class HttpKubeClient:
    """`KubeClient` of a real API server. Use it as an async context manager."""

    def __init__(self, login: kopf.ConnectionInfo | None = None) -> None:
        self._login = login or read_login()
        self._session: aiohttp.ClientSession | None = None
        self._ahead = 0.0
        """Seconds that the server's clock is ahead of ours."""

    async def __aenter__(self) -> HttpKubeClient:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=32, ssl=self._login.as_ssl_context()),
            headers={"User-Agent": FIELD_MANAGER},
            timeout=aiohttp.ClientTimeout(total=60, sock_connect=10),
        )
        return self._session

    def now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(time.time() + self._ahead, datetime.UTC)

    async def get(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        try:
            found: Manifest = await self._request("GET", resource.path(namespace, name))
            return found
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        labels: Mapping[str, str] | None = None,
        *,
        metadata_only: bool = False,
    ) -> list[Manifest]:
        query = {"limit": str(PAGE)}
        if labels:
            query["labelSelector"] = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
        headers = {"Accept": _METADATA_ONLY} if metadata_only else {}
        path = resource.path(namespace)
        found: list[Manifest] = []
        while True:
            try:
                page = await self._request("GET", path, query=query, headers=headers)
            except ApiError as error:
                if error.status == 410 and "continue" in query:
                    del query["continue"]  # the pages are of a state that is forgotten: once more
                    found = []
                    continue
                if error.status == 404:
                    return []
                raise
            found += page.get("items") or []
            token = page.get("metadata", {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    async def create(self, manifest: Object) -> Manifest | None:
        resource = resource_of(dict(manifest))
        path = resource.path(manifest["metadata"].get("namespace"))
        try:
            made: Manifest = await self._request("POST", path, body=manifest, query=_MANAGER)
            return made
        except ApiError as error:
            if error.status == 409 and error.reason == "AlreadyExists":
                return None
            raise

    async def apply(
        self, manifest: Object, subresource: str = "", *, force: bool = False
    ) -> Manifest:
        resource, metadata = resource_of(dict(manifest)), manifest["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], subresource)
        query = {**_MANAGER, "force": "true"} if force else _MANAGER
        applied: Manifest = await self._request(
            "PATCH", path, body=manifest, query=query, headers={"Content-Type": _APPLY}
        )
        return applied

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Any, content_type: str = MERGE
    ) -> Manifest | None:
        path = resource.path(namespace, name)
        headers = {"Content-Type": content_type}
        try:
            changed: Manifest = await self._request(
                "PATCH", path, body=body, query=_MANAGER, headers=headers
            )
            return changed
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str | None = None
    ) -> None:
        body: Manifest = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self._request("DELETE", resource.path(namespace, name), body=body)
        except ApiError as error:
            if error.status != 404 and not (uid and error.status == 409):
                raise

    async def serves(self, resource: Resource) -> bool:
        prefix = resource.path().rpartition("/")[0]
        try:
            found = await self._request("GET", prefix)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return any(entry["name"] == resource.plural for entry in found.get("resources", []))

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """One request, repeated while the server cannot take it."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._once(method, path, body, query, headers)
            except ApiError as error:
                if error.status == 401 and attempt < ATTEMPTS:
                    await self._log_in_again()
                    pause = 0.1
                elif not error.transient or attempt == ATTEMPTS:
                    raise
                else:
                    pause = max(error.retry_after or 0.0, 0.2 * 2**attempt)
            pause = min(pause, LONGEST_PAUSE) * random.uniform(0.8, 1.2)
            log.debug("%s %s will be repeated in %.1f s", method, path, pause)
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _once(
        self,
        method: str,
        path: str,
        body: Any,
        query: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
    ) -> Any:
        session = self._session or self._open()
        data = None if body is None else json.dumps(body)
        sent = {
            "Content-Type": "application/json",
            **self._login.as_http_headers(),
            **(headers or {}),
        }
        url = self._login.server.rstrip("/") + path
        try:
            async with session.request(
                method, url, data=data, params=query, headers=sent
            ) as response:
                self._compare_clocks(response.headers.get("Date"))
                text = await response.read()
                if response.status < 400:
                    return json.loads(text) if text else None
                raise _error_of(response.status, text, response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
            raise ApiError(0, "Unreachable", f"{method} {path}: {error!r}") from error

    async def _log_in_again(self) -> None:
        """Tokens of ServiceAccounts are replaced while we run; the file has the new one."""
        self._login = await asyncio.to_thread(read_login)

    def _compare_clocks(self, date: str | None) -> None:
        if date:
            ahead = parsedate_to_datetime(date).timestamp() + 0.5 - time.time()
            # The header has whole seconds: smaller differences are none.
            self._ahead = ahead if abs(ahead) > 1.5 else 0.0


_MANAGER = {"fieldManager": FIELD_MANAGER}


def _error_of(status: int, body: bytes, retry_after: str | None) -> ApiError:
    try:
        told = json.loads(body)
        reason, message = told.get("reason") or "", told.get("message") or ""
    except (json.JSONDecodeError, AttributeError):
        reason, message = "", body[:300].decode("utf-8", "replace")
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    return ApiError(status, reason or f"Http{status}", message, seconds)

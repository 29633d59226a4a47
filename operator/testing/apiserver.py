"""A pretended API server over HTTP, with faults: what the operator's own process is run against.

    async with FakeApiServer() as server:
        server.fail(method="PATCH", path="/status", status=409, times=3)
        ...

It answers what kopf and our client ask: discovery, lists in pages, watches with bookmarks, server-
side apply, merge and JSON patches, deletions. `objects.ObjectStore` holds the objects.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import format_datetime
from typing import Any

from aiohttp import web

from calotype.operator.kube.client import ApiError
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import ALL, Resource
from calotype.operator.testing.objects import Change, ObjectStore
from calotype.operator.testing.schemas import check_status

_PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/[^/]+))?"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>status))?"
)


@dataclass
class Fault:
    """Something that goes wrong with requests that match."""

    method: str
    path: str
    status: int = 0
    """0 = the connection breaks without an answer."""
    times: int = 1
    retry_after: int | None = None
    delay: float = 0.0
    after: bool = False
    """The request is carried out, and only its answer is lost."""
    passed: int = 0
    """Matching requests that are let through before."""

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and re.search(self.path, path) is not None

    def error(self) -> ApiError:
        return ApiError(self.status, _REASONS.get(self.status, ""), "injected", self.retry_after)


@dataclass(frozen=True, slots=True)
class Call:
    """A request that was answered."""

    method: str
    path: str
    status: int


class FakeApiServer:
    """`url` is its address; `kubeconfig` writes a file that leads to it."""

    def __init__(self, resources: Iterable[Resource] = ALL) -> None:
        self.resources = set(resources)
        self.objects = ObjectStore()
        self.faults: list[Fault] = []
        self.calls: list[Call] = []
        self.forbidden: set[str] = set()
        """Namespaces in which everything is refused with 403."""
        self.app = web.Application(client_max_size=8 * 1024 * 1024)
        self.app.router.add_route("*", "/{tail:(api|apis)(/.*)?}", self._handle)
        self._runner: web.AppRunner | None = None
        self._watches: set[asyncio.Queue[Change | None]] = set()
        self.port = 0
        self.objects.listeners.append(self.publish)

    async def __aenter__(self) -> FakeApiServer:
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        server: Any = site._server
        self.port = server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop_watches()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kubeconfig(self, folder: pathlib.Path) -> pathlib.Path:
        """A file for ``$KUBECONFIG``."""
        path = folder / "kubeconfig.json"
        context = {"cluster": "fake", "user": "fake"}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {"token": "fake"}}],
            "contexts": [{"name": "fake", "context": context}],
        }
        path.write_text(json.dumps(document))
        return path

    # --- faults ---------------------------------------------------------------------------------

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        """Makes matching requests go wrong; see `Fault`."""
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def drop_watches(self) -> None:
        """Ends all streams, as a restarted API server does."""
        for queue in list(self._watches):
            queue.put_nowait(None)

    def writes(self, method: str, path: str) -> int:
        """How many matching requests were carried out."""
        return sum(
            1
            for call in self.calls
            if call.method == method and call.status < 300 and re.search(path, call.path)
        )

    # --- requests -------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        status = 500
        try:
            fault = self.take_fault(request.method, request.path_qs)
            if fault is not None and not fault.after:
                await self._break(request, fault)
            response = await self._answer(request)
            if fault is not None and fault.after:
                await self._break(request, fault)
            status = response.status
            return response
        except ApiError as error:
            status = error.status
            return _failure(error)
        except (KeyError, TypeError, ValueError) as error:
            status = 400
            return _failure(ApiError(400, "BadRequest", repr(error)))
        finally:
            if "watch=true" not in request.query_string:
                self.calls.append(Call(request.method, request.path_qs, status))

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets."""
        for fault in self.faults:
            if fault.matches(method, path):
                if fault.passed > 0:
                    fault.passed -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    async def _break(self, request: web.Request, fault: Fault) -> None:
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.status:
            raise fault.error()
        if not fault.delay and request.transport is not None:
            request.transport.abort()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        discovered = self._discover(request.path)
        if discovered is not None:
            return self._json(discovered)
        match = _PATH.fullmatch(request.path)
        resource = self._resource(match) if match is not None else None
        if match is None or resource is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        namespace, name = match["namespace"] or "", match["name"] or ""
        if namespace in self.forbidden:
            raise ApiError(403, "Forbidden", f"{resource.plural} is forbidden in {namespace}")
        if request.method == "GET" and not name:
            return await self._collection(request, resource, namespace)
        if request.method == "GET":
            return self._json(self.objects.get(resource, namespace, name))
        body = await request.json() if request.can_read_body else {}
        if request.method == "POST":
            body.setdefault("metadata", {}).setdefault("namespace", namespace)
            return self._json(self.objects.create(resource, body), 201)
        if request.method == "DELETE":
            uid = (body.get("preconditions") or {}).get("uid")
            return self._json(self.objects.delete(resource, namespace, name, uid))
        return self._json(self._patch(request, resource, namespace, name, match["sub"] or "", body))

    def _patch(
        self,
        request: web.Request,
        resource: Resource,
        namespace: str,
        name: str,
        subresource: str,
        body: Any,
    ) -> Manifest:
        kind = request.headers["Content-Type"]
        if kind.startswith("application/apply-patch"):
            manager = request.query["fieldManager"]
            if subresource == "status":
                check_status(resource.plural, body["status"])
            force = request.query.get("force") == "true"
            return self.objects.apply(resource, body, manager, subresource, force=force)
        if kind.startswith("application/json-patch"):
            return self.objects.json_patch(resource, namespace, name, body)
        return self.objects.merge(resource, namespace, name, body, subresource)

    def _resource(self, match: re.Match[str]) -> Resource | None:
        plural, group = match["plural"], match["group"] or ""
        return next((r for r in self.resources if (r.group, r.plural) == (group, plural)), None)

    async def _collection(
        self, request: web.Request, resource: Resource, namespace: str
    ) -> web.StreamResponse:
        query = request.query
        labels = dict(
            part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part
        )
        if query.get("watch") == "true":
            return await self._watch(request, resource, namespace, labels)
        found = self.objects.list(resource, namespace or None, labels)
        start, limit = int(query.get("continue", "0")), int(query.get("limit", "0") or 0)
        page = found[start : start + limit] if limit else found
        metadata: Manifest = {"resourceVersion": str(self.objects.version)}
        if limit and start + limit < len(found):
            metadata["continue"] = str(start + limit)
        if "PartialObjectMetadataList" in request.headers.get("Accept", ""):
            page = [{"metadata": obj["metadata"]} for obj in page]
        return self._json({"kind": f"{resource.kind}List", "metadata": metadata, "items": page})

    async def _watch(
        self, request: web.Request, resource: Resource, namespace: str, labels: dict[str, str]
    ) -> web.StreamResponse:
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        since = int(request.query.get("resourceVersion") or self.objects.version)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if since < self.objects.oldest:
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            await response.write(_line("ERROR", gone))
            return response
        self._watches.add(queue)
        try:
            for change in [c for c in self.objects.changes if c.version > since]:
                queue.put_nowait(change)
            while (found := await queue.get()) is not None:
                where = found.obj["metadata"]
                known = where.get("labels") or {}
                if found.resource == resource and (
                    (not namespace or where.get("namespace") == namespace)
                    and all(known.get(key) == value for key, value in labels.items())
                ):
                    await response.write(_line(found.type, found.obj))
        except (ConnectionResetError, asyncio.CancelledError):
            pass
        finally:
            self._watches.discard(queue)
        return response

    def publish(self, change: Change) -> None:
        """Sends a change to all watches."""
        for queue in list(self._watches):
            queue.put_nowait(change)

    # --- discovery ------------------------------------------------------------------------------

    def _discover(self, path: str) -> Manifest | None:
        served = sorted(self.resources, key=lambda r: (r.group, r.plural))
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = {r.group: r.version for r in served if r.group}
            groups = [
                {
                    "name": group,
                    "versions": [{"groupVersion": f"{group}/{v}", "version": v}],
                    "preferredVersion": {"groupVersion": f"{group}/{v}", "version": v},
                }
                for group, v in versions.items()
            ]
            return {"kind": "APIGroupList", "groups": groups}
        here = [
            r
            for r in served
            if path == (f"/apis/{r.group}/{r.version}" if r.group else f"/api/{r.version}")
        ]
        if not here:
            return None
        return {"kind": "APIResourceList", "resources": [_described(r) for r in here]}

    def _json(self, body: Any, status: int = 200) -> web.Response:
        date = format_datetime(self.objects.clock(), usegmt=True)
        text = json.dumps(body)
        return web.Response(
            text=text, status=status, content_type="application/json", headers={"Date": date}
        )


_REASONS = {409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError"}
_VERBS = ["get", "list", "watch", "create", "patch", "delete"]


def _described(resource: Resource) -> Manifest:
    return {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "kind": resource.kind,
        "namespaced": resource.namespaced,
        "verbs": _VERBS,
    }


def _line(type_: str, obj: Any) -> bytes:
    return json.dumps({"type": type_, "object": obj}).encode() + b"\n"


def _failure(error: ApiError) -> web.Response:
    body = {
        "kind": "Status",
        "status": "Failure",
        "code": error.status,
        "reason": error.reason,
        "message": error.message,
    }
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(int(error.retry_after))
    return web.json_response(body, status=error.status, headers=headers)

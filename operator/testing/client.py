"""A `KubeClient` that calls the objects of a `FakeApiServer` without HTTP: no time passes."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from calotype.operator.kube.client import FIELD_MANAGER, JSON_PATCH, MERGE, ApiError
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import Resource, resource_of
from calotype.operator.testing.apiserver import Call, FakeApiServer
from calotype.operator.testing.schemas import check_status

T = TypeVar("T")


class DirectKubeClient:
    """Faults of the server with a status are met too; `HttpKubeClient`'s repeating is not here."""

    def __init__(self, server: FakeApiServer) -> None:
        self._server = server

    def now(self) -> datetime.datetime:
        return self._server.objects.clock()

    async def get(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        return self._or_none(
            lambda: self._call(
                *("GET", resource, namespace, name),
                lambda: self._server.objects.get(resource, namespace, name),
            )
        )

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        labels: Mapping[str, str] | None = None,
        *,
        metadata_only: bool = False,
    ) -> list[Manifest]:
        found = self._or_none(
            lambda: self._call(
                *("GET", resource, namespace or "", ""),
                lambda: self._server.objects.list(resource, namespace, labels or {}),
            )
        )
        if metadata_only:
            return [{"metadata": obj["metadata"]} for obj in found or []]
        return found or []

    async def create(self, manifest: Object) -> Manifest | None:
        resource = resource_of(dict(manifest))
        namespace = manifest["metadata"].get("namespace") or ""
        try:
            return self._call(
                *("POST", resource, namespace, ""),
                lambda: self._server.objects.create(resource, manifest),
            )
        except ApiError as error:
            if error.reason == "AlreadyExists":
                return None
            raise

    async def apply(
        self, manifest: Object, subresource: str = "", *, force: bool = False
    ) -> Manifest:
        resource, metadata = resource_of(dict(manifest)), manifest["metadata"]
        if subresource == "status":
            check_status(resource.plural, manifest["status"])
        return self._call(
            *("PATCH", resource, metadata.get("namespace") or "", metadata["name"]),
            lambda: self._server.objects.apply(
                resource, manifest, FIELD_MANAGER, subresource, force=force
            ),
            subresource,
        )

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Any, content_type: str = MERGE
    ) -> Manifest | None:
        def change() -> Manifest:
            objects = self._server.objects
            if content_type == JSON_PATCH:
                return objects.json_patch(resource, namespace, name, body)
            return objects.merge(resource, namespace, name, body)

        return self._or_none(lambda: self._call("PATCH", resource, namespace, name, change))

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str | None = None
    ) -> None:
        try:
            self._call(
                *("DELETE", resource, namespace, name),
                lambda: self._server.objects.delete(resource, namespace, name, uid),
            )
        except ApiError as error:
            if error.status != 404 and not (uid and error.status == 409):
                raise

    async def serves(self, resource: Resource) -> bool:
        return resource in self._server.resources

    def _call(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str,
        act: Callable[[], T],
        subresource: str = "",
    ) -> T:
        path = resource.path(namespace, name, subresource)
        status = 200
        try:
            if resource not in self._server.resources:
                raise ApiError(404, "NotFound", "the server does not have this kind")
            if namespace in self._server.forbidden:
                raise ApiError(403, "Forbidden", f"forbidden in {namespace}")
            fault = self._server.take_fault(method, path)
            if fault is not None:
                raise fault.error()
            return copy.deepcopy(act())
        except ApiError as error:
            status = error.status
            raise
        finally:
            self._server.calls.append(Call(method, path, status))

    def _or_none(self, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except ApiError as error:
            if error.status == 404:
                return None
            raise

"""The objects of a pretended API server, with the semantics that an operator relies on.

Resource versions and their history, generations, a status that only its subresource changes,
finalizers, owners, server-side apply, and namespaces that end. No schemas: that is what the tests
on a real API server are for.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calotype.operator.kube.client import ApiError
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import NAMESPACES, Resource

Objects = dict[tuple[str, str], Manifest]
_SPECLESS = ("metadata", "status", "apiVersion", "kind")


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch."""

    version: int
    resource: Resource
    type: str
    obj: Manifest


@dataclass
class ObjectStore:
    """Everything that was ever applied, and how it came about."""

    clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)
    changes: list[Change] = field(default_factory=list)
    oldest: int = 0
    """Versions before it are forgotten: a watch from there gets 410."""
    listeners: list[Callable[[Change], None]] = field(default_factory=list)
    _objects: dict[Resource, Objects] = field(default_factory=dict)
    _applied: dict[tuple[str, str, str], Manifest] = field(default_factory=dict)
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _uids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    version: int = 0

    # --- reading --------------------------------------------------------------------------------

    def all(self, resource: Resource) -> Objects:
        return self._objects.setdefault(resource, {})

    def find(self, resource: Resource, namespace: str, name: str) -> Manifest | None:
        return self.all(resource).get((namespace if resource.namespaced else "", name))

    def get(self, resource: Resource, namespace: str, name: str) -> Manifest:
        found = self.find(resource, namespace, name)
        if found is None:
            raise ApiError(404, "NotFound", f'{resource.plural} "{name}" not found')
        return found

    def list(
        self, resource: Resource, namespace: str | None, labels: Mapping[str, str]
    ) -> list[Manifest]:
        return [
            obj
            for (where, _), obj in sorted(self.all(resource).items())
            if (not namespace or where == namespace)
            and all((obj["metadata"].get("labels") or {}).get(k) == v for k, v in labels.items())
        ]

    # --- writing --------------------------------------------------------------------------------

    def create(self, resource: Resource, manifest: Object) -> Manifest:
        obj = copy.deepcopy(dict(manifest))
        metadata = obj.setdefault("metadata", {})
        namespace = metadata.setdefault("namespace", "default") if resource.namespaced else ""
        self._check_namespace(resource, namespace)
        if "name" not in metadata:
            metadata["name"] = f"{metadata['generateName']}{next(self._uids):05x}"
        if self.find(resource, namespace, metadata["name"]) is not None:
            name = metadata["name"]
            raise ApiError(409, "AlreadyExists", f'{resource.plural} "{name}" already exists')
        obj.pop("status", None)
        metadata |= {
            "uid": f"00000000-0000-4000-8000-{next(self._uids):012x}",
            "creationTimestamp": _text(self.clock()),
            "generation": 1,
        }
        obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
        self._store(resource, obj, "ADDED")
        self._collect(resource, obj)
        return obj

    def apply(
        self,
        resource: Resource,
        manifest: Object,
        manager: str,
        subresource: str,
        *,
        force: bool = True,
    ) -> Manifest:
        """Server-side apply. Not forced, a value of somebody else's that it would change is a
        conflict."""
        body = copy.deepcopy(dict(manifest))
        metadata = body.get("metadata", {})
        namespace = metadata.get("namespace", "") if resource.namespaced else ""
        live = self.find(resource, namespace, metadata["name"])
        if subresource and live is None:
            raise ApiError(404, "NotFound", f'{resource.plural} "{metadata["name"]}" not found')
        if live is None:
            if metadata.pop("uid", None) is not None:
                raise ApiError(409, "Conflict", "uid mismatch: the object does not exist")
            created = self.create(resource, body)
            self._applied[self._manager(created, manager, "")] = body
            return created
        _check_preconditions(live, metadata)
        if subresource:
            body = {subresource: body.get(subresource)}
        else:
            body.pop("status", None)
        body.get("metadata", {}).pop("uid", None)
        key = self._manager(live, manager, subresource)
        if not force:
            mine = self._applied.get(key, {})
            changed_fields = sorted(_conflicts(live, body, mine))
            if changed_fields:
                text = f"conflict with another field manager: {', '.join(changed_fields)}"
                raise ApiError(409, "Conflict", text)
        changed = _without(copy.deepcopy(live), self._applied.get(key, {}), body)
        self._applied[key] = body
        return self.replace(resource, _merged(changed, body))

    def merge(
        self, resource: Resource, namespace: str, name: str, body: Any, subresource: str = ""
    ) -> Manifest:
        """A merge patch."""
        live = self.get(resource, namespace, name)
        body = copy.deepcopy(body)
        _check_preconditions(live, body.get("metadata") or {})
        body.get("metadata", {}).pop("resourceVersion", None)
        if subresource:
            body = {subresource: body.get(subresource)}
        else:
            body.pop("status", None)
        return self.replace(resource, _merge_patched(copy.deepcopy(live), body))

    def json_patch(
        self, resource: Resource, namespace: str, name: str, patch: Sequence[Manifest]
    ) -> Manifest:
        obj = copy.deepcopy(self.get(resource, namespace, name))
        for operation in patch:
            _json_patched(obj, operation)
        return self.replace(resource, obj)

    def replace(self, resource: Resource, obj: Manifest) -> Manifest:
        """Stores a changed object; ends it if it is being deleted and nothing holds it."""
        metadata = obj["metadata"]
        live = self.get(resource, metadata.get("namespace", ""), metadata["name"])
        if _essence(obj) == _essence(live):
            return live
        specs = [{k: v for k, v in o.items() if k not in _SPECLESS} for o in (obj, live)]
        if specs[0] != specs[1]:
            metadata["generation"] = live["metadata"].get("generation", 1) + 1
        if metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            self._remove(resource, obj)
            return obj
        self._store(resource, obj, "MODIFIED")
        return obj

    def delete(
        self, resource: Resource, namespace: str, name: str, uid: str | None = None
    ) -> Manifest:
        live = self.get(resource, namespace, name)
        if uid is not None and uid != live["metadata"]["uid"]:
            raise ApiError(409, "Conflict", "the uid in the precondition is another one")
        if resource == NAMESPACES:
            return self._end_namespace(live)
        if not live["metadata"].get("finalizers"):
            self._remove(resource, live)
            return live
        if "deletionTimestamp" not in live["metadata"]:
            changed = copy.deepcopy(live)
            changed["metadata"]["deletionTimestamp"] = _text(self.clock())
            self._store(resource, changed, "MODIFIED")
        return live

    def forget_history(self) -> None:
        """As etcd's compaction: watches that are behind get 410."""
        self.oldest = self.version
        self.changes.clear()

    # --- within ---------------------------------------------------------------------------------

    def _manager(self, obj: Object, manager: str, sub: str) -> tuple[str, str, str]:
        return obj["metadata"]["uid"], manager, sub

    def _store(self, resource: Resource, obj: Manifest, type_: str) -> None:
        self.version = next(self._versions)
        obj["metadata"]["resourceVersion"] = str(self.version)
        metadata = obj["metadata"]
        self.all(resource)[metadata.get("namespace", ""), metadata["name"]] = obj
        self._publish(Change(self.version, resource, type_, obj))

    def _publish(self, change: Change) -> None:
        self.changes.append(change)
        for listener in list(self.listeners):
            listener(change)

    def _remove(self, resource: Resource, obj: Manifest) -> None:
        metadata = obj["metadata"]
        self.all(resource).pop((metadata.get("namespace", ""), metadata["name"]), None)
        self.version = next(self._versions)
        gone = copy.deepcopy(obj)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._publish(Change(self.version, resource, "DELETED", gone))
        for kind in list(self._objects):
            for (namespace, name), child in list(self.all(kind).items()):
                owners = child["metadata"].get("ownerReferences") or ()
                if any(owner["uid"] == metadata["uid"] for owner in owners):
                    self.delete(kind, namespace, name)
        if resource.namespaced:
            self._finish_namespace(metadata.get("namespace", ""))

    def _collect(self, resource: Resource, obj: Object) -> None:
        """The garbage collector also takes what was made for an owner that is gone."""
        owners = obj["metadata"].get("ownerReferences") or ()
        known = {
            o["metadata"]["uid"] for objects in self._objects.values() for o in objects.values()
        }
        if owners and all(owner["uid"] not in known for owner in owners):
            metadata = obj["metadata"]
            self.delete(resource, metadata["namespace"], metadata["name"])

    def _check_namespace(self, resource: Resource, namespace: str) -> None:
        if not resource.namespaced:
            return
        found = self.find(NAMESPACES, "", namespace)
        if found is None:
            raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
        if "deletionTimestamp" in found["metadata"]:
            raise ApiError(403, "Forbidden", f"namespace {namespace} is being terminated")

    def _end_namespace(self, live: Manifest) -> Manifest:
        name = live["metadata"]["name"]
        ending = copy.deepcopy(live)
        ending["metadata"]["deletionTimestamp"] = _text(self.clock())
        ending["status"] = {"phase": "Terminating"}
        self._store(NAMESPACES, ending, "MODIFIED")
        for kind in list(self._objects):
            for where, child in list(self.all(kind)):
                if kind.namespaced and where == name and self.find(kind, where, child):
                    self.delete(kind, where, child)
        self._finish_namespace(name)
        return ending

    def _finish_namespace(self, name: str) -> None:
        found = self.find(NAMESPACES, "", name)
        if found is None or "deletionTimestamp" not in found["metadata"]:
            return
        left = any(where == name for kind in self._objects for where, _ in self.all(kind))
        if not left:
            self.all(NAMESPACES).pop(("", name))
            self.version = next(self._versions)
            self._publish(Change(self.version, NAMESPACES, "DELETED", found))


def _text(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _essence(obj: Object) -> str:
    metadata = {k: v for k, v in obj["metadata"].items() if k != "resourceVersion"}
    return json.dumps({**obj, "metadata": metadata}, sort_keys=True)


def _check_preconditions(live: Object, metadata: Object) -> None:
    for name in ("uid", "resourceVersion"):
        wanted = metadata.get(name)
        if wanted is not None and wanted != live["metadata"][name]:
            raise ApiError(409, "Conflict", f"the object has another {name} than {wanted}")


_IDENTITY = (".apiVersion", ".kind", ".metadata.name", ".metadata.namespace")


def _conflicts(live: Any, applied: Any, mine: Any, path: str = "") -> Iterator[str]:
    """Fields that have another value than the applied one and that ``mine`` does not name."""
    if isinstance(live, dict) and isinstance(applied, dict):
        for key in applied.keys() & live.keys():
            before = mine.get(key) if isinstance(mine, dict) else None
            yield from _conflicts(live[key], applied[key], before, f"{path}.{key}")
    elif live != applied and live != mine and path not in _IDENTITY:
        yield path


def _merged(live: Any, applied: Any) -> Any:
    if isinstance(live, dict) and isinstance(applied, dict):
        return {**live, **{key: _merged(live.get(key), value) for key, value in applied.items()}}
    return applied


def _without(live: Any, before: Any, now: Any) -> Any:
    """Fields that an apply named before and does not name any more go."""
    if not (isinstance(live, dict) and isinstance(before, dict)):
        return live
    now = now if isinstance(now, dict) else {}
    for key, value in before.items():
        if key in ("apiVersion", "kind") or key not in live:
            continue
        if key not in now and not isinstance(value, dict):
            del live[key]
        elif isinstance(value, dict):
            live[key] = _without(live[key], value, now.get(key))
            if key not in now and not live[key]:
                del live[key]
    return live


def _merge_patched(live: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    live = live if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            live.pop(key, None)
        else:
            live[key] = _merge_patched(live.get(key), value)
    return live


def _json_patched(obj: Manifest, operation: Object) -> None:
    *parents, last = operation["path"].strip("/").split("/")
    target: Any = obj
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    place: Any = int(last) if isinstance(target, list) else last
    if operation["op"] == "test":
        if target[place] != operation["value"]:
            raise ApiError(422, "Invalid", f"test of {operation['path']} failed")
    elif operation["op"] in ("add", "replace"):
        target[place] = operation["value"]
    else:
        raise ApiError(422, "Invalid", f"operation {operation['op']} is not pretended")

"""The objects of the Ray kinds in the API: lists, changes and status, in the controller's words."""

import random

import aiohttp
from controlplane.client.api_client import ApiClient, allow
from controlplane.client.objects import Object
from controlplane.kuberay.conditions import now

LETTERS = "bcdfghjklmnpqrstvwxz2456789"
GROUP = "/apis/ray.io/v1"
PLURALS = {"RayCluster": "rayclusters", "RayService": "rayservices", "RayJob": "rayjobs"}
# What a round of a reconcile may meet; the next round begins anew.
PASSING = (OSError, TimeoutError, aiohttp.ClientError)


class Objects:
    """Calls on the API server; every list is fresh, so that nothing is made twice."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    async def all(self, kind: str) -> list[Object]:
        """Every object of a Ray kind, in all namespaces."""
        listed = await self._api.get(f"{GROUP}/{PLURALS[kind]}")
        return [{"apiVersion": "ray.io/v1", **item, "kind": kind} for item in listed["items"]]

    async def find(self, kind: str, namespace: str, name: str) -> Object | None:
        found = await self._api.find(f"{GROUP}/namespaces/{namespace}/{PLURALS[kind]}/{name}")
        return dict(found) if found else None

    async def children(self, kind: str, holder: Object) -> list[Object]:
        """The objects of a Ray kind that `holder` controls, the oldest first."""
        namespace, uid = holder["metadata"]["namespace"], holder["metadata"]["uid"]
        listed = await self._api.get(f"{GROUP}/namespaces/{namespace}/{PLURALS[kind]}")
        owned = [
            {"apiVersion": "ray.io/v1", **item, "kind": kind}
            for item in listed["items"]
            if any(one["uid"] == uid for one in item["metadata"].get("ownerReferences", []))
        ]
        return sorted(owned, key=lambda one: one["metadata"]["creationTimestamp"])

    async def pods(self, cluster: Object) -> list[Object]:
        """Every pod of a Ray cluster."""
        meta = cluster["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods"
        listed = await self._api.get(path, labelSelector=f"ray.io/cluster={meta['name']}")
        return list(listed["items"])

    async def ready_endpoints(self, namespace: str, service: str) -> int:
        """How many endpoints of a Service take traffic."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        selector = f"kubernetes.io/service-name={service}"
        listed = await self._api.get(path, labelSelector=selector)
        return sum(
            bool(endpoint.get("conditions", {}).get("ready", True))
            for piece in listed["items"]
            for endpoint in piece.get("endpoints") or []
        )

    async def create(self, document: Object) -> Object:
        return await self._api.call("POST", path_of(document, named=False), document)

    async def ensure(self, document: Object) -> None:
        """Makes an object, or brings what this controller says of it up to date."""
        await self._api.apply(path_of(document), document, "kuberay-operator")

    async def patch(self, document: Object, change: Object) -> Object:
        """A merge patch of an object."""
        content = "application/merge-patch+json"
        return await self._api.call("PATCH", path_of(document), change, content)

    async def write_status(self, document: Object, status: Object) -> None:
        """Writes a status where it differs from the one that was read; what somebody else changed
        meanwhile is left to the next round."""
        if status != document.get("status", {}):
            status["lastUpdateTime"] = now()
            body = {**document, "status": status}
            await allow(self._api.call("PUT", f"{path_of(document)}/status", body), 404, 409)

    async def delete(self, document: Object, grace: int | None = None) -> None:
        if "deletionTimestamp" not in document["metadata"]:
            await self._api.delete(path_of(document), document["metadata"]["uid"], grace)

    async def remove_service(self, namespace: str, name: str) -> None:
        """Deletes a Service, where there is one."""
        path = f"/api/v1/namespaces/{namespace}/services/{name}"
        await allow(self._api.call("DELETE", path), 404)

    async def submitter(self, job: Object) -> Object | None:
        """The Job of Kubernetes of a RayJob: it has the same name."""
        meta = {name: job["metadata"][name] for name in ("namespace", "name")}
        found = await self._api.find(
            path_of({"apiVersion": "batch/v1", "kind": "Job", "metadata": meta})
        )
        return {"apiVersion": "batch/v1", "kind": "Job", **found} if found else None

    async def event(self, document: Object, kind: str, reason: str, message: str) -> None:
        meta = document["metadata"]
        about = {"apiVersion": "ray.io/v1", "kind": document["kind"], "uid": meta["uid"]}
        about |= {"namespace": meta["namespace"], "name": meta["name"]}
        event: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": about,
            "type": kind,
            "reason": reason,
            "message": message[:1000],
            "source": {"component": "kuberay-operator"},
            **{name: now() for name in ("firstTimestamp", "lastTimestamp")},
            "count": 1,
        }
        await self._api.call("POST", f"/api/v1/namespaces/{meta['namespace']}/events", event)

    async def add_finalizer(self, document: Object, name: str) -> None:
        finalizers = [*document["metadata"].get("finalizers", []), name]
        await self.patch(document, {"metadata": {"finalizers": finalizers}})

    async def drop_finalizer(self, document: Object, name: str) -> None:
        left = [one for one in document["metadata"].get("finalizers", []) if one != name]
        await allow(self.patch(document, {"metadata": {"finalizers": left}}), 404)


def path_of(document: Object, named: bool = True) -> str:
    """The API path of an object, or of the list that it is created in."""
    meta, version, kind = document["metadata"], document["apiVersion"], document["kind"]
    root = f"/api/{version}" if version == "v1" else f"/apis/{version}"
    plural = PLURALS.get(kind, f"{kind.lower()}s")
    path = f"{root}/namespaces/{meta['namespace']}/{plural}"
    return f"{path}/{meta['name']}" if named else path


def has_finalizer(document: Object, name: str) -> bool:
    return name in document["metadata"].get("finalizers", [])


def suffix() -> str:
    """Five letters, as the API server takes them for generated names."""
    return "".join(random.choices(LETTERS, k=5))

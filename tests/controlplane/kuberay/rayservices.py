"""RayService: one active Ray cluster, sometimes a pending one, and the configuration of Serve.

The order of calls, the conditions and the faults are those of KubeRay 1.7: a changed number of
replicas does not reach the running cluster, and Ready says only that the traffic's Service has an
endpoint.
"""

import copy
import hashlib
import json
from dataclasses import dataclass, field

import aiohttp
from controlplane.client.objects import Object
from controlplane.kuberay import pods as build
from controlplane.kuberay.conditions import holds, put, seconds_since
from controlplane.kuberay.dashboard import Dashboard
from controlplane.kuberay.objects import PASSING, Objects, has_finalizer, suffix
from controlplane.kuberay.rayclusters import is_ready, of_type
from controlplane.kuberay.services import head_service, serve_service

FINALIZER = "ray.io/rayservice-finalizer"
HASH, GROUPS = "ray.io/hash-without-replicas-and-workers-to-delete", "ray.io/num-worker-groups"
ORIGIN = "ray.io/originated-from"
DELETION_SECONDS = 60
IGNORED = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
IGNORED_IN_POD = ("tolerations", "schedulingGates")


@dataclass
class Clusters:
    """The Ray clusters of a RayService by their part in it."""

    active: Object | None = None
    pending: Object | None = None
    others: list[Object] = field(default_factory=list)


class RayServices:
    """Reconciles RayServices. `_sent` is what Serve was told, by cluster: a new controller does not
    know and tells it again."""

    def __init__(self, objects: Objects, session: aiohttp.ClientSession) -> None:
        self._objects, self._session = objects, session
        self._sent: dict[str, str] = {}

    async def reconcile(self, service: Object) -> None:
        """One round. An error of a head ends it, and the status stays as it was."""
        if "deletionTimestamp" in service["metadata"]:
            return await self._remove(service)
        if not has_finalizer(service, FINALIZER):
            return await self._adopt(service)
        status = copy.deepcopy(service.get("status", {}))
        status["observedGeneration"] = service["metadata"]["generation"]
        clusters = await self._clusters(service, status)
        if service["spec"].get("suspend") or holds(status, "Suspending"):
            return await self._suspend(service, status, clusters)
        if holds(status, "Suspended"):
            put(status, "Suspended", False, "RayServiceResumed")
        if not status.get("conditions"):
            put(status, "Ready", False, "Initializing")
            put(status, "UpgradeInProgress", False, "Initializing")
        if not await self._choose(service, status, clusters):
            return await self._objects.write_status(service, status)
        await self._serve(service, status, clusters)
        await self._write(service, status, clusters)

    async def _adopt(self, service: Object) -> None:
        """Finalizer and defaults in one update, which makes the generation 2."""
        config = copy.deepcopy(service["spec"]["rayClusterConfig"])
        config["headGroupSpec"].setdefault("rayStartParams", {})
        config["headGroupSpec"]["template"].setdefault("metadata", {})
        for group in config.get("workerGroupSpecs", []):
            group.setdefault("scaleStrategy", {})
            group.setdefault("rayStartParams", {})
        finalizers = [*service["metadata"].get("finalizers", []), FINALIZER]
        change = {"metadata": {"finalizers": finalizers}, "spec": {"rayClusterConfig": config}}
        await self._objects.patch(service, change)

    async def _remove(self, service: Object) -> None:
        clusters = await self._objects.children("RayCluster", service)
        for cluster in clusters:
            await self._objects.delete(cluster)
        if not clusters:
            await self._objects.drop_finalizer(service, FINALIZER)

    async def _clusters(self, service: Object, status: Object) -> Clusters:
        active, pending = _name(status, "active"), _name(status, "pending")
        found = Clusters()
        for cluster in await self._objects.children("RayCluster", service):
            if cluster["metadata"]["name"] == active:
                found.active = cluster
            elif cluster["metadata"]["name"] == pending:
                found.pending = cluster
            elif "deletionTimestamp" not in cluster["metadata"]:
                found.others.append(cluster)
        return found

    # --- which clusters there are ---

    async def _choose(self, service: Object, status: Object, clusters: Clusters) -> bool:
        """Decides on clusters; False when there is nothing more to do in this round."""
        spec = service["spec"]["rayClusterConfig"]
        await self._sweep(service, status, clusters)
        active, pending = clusters.active, clusters.pending
        if active is None and _name(status, "active"):
            status["activeServiceStatus"] = {}  # somebody deleted it
        if active is not None and not _name(status, "pending"):
            if _same(active, spec):
                return True
            if _appended(active, spec):
                await self._objects.patch(active, _replacement(spec))
                return True
            strategy = (service["spec"].get("upgradeStrategy") or {}).get("type", "NewCluster")
            if strategy == "None":
                return True
        if not _name(status, "pending"):
            name = f"{service['metadata']['name']}-{suffix()}"
            status["pendingServiceStatus"] = {"rayClusterName": name}
            if active is not None:
                reason = "BothActivePendingClustersExist"
                put(status, "UpgradeInProgress", True, reason)
            return False
        if pending is None:
            name = _name(status, "pending")
            clusters.pending = await self._objects.create(_cluster(service, name))
        elif not _same(pending, spec):
            status["pendingServiceStatus"] = {}  # the goal moved on; the next round begins anew
            if active is not None and _same(active, spec):
                put(status, "UpgradeInProgress", False, "NoPendingCluster")
            return False
        return True

    async def _sweep(self, service: Object, status: Object, clusters: Clusters) -> None:
        """Deletes clusters that were replaced, after a while in which requests may end there."""
        delay = service["spec"].get("rayClusterDeletionDelaySeconds", DELETION_SECONDS)
        # The moment of the switch is in the condition that the switch changed.
        changed = [
            one["lastTransitionTime"]
            for one in status.get("conditions", [])
            if one["type"] == "UpgradeInProgress"
        ]
        waited = seconds_since(changed[0]) if changed else delay
        for cluster in clusters.others:
            if waited >= delay or not _name(status, "active"):
                await self._objects.delete(cluster)

    # --- what Serve is told, and what it says ---

    async def _serve(self, service: Object, status: Object, clusters: Clusters) -> None:
        """Tells the newest cluster the configuration, and lets it take the traffic when it runs."""
        cluster = clusters.pending or clusters.active
        if cluster is None:
            return
        part = "pendingServiceStatus" if clusters.pending else "activeServiceStatus"
        if clusters.pending and clusters.active:
            status["activeServiceStatus"]["applicationStatuses"] = {}
        head = await self._label_head(service, cluster)
        if head is None or not holds(cluster.get("status", {}), "HeadPodReady"):
            return
        meta, config = cluster["metadata"], service["spec"].get("serveConfigV2", "")
        dashboard = Dashboard(self._session, meta["namespace"], meta["name"])
        applications = await dashboard.applications()
        if config and (not applications or self._sent.get(meta["uid"]) != config):
            await self._deploy(service, dashboard, meta["uid"], config)
        status[part]["applicationStatuses"] = {
            name: _application(one) for name, one in applications.items()
        }
        runs = bool(applications)
        runs = runs and all(one["status"] == "RUNNING" for one in applications.values())
        if runs:
            await self._objects.ensure(head_service(cluster, service))
            if traffic := serve_service(service, cluster):
                await self._objects.ensure(traffic)
            if clusters.pending:
                status["activeServiceStatus"] = status["pendingServiceStatus"]
                status["pendingServiceStatus"] = {}
                put(status, "UpgradeInProgress", False, "NoPendingCluster")
                clusters.active, clusters.pending = clusters.pending, None

    async def _deploy(self, service: Object, head: Dashboard, uid: str, config: str) -> None:
        try:
            await head.deploy(config)
        except PASSING as error:
            reason, text = "FailedToUpdateServeApplications", f"{type(error).__name__}: {error}"
            await self._objects.event(service, "Warning", reason, text)
            raise
        self._sent[uid] = config

    async def _label_head(self, service: Object, cluster: Object) -> Object | None:
        """Says on the head pod whether it takes traffic; the head, where there is one."""
        pods = await self._objects.pods(cluster)
        heads = [p for p in of_type(pods, "head") if "deletionTimestamp" not in p["metadata"]]
        if not heads:
            return None
        head, serves = heads[0], "false"
        address = head.get("status", {}).get("podIP")
        if address and not service["spec"].get("excludeHeadPodFromServeSvc"):
            meta = cluster["metadata"]
            dashboard = Dashboard(self._session, meta["namespace"], meta["name"])
            ports = build.ray_container(head).get("ports", [])
            port = next((p["containerPort"] for p in ports if p.get("name") == "serve"), None)
            if await dashboard.healthy(address, port or build.SERVE_PORT):
                serves = "true"
        if head["metadata"]["labels"].get("ray.io/serve") != serves:
            head |= {"apiVersion": "v1", "kind": "Pod"}
            await self._objects.patch(head, {"metadata": {"labels": {"ray.io/serve": serves}}})
        return head if is_ready(head) else None

    # --- status ---

    async def _write(self, service: Object, status: Object, clusters: Clusters) -> None:
        meta = service["metadata"]
        for part, cluster in (("active", clusters.active), ("pending", clusters.pending)):
            if cluster is not None and _name(status, part):
                found = cluster.get("status", {})
                kept = {name: one for name, one in found.items() if name != "lastUpdateTime"}
                status[f"{part}ServiceStatus"]["rayClusterStatus"] = kept
        traffic = f"{meta['name']}-serve-svc"
        endpoints = await self._objects.ready_endpoints(meta["namespace"], traffic)
        status["numServeEndpoints"] = endpoints
        if endpoints and _name(status, "active"):
            put(status, "Ready", True, "NonZeroServeEndpoints")
            status["serviceStatus"] = "Running"
        elif _name(status, "active"):
            put(status, "Ready", False, "ZeroServeEndpoints")
            status["serviceStatus"] = ""
        await self._objects.write_status(service, status)

    async def _suspend(self, service: Object, status: Object, clusters: Clusters) -> None:
        """Takes everything away; a resumed service begins with a new cluster."""
        both = [one for one in (clusters.active, clusters.pending) if one is not None]
        for cluster in [*both, *clusters.others]:
            await self._objects.delete(cluster)
        meta = service["metadata"]
        for name in (f"{meta['name']}-serve-svc", build.head_service_name(meta["name"])):
            await self._objects.remove_service(meta["namespace"], name)
        put(status, "Ready", False, "RayServiceSuspended")
        if both or clusters.others:
            put(status, "Suspending", True, "SuspendRequested")
        else:
            put(status, "Suspending", False, "SuspendComplete")
            put(status, "Suspended", True, "SuspendComplete")
            put(status, "UpgradeInProgress", False, "NoPendingCluster")
            status |= {"activeServiceStatus": {}, "pendingServiceStatus": {}}
            status |= {"numServeEndpoints": 0, "serviceStatus": ""}
        await self._objects.write_status(service, status)


def fingerprint(spec: Object, groups: int | None = None) -> str:
    """A hash of what makes another cluster necessary, of the first `groups` worker groups."""
    kept = copy.deepcopy(spec)
    workers = kept.get("workerGroupSpecs", [])
    kept["workerGroupSpecs"] = workers if groups is None else workers[:groups]
    for group in [kept["headGroupSpec"], *kept["workerGroupSpecs"]]:
        for name in IGNORED:
            group.pop(name, None)
        for name in IGNORED_IN_POD:
            group["template"]["spec"].pop(name, None)
    return hashlib.sha1(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _same(cluster: Object, spec: Object) -> bool:
    return bool(cluster["metadata"]["annotations"][HASH] == fingerprint(spec))


def _appended(cluster: Object, spec: Object) -> bool:
    """Whether the only difference is further worker groups at the end."""
    annotations = cluster["metadata"]["annotations"]
    count = int(annotations[GROUPS])
    more = len(spec.get("workerGroupSpecs", [])) > count
    return more and bool(annotations[HASH] == fingerprint(spec, count))


def _replacement(spec: Object) -> Object:
    return {"metadata": {"annotations": _annotations(spec)}, "spec": spec}


def _annotations(spec: Object) -> dict[str, str]:
    groups = str(len(spec.get("workerGroupSpecs", [])))
    return {HASH: fingerprint(spec), GROUPS: groups, "ray.io/kuberay-version": "v1.7.0"}


def _cluster(service: Object, name: str) -> Object:
    meta, spec = service["metadata"], service["spec"]["rayClusterConfig"]
    labels = {f"{ORIGIN}-cr-name": meta["name"], f"{ORIGIN}-crd": "RayService"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {**meta.get("labels", {}), **labels},
            "annotations": {**meta.get("annotations", {}), **_annotations(spec)},
            "ownerReferences": [build.owner(service)],
        },
        "spec": copy.deepcopy(spec),
    }


def _application(found: Object) -> Object:
    deployments = {
        name: {"status": one.get("status", ""), "message": one.get("message", "")}
        for name, one in (found.get("deployments") or {}).items()
    }
    status = {"status": found["status"], "message": found.get("message", "")}
    return {**status, "serveDeploymentStatuses": deployments}


def _name(status: Object, part: str) -> str:
    return str(status.get(f"{part}ServiceStatus", {}).get("rayClusterName", ""))

"""RayCluster: its head pod, its workers, their Service, and its status."""

import copy

from controlplane.client.objects import Object
from controlplane.kuberay import pods as build
from controlplane.kuberay.conditions import put
from controlplane.kuberay.objects import Objects
from controlplane.kuberay.services import head_service
from controlplane.node.pods import quantity


class RayClusters:
    """Brings the pods of one cluster to what its specification says."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def reconcile(self, cluster: Object) -> None:
        """One round; the pods of a deleted cluster go by garbage collection."""
        if "deletionTimestamp" in cluster["metadata"]:
            return
        spec = cluster["spec"]
        pods = [p for p in await self._objects.pods(cluster) if _counts(p)]
        if spec.get("suspend"):
            for pod in pods:
                await self._objects.delete(pod)
            return await self._write(cluster, pods)
        await self._objects.ensure(head_service(cluster))
        if spec.get("enableInTreeAutoscaling"):
            await self._grant(cluster)
        pods = await self._head(cluster, pods)
        for group in spec.get("workerGroupSpecs", []):
            pods = await self._group(cluster, group, pods)
        await self._write(cluster, pods)

    async def _head(self, cluster: Object, pods: list[Object]) -> list[Object]:
        for pod in of_type(pods, "head"):
            if _ended(pod):
                await self._objects.delete(pod)
                return [one for one in pods if one is not pod]
        if of_type(pods, "head"):
            return pods
        return [*pods, await self._objects.create(build.head_pod(cluster))]

    async def _group(self, cluster: Object, group: Object, pods: list[Object]) -> list[Object]:
        mine = of_group(pods, group["groupName"])
        named = (group.get("scaleStrategy") or {}).get("workersToDelete") or []
        wanted = 0 if group.get("suspend") else desired(group)
        leaving = [pod for pod in mine if _ended(pod) or pod["metadata"]["name"] in named]
        staying = [pod for pod in mine if pod not in leaving]
        # With the autoscaler only those go that it names: it knows which are idle.
        surplus = len(staying) - wanted
        if surplus > 0 and (group.get("suspend") or not _autoscaled(cluster)):
            leaving += staying[-surplus:]
        for pod in leaving:
            await self._objects.delete(pod)
        indices = {_index(pod) for pod in staying}
        made = []
        for _ in range(wanted - len(staying)):
            index = next(i for i in range(len(indices) + 1) if i not in indices)
            indices.add(index)
            made.append(await self._objects.create(build.worker_pod(cluster, group, index)))
        return [*[pod for pod in pods if pod not in leaving], *made]

    async def _grant(self, cluster: Object) -> None:
        """The account of the autoscaler's pod, and the rights that it needs."""
        meta = cluster["metadata"]
        template = cluster["spec"]["headGroupSpec"]["template"]["spec"]
        account = template.get("serviceAccountName") or meta["name"]
        names = {"name": meta["name"], "namespace": meta["namespace"]}
        names["ownerReferences"] = [build.owner(cluster)]
        rbac = "rbac.authorization.k8s.io"
        if account == meta["name"]:
            await self._objects.ensure(
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": names}
            )
        pods = {"apiGroups": [""], "resources": ["pods", "pods/resize"]}
        pods["verbs"] = ["get", "list", "watch", "patch"]
        clusters = {"apiGroups": ["ray.io"], "resources": ["rayclusters"]}
        clusters["verbs"] = ["get", "patch"]
        role: Object = {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": names}
        await self._objects.ensure({**role, "rules": [pods, clusters]})
        subject = {"kind": "ServiceAccount", "name": account, "namespace": meta["namespace"]}
        binding: Object = {"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": names}
        reference = {"apiGroup": rbac, "kind": "Role", "name": meta["name"]}
        await self._objects.ensure({**binding, "subjects": [subject], "roleRef": reference})

    async def _write(self, cluster: Object, pods: list[Object]) -> None:
        status = copy.deepcopy(cluster.get("status", {}))
        spec, meta = cluster["spec"], cluster["metadata"]
        groups = spec.get("workerGroupSpecs", [])
        heads, workers = of_type(pods, "head"), of_type(pods, "worker")
        status["observedGeneration"] = meta["generation"]
        wanted = sum(0 if group.get("suspend") else desired(group) for group in groups)
        status["desiredWorkerReplicas"] = wanted
        status["minWorkerReplicas"] = sum(group.get("minReplicas", 0) for group in groups)
        status["maxWorkerReplicas"] = sum(group.get("maxReplicas", 2147483647) for group in groups)
        status["availableWorkerReplicas"] = sum(_running(pod) for pod in workers)
        status["readyWorkerReplicas"] = sum(is_ready(pod) for pod in workers)
        for name, resource in (("CPU", "cpu"), ("Memory", "memory"), ("GPU", "nvidia.com/gpu")):
            status[f"desired{name}"] = _total(spec, resource)
        if heads:
            _write_head(status, cluster, heads[0])
        all_ready = bool(heads) and all(is_ready(pod) for pod in [*heads, *workers])
        complete = all_ready and len(workers) >= wanted
        if complete:
            status["state"] = "ready"
            reason = "AllPodRunningAndReadyFirstTime"
            put(status, "RayClusterProvisioned", True, reason)  # it never turns back
        elif "state" not in status:
            put(status, "RayClusterProvisioned", False, "RayClusterPodsProvisioning")
        suspended = bool(spec.get("suspend"))
        if suspended and not pods:
            status["state"] = "suspended"
        put(status, "RayClusterSuspending", suspended and bool(pods), "UserRequestSuspend")
        put(status, "RayClusterSuspended", suspended and not pods, "UserRequestSuspend")
        await self._objects.write_status(cluster, status)


def desired(group: Object) -> int:
    """How many workers a group is to have, within its bounds."""
    most, least = group.get("maxReplicas", 2147483647), group.get("minReplicas", 0)
    return int(min(max(group.get("replicas", 0), least), most))


def of_type(pods: list[Object], kind: str) -> list[Object]:
    return [pod for pod in pods if pod["metadata"]["labels"]["ray.io/node-type"] == kind]


def of_group(pods: list[Object], name: str) -> list[Object]:
    mine = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/group") == name]
    return sorted(mine, key=_index)


def is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _write_head(status: Object, cluster: Object, head: Object) -> None:
    name = build.head_service_name(cluster["metadata"]["name"])
    state = head.get("status", {})
    status["head"] = {
        "podIP": state.get("podIP", ""),
        "podName": head["metadata"]["name"],
        "serviceIP": state.get("podIP", ""),
        "serviceName": name,
    }
    ports = build.ray_container(head).get("ports", [])
    status["endpoints"] = {
        one.get("name") or str(one["containerPort"]): str(one["containerPort"]) for one in ports
    }
    if is_ready(head):
        put(status, "HeadPodReady", True, "HeadPodRunningAndReady")
        return
    reason = "ContainersNotReady"
    for container in state.get("containerStatuses", []):
        if waiting := container["state"].get("waiting"):
            reason = waiting.get("reason") or reason
    put(status, "HeadPodReady", False, reason)


def _total(spec: Object, resource: str) -> str:
    """The sum of a resource over head and desired workers, as plain number."""
    groups = [(spec["headGroupSpec"], 1)]
    groups += [(group, desired(group)) for group in spec.get("workerGroupSpecs", [])]
    total = 0.0
    for group, count in groups:
        resources = group["template"]["spec"]["containers"][0].get("resources", {})
        table = resources.get("requests", {}) | resources.get("limits", {})
        total += count * quantity.parse(table.get(resource, 0))
    return str(int(total)) if total == int(total) else f"{total * 1000:.0f}m"


def _autoscaled(cluster: Object) -> bool:
    return bool(cluster["spec"].get("enableInTreeAutoscaling"))


def _counts(pod: Object) -> bool:
    return "deletionTimestamp" not in pod["metadata"]


def _running(pod: Object) -> bool:
    return bool(pod.get("status", {}).get("phase") == "Running")


def _index(pod: Object) -> int:
    return int(pod["metadata"]["labels"].get("ray.io/worker-group-replica-index", 0))


def _ended(pod: Object) -> bool:
    """Whether a pod will never run again by itself."""
    state = pod.get("status", {})
    if state.get("phase") in ("Succeeded", "Failed"):
        return True
    if pod["spec"].get("restartPolicy") != "Never":
        return False
    ray = build.ray_container(pod)["name"]
    statuses = state.get("containerStatuses", [])
    return any(one["name"] == ray and "terminated" in one["state"] for one in statuses)

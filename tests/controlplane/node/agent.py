"""The node itself: its object, its heartbeat, and the pods that are bound to it."""

import asyncio
import shutil
import signal
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from controlplane.client.api_client import ApiError, allow
from controlplane.client.objects import Object
from controlplane.node import logs
from controlplane.node.claims import Claims
from controlplane.node.pods.pod import Node, Pod
from controlplane.node.services import write_in_place

HEARTBEAT_SECONDS, LEASE_SECONDS = 10.0, 40
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
INFO = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "kubeletVersion")


class Agent:
    """Runs until SIGTERM; the kernel then kills what runs in its pods."""

    def __init__(self, node: Node, claims: Claims, hosts: Path) -> None:
        self._node, self._claims, self._hosts = node, claims, hosts
        self._pods: dict[str, Pod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses = 1
        self._since = _now()

    async def run(self, certificate: Path, key: Path) -> None:
        node = self._node
        stop = asyncio.Event()
        for sign in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(sign, stop.set)
        shutil.rmtree(node.scratch / "pods", ignore_errors=True)  # of a node that was killed
        await logs.serve(node.address, certificate, key, self.find_log)
        await self._claims.install()
        await self._register()
        mine = {"fieldSelector": f"spec.nodeName={node.name}"}
        self._start(node.services.run())
        self._watch("/api/v1/services", node.services.handle)
        self._watch(SLICES, node.services.handle)
        self._watch("/api/v1/pods", self.handle, **mine)
        self._watch("/api/v1/persistentvolumeclaims", self._claims.handle_claim)
        self._watch("/api/v1/persistentvolumes", self._claims.handle_volume)
        self._start(self._beat())
        print("the node is ready", flush=True)
        await stop.wait()

    def handle(self, change: str, document: Object) -> None:
        """Takes a change of a pod of this node."""
        meta = document["metadata"]
        pod = self._pods.get(meta["uid"])
        if change == "DELETED":
            if pod:
                pod.document["metadata"].pop("deletionTimestamp", None)
                pod.end(0)
        elif pod:
            pod.update(document)
        elif meta.get("deletionTimestamp"):
            path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
            self._start(self._node.api.delete(path, meta["uid"], grace=0))
        elif document.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            pod = Pod(self._node, document, self._address())
            self._pods[meta["uid"]] = pod
            self._start(self._forget(pod))

    def find_log(
        self, namespace: str, name: str, container: str, previous: bool
    ) -> tuple[Path, Callable[[], bool]] | None:
        """A container's log, and whether it still grows."""
        for pod in self._pods.values():
            if (pod.namespace, pod.name) == (namespace, name):
                for one in [*pod.inits, *pod.containers]:
                    log = pod.log(container, one.restarts - previous)
                    if one.name == container and log.exists():
                        return log, lambda one=one: not previous and one.pid is not None
        return None

    def services_changed(self) -> None:
        """Tells every pod, and the processes beside them, the names of the Services."""
        text = "127.0.0.1 localhost\n" + self._node.services.hosts("default")
        write_in_place(self._hosts, text)
        for pod in self._pods.values():
            pod.write_hosts()

    async def _forget(self, pod: Pod) -> None:
        await pod.over.wait()
        self._pods.pop(pod.uid, None)

    def _address(self) -> str:
        """The next address of the pod range; it is used once in the life of the node."""
        self._addresses += 1
        start = self._node.address.rsplit(".", 2)[0]
        return f"{start}.{self._addresses // 250}.{self._addresses % 250 + 2}"

    async def _register(self) -> None:
        node = self._node
        labels = {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux"}
        labels["kubernetes.io/arch"] = "amd64"
        meta = {"name": node.name, "labels": labels}
        document = {"apiVersion": "v1", "kind": "Node", "metadata": meta}
        await allow(node.api.call("POST", "/api/v1/nodes", document), 409)
        await self._report()

    async def _report(self) -> None:
        node = self._node
        ready: Object = {"type": "Ready", "status": "True", "reason": "ProcessNode"}
        ready |= {"lastHeartbeatTime": _now(), "lastTransitionTime": self._since}
        kinds = {"InternalIP": node.address, "Hostname": node.name}
        status: Object = {
            "conditions": [ready],
            "capacity": node.capacity,
            "allocatable": node.capacity,
            "addresses": [{"type": kind, "address": value} for kind, value in kinds.items()],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": logs.PORT}},
            "nodeInfo": {
                **{name: "process-node" for name in (*INFO, "containerRuntimeVersion")},
                **{"kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64"},
            },
        }
        path = f"/api/v1/nodes/{node.name}"
        body = {"status": status}
        await node.api.call("PATCH", f"{path}/status", body, "application/merge-patch+json")
        lease: Object = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": node.name},
            "spec": {
                "holderIdentity": node.name,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        await node.api.apply(f"{LEASES}/{node.name}", lease, "process-node")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                await self._report()
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                print(f"heartbeat: {error}", flush=True)

    def _watch(self, path: str, handle: Callable[[str, Object], None], **parameters: str) -> None:
        self._start(self._node.api.watch(path, handle, **parameters))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

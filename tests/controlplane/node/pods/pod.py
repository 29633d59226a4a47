"""One pod on this node: from being bound to it until its processes and its object are gone."""

import asyncio
import contextlib
import shutil
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from controlplane.client.api_client import ApiClient, ApiError
from controlplane.client.objects import Object
from controlplane.node.images import Image, Images
from controlplane.node.pods import environment
from controlplane.node.pods.container import Container
from controlplane.node.pods.sandbox import Sandbox
from controlplane.node.pods.sources import MissingSource, Sources
from controlplane.node.pods.volumes import Volumes
from controlplane.node.services import Services, write_in_place

RETRY_SECONDS, LAST_SECONDS = 1.0, 5.0


@dataclass(frozen=True)
class Node:
    """What the pods of one node share. `refresh` and `delay_scale` make the waits of a kubelet
    shorter: seconds between two looks at ConfigMaps, and the factor of the restart back-off."""

    api: ApiClient
    name: str
    address: str
    bridge: str
    capacity: dict[str, str]
    images: Images
    services: Services
    scratch: Path
    logs: Path
    refresh: float
    delay_scale: float


class Pod:
    """Runs from its creation on; `end` ends it, and `over` tells when that has happened."""

    def __init__(self, node: Node, document: Object, address: str) -> None:
        self._node, self.document = node, document
        meta = document["metadata"]
        self.namespace, self.name, self.uid = meta["namespace"], meta["name"], meta["uid"]
        self.spec: Object = document["spec"]
        self.folder = node.scratch / "pods" / self.uid
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        self.address, self.stopping, self.delay_scale = "", False, node.delay_scale
        self._account = self.spec.get("serviceAccountName", "default")
        self._fields = environment.Fields(document, node.name, node.address, node.capacity)
        self._sources = Sources(node.api, self.namespace, self.name, self.uid, self._account)
        volumes = self.folder / "volumes"
        self._volumes = Volumes(node.api, document, volumes, self._fields, self._sources)
        hostname = self.spec.get("hostname") or self.name
        self._sandbox = Sandbox(hostname, address, node.address, node.bridge)
        self.inits = [Container(self, one, True) for one in self.spec.get("initContainers", [])]
        self.containers = [Container(self, one) for one in self.spec["containers"]]
        self._phase, self._began = "Pending", _now()
        self._conditions: dict[str, Object] = {}
        self._dirty = asyncio.Event()
        self._reporter = asyncio.create_task(self._report_always())
        self._life = asyncio.create_task(self._live())
        self._helpers: list[asyncio.Task[Any]] = []
        self.over = asyncio.Event()

    # --- what its containers need of it ---

    def image(self, name: str) -> Image | None:
        return self._node.images.find(name)

    def log(self, container: str, restarts: int) -> Path:
        return self._node.logs / f"{self.namespace}_{self.name}_{container}_{restarts}.log"

    def holder(self) -> int:
        return self._sandbox.holder

    def grace(self) -> float:
        standard = self.spec.get("terminationGracePeriodSeconds", 30)
        return float(self.document["metadata"].get("deletionGracePeriodSeconds", standard))

    def changed(self) -> None:
        self._dirty.set()

    def mounts(self, container: Object, env: dict[str, str]) -> list[tuple[Path, str, bool]]:
        """Source, target and whether it is read only, the outer ones first."""
        own = [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")]
        own.append(("hostname", "/etc/hostname"))
        mounts = [(self.folder / name, target, False) for name, target in own]
        for mount in sorted(container.get("volumeMounts", []), key=lambda one: one["mountPath"]):
            source = self._volumes.source(mount, env)
            mounts.append((source, mount["mountPath"], bool(mount.get("readOnly"))))
        return mounts

    async def environment(self, container: Object, image: Image) -> dict[str, str]:
        links = self.spec.get("enableServiceLinks", True)
        services = self._node.services.services.values()
        base = {**image.environment, "HOSTNAME": self._sandbox.hostname}
        base |= environment.of_services(services, self.namespace, links)
        return await environment.of_container(container, self._fields, self._sources, base)

    def event(self, kind: str, reason: str, message: str, container: str = "") -> None:
        """Writes an event about this pod; nothing depends on it."""
        about: Object = {"apiVersion": "v1", "kind": "Pod", "name": self.name, "uid": self.uid}
        about["namespace"] = self.namespace
        if container:
            about["fieldPath"] = f"spec.containers{{{container}}}"
        event: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{self.name}.", "namespace": self.namespace},
            "involvedObject": about,
            "type": kind,
            "reason": reason,
            "message": message[:1000],
            "source": {"component": "process-node", "host": self._node.name},
            **{name: _now() for name in ("firstTimestamp", "lastTimestamp")},
            "count": 1,
        }
        self._help(self._send(f"/api/v1/namespaces/{self.namespace}/events", event))

    # --- the life of the pod ---

    def write_hosts(self) -> None:
        """The pod's /etc/hosts, again whenever Services or their endpoints change."""
        text = "127.0.0.1 localhost\n::1 localhost\n"
        if self.address:
            text += f"{self.address} {self._sandbox.hostname}\n"
        for alias in self.spec.get("hostAliases", []):
            text += f"{alias['ip']} {' '.join(alias['hostnames'])}\n"
        write_in_place(self.folder / "hosts", text + self._node.services.hosts(self.namespace))

    def update(self, document: Object) -> None:
        """Takes the changed object; its deletion ends the pod within its grace period."""
        self.document = self._fields.pod = document
        if document["metadata"].get("deletionTimestamp"):
            self.end(self.grace())

    def end(self, grace: float) -> None:
        """Begins the end, once; a later call with a shorter grace makes it shorter."""
        if not self.stopping:
            self.stopping = True
            self._help(self._end(grace))
        elif grace == 0:
            for container in [*self.inits, *self.containers]:
                self._help(container.kill(0))

    async def _live(self) -> None:
        try:
            await self._set_up()
            code = await self._initialise()
            if code and not self.stopping:
                self._phase = "Failed"
            if code or self.stopping:
                return self.changed()
            for container in self.containers:
                container.state = {"waiting": {"reason": "ContainerCreating"}}
            self._phase = "Running"
            codes = await asyncio.gather(*(one.run() for one in self.containers))
            if not self.stopping:
                await asyncio.gather(*(one.kill(self.grace()) for one in self.inits))
                self._phase = "Failed" if any(codes) else "Succeeded"
            self.changed()
        except Exception as error:
            traceback.print_exc()
            self.event("Warning", "Failed", str(error))
            for container in [*self.inits, *self.containers]:
                container.state = {
                    "waiting": {"reason": "RunContainerError", "message": str(error)}
                }
            self.changed()

    async def _set_up(self) -> None:
        search = f"{self.namespace}.svc.cluster.local svc.cluster.local cluster.local"
        (self.folder / "resolv.conf").write_text(f"search {search}\noptions ndots:5\n")
        (self.folder / "hostname").write_text(f"{self._sandbox.hostname}\n")
        self.changed()
        told = ""
        while True:
            try:
                await self._volumes.prepare()
                break
            except (MissingSource, ApiError, aiohttp.ClientError) as error:
                if told != str(error):
                    told = str(error)
                    self.event("Warning", "FailedMount", told)
                await asyncio.sleep(RETRY_SECONDS)
        await self._sandbox.open()
        self.address = self._fields.address = self._sandbox.address
        self.write_hosts()
        self.changed()
        self._help(self._refresh())

    async def _initialise(self) -> int:
        """Runs the init containers one after another; the code of the one that failed, or 0."""
        for container in self.inits:
            if container.sidecar:
                self._help(container.run())
                while not container.started and not self.stopping:
                    await asyncio.sleep(0.05)
            elif code := await container.run():
                return code
            if self.stopping:
                break
        return 0

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._node.refresh)
            try:
                await self._volumes.refresh()
            except (MissingSource, ApiError, aiohttp.ClientError, OSError) as error:
                print(f"{self.namespace}/{self.name}: refresh: {error}", flush=True)

    async def _end(self, grace: float) -> None:
        await asyncio.gather(*(one.kill(grace) for one in self.containers))
        await asyncio.gather(*(one.kill(0 if grace == 0 else 2) for one in self.inits))
        # What waits for an image, a volume or a back-off need not be waited for.
        running = any(one.pid for one in [*self.inits, *self.containers])
        await asyncio.wait([self._life], timeout=LAST_SECONDS if running else 0.05)
        self._life.cancel()
        await asyncio.wait([self._life])
        if self._phase not in ("Succeeded", "Failed"):
            ended = [one.state.get("terminated", {}).get("exitCode", 1) for one in self.containers]
            self._phase = "Failed" if any(ended) else "Succeeded"
        await self._sandbox.close()
        self._reporter.cancel()
        with contextlib.suppress(ApiError, aiohttp.ClientError, OSError, TimeoutError):
            await self._report()
        while self.document["metadata"].get("deletionTimestamp"):
            try:
                await self._node.api.delete(self._path, self.uid, grace=0)
                break
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                print(f"{self.namespace}/{self.name}: {error}", flush=True)
                await asyncio.sleep(RETRY_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.over.set()
        for task in self._helpers:
            if task is not asyncio.current_task():
                task.cancel()

    # --- its status ---

    @property
    def _path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    async def _report_always(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._report()
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                print(f"{self.namespace}/{self.name}: report: {error}", flush=True)
                await asyncio.sleep(RETRY_SECONDS)
                self._dirty.set()

    async def _report(self) -> None:
        api, node = self._node.api, self._node
        phase, created = self._phase, [one for one in self.containers if one.status()["imageID"]]
        if phase == "Running" and not created:
            phase = "Pending"
        status: Object = {
            "phase": phase,
            "startTime": self._began,
            "hostIP": node.address,
            "hostIPs": [{"ip": node.address}],
            "conditions": self._all_conditions(phase),
            "containerStatuses": [one.status() for one in self.containers],
            "qosClass": self.document.get("status", {}).get("qosClass", "Burstable"),
        }
        if self.inits:
            status["initContainerStatuses"] = [one.status() for one in self.inits]
        if self.address:
            status |= {"podIP": self.address, "podIPs": [{"ip": self.address}]}
        await api.patch_status(self._path, self.uid, status)

    def _all_conditions(self, phase: str) -> list[Object]:
        done = all(one.started or one.ready for one in self.inits)
        initialised = done or phase in ("Running", "Succeeded")
        ready = phase == "Running" and all(one.ready for one in self.containers)
        ready = ready and not self.stopping
        wanted = {"PodReadyToStartContainers": bool(self.address), "Initialized": initialised}
        wanted |= {"ContainersReady": ready, "Ready": ready}
        for kind, holds in wanted.items():
            if self._conditions.get(kind, {}).get("status") != str(holds):
                condition = {"type": kind, "status": str(holds), "lastTransitionTime": _now()}
                if not holds:
                    reason = "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"
                    condition["reason"] = reason
                self._conditions[kind] = condition
        others = self.document.get("status", {}).get("conditions", [])
        kept = [one for one in others if one["type"] not in wanted]
        return [*kept, *self._conditions.values()]

    def _help(self, work: Coroutine[Any, Any, Any]) -> None:
        self._helpers = [task for task in self._helpers if not task.done()]
        self._helpers.append(asyncio.create_task(work))

    async def _send(self, path: str, document: Object) -> None:
        with contextlib.suppress(ApiError, aiohttp.ClientError, OSError, TimeoutError):
            await self._node.api.call("POST", path, document)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

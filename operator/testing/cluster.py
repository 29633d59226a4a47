"""What Kubernetes and KubeRay would do with our objects: pods that end, volumes that bind, services
that answer. Each is one small reaction to a change, with knobs for what may go wrong.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from calotype.operator.kube.labels import TRAINING
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CLAIMS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    JOBS,
    NAMESPACES,
    PODS,
    RAY_CLUSTERS,
    RAY_JOBS,
    RAY_SERVICES,
    SECRETS,
    Resource,
)
from calotype.operator.runtime.fetch_runner import JOB_NAME
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.operator.testing.modelapps import FakeModelApps
from calotype.operator.testing.objects import Change
from calotype.serving.wire.document import JsonObject

Result = JsonObject
"""`wire.fetch_result` as JSON."""


def good_fetch(config: Manifest) -> Result:
    """What a fetch Job says of a file that is as it should be; the same source, the same digest."""
    digest = hashlib.sha256(json.dumps(config["source"], sort_keys=True).encode()).hexdigest()
    kind = f"{config['kind']}s"
    path = f"{config['cacheDir']}/{kind}/{config['namespace']}/{config['name']}/{digest[:40]}"
    found: Result = {
        "ok": True,
        "resolvedRevision": digest[:40],
        "sha256": digest,
        "sizeBytes": 123_456,
        "path": path,
    }
    if config["kind"] == "adapter":
        found |= {"rank": 8, "targetModules": ["attn.to_k", "attn.to_q"], "path": f"{path}/a.st"}
    return found


class FakeCluster:
    """Reacts to what happens at a `FakeApiServer`."""

    def __init__(
        self, server: FakeApiServer, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.server, self._sleep = server, sleep
        self.apps = FakeModelApps(server)
        self.fetch: Callable[[Manifest], Result | str] = good_fetch
        """Config -> termination message, or a reason of the kubelet such as OOMKilled."""
        self.unbindable: set[str] = set()
        """StorageClasses without volumes."""
        self.hold_jobs = False
        """Jobs stay as they are while it is set."""
        self.training: Callable[[str], str] = lambda name: "SUCCEEDED"
        self.started_jobs: list[str] = []
        self._later: set[asyncio.Task[None]] = set()
        self.server.objects.listeners.append(self._react)

    def namespace(self, name: str, labels: dict[str, str] | None = None) -> str:
        metadata: Manifest = {"name": name, "labels": labels or {}}
        self.server.objects.create(NAMESPACES, {"metadata": metadata})
        return name

    async def close(self) -> None:
        for task in list(self._later):
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)

    def resume_jobs(self) -> None:
        """Lets the Jobs run that were held."""
        self.hold_jobs = False
        for job in list(self.server.objects.all(JOBS).values()):
            self._start(self._run_job(job))

    # --- reactions ------------------------------------------------------------------------------

    def _react(self, change: Change) -> None:
        resource, obj = change.resource, change.obj
        if change.type == "DELETED":
            self.apps.gone(resource, obj)
            return
        if resource in (DEPLOYMENTS, RAY_SERVICES):
            self._start(self._run_service(resource, obj))
        if resource == RAY_CLUSTERS or resource == CONFIG_MAPS:
            self.apps.configured(resource, obj)
        if change.type != "ADDED":
            if resource == RAY_JOBS:
                self._start(self._run_training(obj))
            return
        if resource == JOBS:
            self.started_jobs.append(obj["metadata"]["name"])
            self._start(self._run_job(obj))
        elif resource == CLAIMS:
            self._start(self._bind(obj))
        elif resource == RAY_JOBS:
            self._start(self._run_training(obj))

    @property
    def busy(self) -> bool:
        """Whether something that was begun has not ended."""
        return bool(self._later)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            work.close()
            return
        task = loop.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _bind(self, claim: Manifest) -> None:
        bound = claim["spec"].get("storageClassName") not in self.unbindable
        self._status(CLAIMS, claim, {"phase": "Bound" if bound else "Pending"})

    async def _run_job(self, job: Manifest) -> None:
        metadata = job["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        spec = job["spec"]["template"]["spec"]
        container = spec["containers"][0]
        config = await self._config(job)
        if config is None or self.hold_jobs:
            return
        result = self.fetch(config)
        if not await self._secrets(job, container):
            return
        if self.server.objects.find(JOBS, namespace, name) is None:
            return
        pod = {
            "metadata": {
                "name": f"{name}-pod",
                "namespace": namespace,
                "labels": {JOB_NAME: name},
                "ownerReferences": [{"kind": "Job", "name": name, "uid": metadata["uid"]}],
            },
            "spec": spec,
        }
        if self.server.objects.find(PODS, namespace, f"{name}-pod") is not None:
            return
        made = self.server.objects.create(PODS, pod)
        failed = isinstance(result, str) or not result["ok"]
        ended: Manifest = {
            "exitCode": int(failed),
            "reason": "Error" if failed else "Completed",
        }
        if isinstance(result, str):
            ended |= {"exitCode": 137, "reason": result}
        else:
            ended["message"] = json.dumps(result)
        state = {"name": "fetch", "state": {"terminated": ended}}
        phase = "Failed" if failed else "Succeeded"
        self._status(PODS, made, {"phase": phase, "containerStatuses": [state]})
        condition = {"type": "Failed" if failed else "Complete", "status": "True"}
        self._status(JOBS, job, {"conditions": [condition]})

    async def _config(self, job: Manifest) -> Manifest | None:
        """fetch.json, as soon as somebody has made it; None = the Job is gone."""
        metadata = job["metadata"]
        while True:
            found = self.server.objects.find(CONFIG_MAPS, metadata["namespace"], metadata["name"])
            if found is not None:
                loaded: Manifest = json.loads(found["data"]["fetch.json"])
                return loaded
            if self.server.objects.find(JOBS, metadata["namespace"], metadata["name"]) is None:
                return None
            await self._sleep(0.02)

    async def _secrets(self, job: Manifest, container: Manifest) -> bool:
        """Waits for the Secrets that the container reads, as the kubelet does; False = the Job is
        gone."""
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        refs = [(v.get("valueFrom") or {}).get("secretKeyRef") for v in container.get("env", [])]
        while not all(self._secret_has(namespace, ref) for ref in refs if ref is not None):
            if self.server.objects.find(JOBS, namespace, name) is None:
                return False
            await self._sleep(0.02)
        return True

    def _secret_has(self, namespace: str, ref: Manifest) -> bool:
        secret = self.server.objects.find(SECRETS, namespace, ref["name"])
        return secret is not None and ref["key"] in secret["data"]

    async def _run_service(self, resource: Resource, obj: Manifest) -> None:
        await asyncio.sleep(0)
        self.apps.configured(resource, obj)
        if resource == DEPLOYMENTS:
            replicas = obj["spec"]["replicas"]
            self._status(DEPLOYMENTS, obj, {"replicas": replicas, "readyReplicas": replicas})
            return
        if obj["spec"].get("suspend"):
            return
        self._ray_cluster(obj)
        applications = json.loads(obj["spec"]["serveConfigV2"])["applications"]
        running = {a["name"]: {"status": "RUNNING"} for a in applications}
        status = {
            "conditions": [{"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}],
            "activeServiceStatus": {"applicationStatuses": running},
        }
        self._status(RAY_SERVICES, obj, status)

    def _ray_cluster(self, service: Manifest) -> None:
        """As KubeRay: made once, and not changed with the bounds of replicas."""
        metadata = service["metadata"]
        name = f"{metadata['name']}-abcde"
        if self.server.objects.find(RAY_CLUSTERS, metadata["namespace"], name) is not None:
            return
        owner = {"kind": "RayService", "name": metadata["name"], "uid": metadata["uid"]}
        self.server.objects.create(
            RAY_CLUSTERS,
            {
                "metadata": {
                    "name": name,
                    "namespace": metadata["namespace"],
                    "labels": {
                        "ray.io/originated-from-cr-name": metadata["name"],
                        "ray.io/originated-from-crd": "RayService",
                    },
                    "ownerReferences": [owner],
                },
                "spec": copy.deepcopy(service["spec"]["rayClusterConfig"]),
            },
        )

    async def _run_training(self, job: Manifest) -> None:
        if (job.get("status") or {}).get("jobStatus"):
            return
        if job["spec"].get("suspend"):
            self._status(RAY_JOBS, job, {"jobDeploymentStatus": "Suspended"})
            return
        ended = self.training(job["metadata"]["labels"][TRAINING])
        if ended == "RUNNING":
            self._status(RAY_JOBS, job, {"jobDeploymentStatus": "Running"})
            return
        status = {"jobDeploymentStatus": "Complete", "jobStatus": ended}
        if ended == "FAILED":
            status |= {"jobDeploymentStatus": "Failed", "message": "loss is NaN"}
        self._status(RAY_JOBS, job, status)

    def _status(self, resource: Resource, obj: Manifest, status: Manifest) -> None:
        metadata = obj["metadata"]
        live = self.server.objects.find(resource, metadata.get("namespace", ""), metadata["name"])
        if live is None or live["metadata"]["uid"] != metadata["uid"]:
            return
        changed = copy.deepcopy(live)
        changed["status"] = status
        self.server.objects.replace(resource, changed)

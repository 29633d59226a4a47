"""RayJob: a Ray cluster for one job, a Job of Kubernetes that submits it, and its result."""

import copy
import json
import shlex

import aiohttp
import yaml
from controlplane.client.objects import Object
from controlplane.kuberay import pods as build
from controlplane.kuberay.conditions import holds, now, seconds_since
from controlplane.kuberay.dashboard import Dashboard
from controlplane.kuberay.objects import Objects, has_finalizer, suffix
from controlplane.kuberay.rayclusters import of_type
from controlplane.kuberay.services import head_service

FINALIZER = "ray.io/rayjob-finalizer"
ENDED = ("Complete", "Failed")
SUBMITTER = "ray-job-submitter"
SUBMIT = """
until wget --tries 1 -T 2 -q -O- {url}/api/gcs_healthz | grep success >/dev/null; do sleep 2; done
if ! ray job status --address {url} {job} >/dev/null 2>&1; then
  ray job submit --address {url} --no-wait {options} --submission-id {job} -- {entrypoint}
fi
ray job logs --address {url} --follow {job}
"""


class RayJobs:
    """Reconciles RayJobs: Initializing, Running, then Complete or Failed."""

    def __init__(self, objects: Objects, session: aiohttp.ClientSession) -> None:
        self._objects, self._session = objects, session

    async def reconcile(self, job: Object) -> None:
        """One round."""
        if "deletionTimestamp" in job["metadata"]:
            return await self._objects.drop_finalizer(job, FINALIZER)
        if not has_finalizer(job, FINALIZER):
            return await self._objects.add_finalizer(job, FINALIZER)
        status = copy.deepcopy(job.get("status", {}))
        status["observedGeneration"] = job["metadata"]["generation"]
        phase = status.get("jobDeploymentStatus", "")
        if job["spec"].get("suspend") and phase not in ENDED:
            await self._clear(job)
            status = {"jobDeploymentStatus": "Suspended", "jobStatus": ""}
        elif phase in ("", "Suspended", "Retrying"):
            self._begin(job, status)
        elif phase in ENDED:
            await self._clean_up(job, status)
        elif self._late(job, status):
            self._end(status, "Failed", "DeadlineExceeded", "the job took too long")
        elif phase == "Initializing":
            await self._initialise(job, status)
        else:
            await self._follow(job, status)
        await self._objects.write_status(job, status)

    def _begin(self, job: Object, status: Object) -> None:
        name = job["metadata"]["name"]
        status["jobDeploymentStatus"] = "Initializing"
        status["jobStatus"] = ""
        status["jobId"] = job["spec"].get("jobId") or f"{name}-{suffix()}"
        status["startTime"] = now()
        chosen = (job["spec"].get("clusterSelector") or {}).get("ray.io/cluster")
        status["rayClusterName"] = chosen or f"{name}-{suffix()}"
        for gone in ("endTime", "reason", "message"):
            status.pop(gone, None)

    async def _initialise(self, job: Object, status: Object) -> None:
        """Waits until every pod of the cluster is ready; then Service and submitter are made."""
        meta = job["metadata"]
        cluster = await self._objects.find(
            "RayCluster", meta["namespace"], status["rayClusterName"]
        )
        if cluster is None:
            if "clusterSelector" not in job["spec"]:
                await self._objects.create(_cluster(job, status["rayClusterName"]))
            return
        if cluster.get("status", {}).get("state") != "ready":
            return
        cluster |= {"apiVersion": "ray.io/v1", "kind": "RayCluster"}
        await self._objects.ensure(head_service(cluster, job))
        url = Dashboard(self._session, meta["namespace"], cluster["metadata"]["name"]).url
        status["dashboardURL"] = url.removeprefix("http://")
        if job["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode":
            heads = of_type(await self._objects.pods(cluster), "head")
            if await self._objects.submitter(job) is None and heads:
                await self._objects.create(submitter(job, url, status["jobId"], heads[0]))
        status["jobDeploymentStatus"], status["jobStatus"] = "Running", "PENDING"

    async def _follow(self, job: Object, status: Object) -> None:
        """Asks the head how the job does; an error ends the round."""
        namespace = job["metadata"]["namespace"]
        head = Dashboard(self._session, namespace, status["rayClusterName"])
        record = await head.job(status["jobId"])
        batch = await self._objects.submitter(job)
        submitted = (batch or {}).get("status", {})
        if record is None:
            if holds(submitted, "Failed"):
                self._end(status, "Failed", "SubmissionFailed", "the submitter failed")
            return
        status["jobStatus"], status["message"] = record["status"], record.get("message") or ""
        # The submitter still shows the job's log, which ends with the cluster.
        if batch and not (holds(submitted, "Complete") or holds(submitted, "Failed")):
            return
        if record["status"] == "SUCCEEDED":
            self._end(status, "Complete", "", status["message"])
        elif record["status"] in ("FAILED", "STOPPED"):
            failures = status.get("failed", 0) + 1
            status["failed"] = failures
            if failures <= job["spec"].get("backoffLimit", 0):
                await self._clear(job)
                status["jobDeploymentStatus"] = "Retrying"
            else:
                self._end(status, "Failed", "AppFailed", status["message"])

    async def _clean_up(self, job: Object, status: Object) -> None:
        """Deletes the cluster of a job that ended, where that is wanted and when it is time."""
        if job["spec"].get("shutdownAfterJobFinishes"):
            waited = seconds_since(status["endTime"])
            if waited >= job["spec"].get("ttlSecondsAfterFinished", 0):
                for cluster in await self._objects.children("RayCluster", job):
                    await self._objects.delete(cluster)

    async def _clear(self, job: Object) -> None:
        for cluster in await self._objects.children("RayCluster", job):
            await self._objects.delete(cluster)
        if batch := await self._objects.submitter(job):
            await self._objects.delete(batch)

    @staticmethod
    def _late(job: Object, status: Object) -> bool:
        limit = job["spec"].get("activeDeadlineSeconds")
        return bool(limit) and seconds_since(status["startTime"]) > limit

    @staticmethod
    def _end(status: Object, phase: str, reason: str, message: str) -> None:
        status["jobDeploymentStatus"], status["endTime"] = phase, now()
        status["message"] = message
        if reason:
            status["reason"] = reason


def submitter(job: Object, url: str, name: str, head: Object) -> Object:
    """The Job of Kubernetes that gives the job to the head and then shows its log."""
    meta, spec = job["metadata"], job["spec"]
    template = copy.deepcopy(spec.get("submitterPodTemplate") or {"spec": {"containers": [{}]}})
    container = template["spec"]["containers"][0]
    ray = build.ray_container(head)
    container.setdefault("name", SUBMITTER)
    container.setdefault("image", ray["image"])
    limits = {"cpu": "1", "memory": "1Gi"}
    container.setdefault("resources", {"limits": limits, "requests": {"cpu": "500m"}})
    options = ""
    if text := spec.get("runtimeEnvYAML"):
        options += f" --runtime-env-json {shlex.quote(json.dumps(yaml.safe_load(text)))}"
    if table := spec.get("metadata"):
        options += f" --metadata-json {shlex.quote(json.dumps(table))}"
    if "command" not in container:
        script = SUBMIT.format(url=url, job=name, options=options, entrypoint=spec["entrypoint"])
        container |= {"command": ["/bin/bash", "-ce", "--"], "args": [script]}
    container.setdefault("env", []).append({"name": "RAY_JOB_SUBMISSION_ID", "value": name})
    template["spec"].setdefault("restartPolicy", "Never")
    backoff = (spec.get("submitterConfig") or {}).get("backoffLimit", 2)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "labels": {"ray.io/originated-from-cr-name": meta["name"]}
            | {"ray.io/originated-from-crd": "RayJob"},
            "ownerReferences": [build.owner(job)],
        },
        "spec": {"backoffLimit": backoff, "template": template},
    }


def _cluster(job: Object, name: str) -> Object:
    meta = job["metadata"]
    labels = {"ray.io/originated-from-cr-name": meta["name"]}
    labels["ray.io/originated-from-crd"] = "RayJob"
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {**meta.get("labels", {}), **labels},
            "ownerReferences": [build.owner(job)],
        },
        "spec": copy.deepcopy(job["spec"]["rayClusterSpec"]),
    }

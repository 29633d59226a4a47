"""The Job that fetches and checks weights on a CPU, and what it reports.

A Job's name is made of what it does: the same object, source, Secret and attempt have the same
name, so that an operator that was killed finds its Job again instead of starting another one. The
result travels in the container's termination message.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from calotype.operator.api.conditions import Reason, moment
from calotype.operator.kube.labels import (
    ATTEMPT,
    FINGERPRINT,
    OWNER_UID,
    digest,
    labels,
    owner_reference,
    short_name,
)
from calotype.operator.manifests.pods import (
    ADAPTER_SOURCE_DIR,
    CACHE_DIR,
    DATA_DIR,
    Volumes,
    base_pod,
    container_security,
    from_secret,
    mounts,
    pod_volumes,
)
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import CREDENTIAL_KEYS

CONFIG_DIR = "/etc/calotype/fetch"
KEEP_SECONDS = 3600
"""A finished Job is kept so long, for whoever wants to read its log."""
START_SECONDS = 120
"""A Job without a pod for longer has been refused one."""
FINAL_REASONS = frozenset(
    {
        "NotSafetensors",
        "BadHeader",
        "WrongBaseModel",
        "RankTooHigh",
        "TooLarge",
        "ChecksumMismatch",
        "UnknownKeys",
        "WrongDtype",
        "LicenceNotAllowed",
        "NotFound",
        "SourceInvalid",
    }
)
"""Faults of the file or of the manifest: trying again would change nothing."""
FETCHED_SOURCES = ("huggingFace", "s3", "http")


@dataclass(frozen=True, slots=True)
class FetchTask:
    """What one Job shall do."""

    kind: Literal["adapter", "model"]
    owner: Mapping[str, Any]
    """The custom resource whose weights are fetched."""
    namespace: str
    """Where the Job runs: the model's namespace, for its cache volume is there."""
    model: str
    source: Mapping[str, Any]
    """``spec.source`` as JSON."""
    fingerprint: str
    attempt: int
    sha256: str | None = None
    max_bytes: int | None = None
    max_rank: int | None = None
    base: Mapping[str, Any] | None = None
    """The rendered ImageModel that an adapter is checked against."""
    credentials: str | None = None
    """Name of the Secret in the owner's namespace."""
    job_owner: Mapping[str, Any] | None = None
    """What the Job dies with where the owner is in another namespace."""

    @property
    def job_name(self) -> str:
        metadata = self.owner["metadata"]
        suffix = digest([metadata["uid"], self.fingerprint, self.attempt], 10)
        return short_name("fetch", metadata["name"], suffix)

    @property
    def crosses_namespaces(self) -> bool:
        return bool(self.namespace != self.owner["metadata"]["namespace"])

    @property
    def source_type(self) -> str:
        return next(iter(self.source))

    @property
    def secret(self) -> str | None:
        """Name of the Secret that the Job's container reads."""
        return self.job_name if self.credentials and self.crosses_namespaces else self.credentials


def build_job(task: FetchTask, volumes: Volumes, settings: OperatorSettings) -> dict[str, Any]:
    """The Job. Its ConfigMap and its copy of the Secret belong to it: `build_config`."""
    metadata = task.owner["metadata"]
    own = {"model": task.model}
    if task.kind == "adapter":
        own |= {"adapter": metadata["name"], "adapter_namespace": metadata["namespace"]}
    known = labels(settings, "fetch", **own)
    environment = [
        {"name": "CALOTYPE_DATA_DIR", "value": DATA_DIR},
        {"name": "HOME", "value": "/tmp"},
    ]
    if task.secret:
        keys = CREDENTIAL_KEYS.get(task.source_type, ())
        environment += [from_secret(key, task.secret, key) for key in keys]
    container = {
        "name": "fetch",
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "command": ["calotype", "fetch", task.kind],
        "args": ["--config", f"{CONFIG_DIR}/fetch.json"],
        "env": environment,
        "resources": settings.fetch_resources,
        "securityContext": container_security(settings),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "volumeMounts": [
            *mounts(volumes),
            {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        ],
    }
    config = {"name": "config", "configMap": {"name": task.job_name}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": task.job_name,
            "namespace": task.namespace,
            "labels": known,
            "annotations": {
                FINGERPRINT: task.fingerprint,
                ATTEMPT: str(task.attempt),
                OWNER_UID: metadata["uid"],
            },
            "ownerReferences": [owner_reference(task.job_owner or task.owner)],
        },
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": settings.fetch_seconds,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "template": {
                "metadata": {"labels": known},
                "spec": {
                    **base_pod(settings, None),
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [*pod_volumes(volumes), config],
                },
            },
        },
    }


def build_config(task: FetchTask, job: Mapping[str, Any]) -> dict[str, Any]:
    """The ConfigMap with fetch.json; it dies with the Job."""
    metadata = task.owner["metadata"]
    document = {
        "kind": task.kind,
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "source": task.source,
        "sha256": task.sha256,
        "cacheDir": CACHE_DIR,
        "maxBytes": task.max_bytes,
        "maxRank": task.max_rank,
        "model": task.base,
        "volumeDir": (ADAPTER_SOURCE_DIR if task.source_type == "persistentVolumeClaim" else None),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _beside(job),
        "data": {"fetch.json": json.dumps(document)},
    }


def build_secret_copy(
    task: FetchTask, job: Mapping[str, Any], secret: Mapping[str, Any]
) -> dict[str, Any]:
    """The credentials of another namespace, for this Job alone; they die with it."""
    keys = CREDENTIAL_KEYS.get(task.source_type, ())
    data = secret.get("data") or {}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _beside(job),
        "type": "Opaque",
        "data": {key: data[key] for key in keys if key in data},
    }


def _beside(job: Mapping[str, Any]) -> dict[str, Any]:
    metadata = job["metadata"]
    owner = {**job, "apiVersion": "batch/v1", "kind": "Job"}
    return {
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "labels": metadata["labels"],
        "ownerReferences": [owner_reference(owner)],
    }


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a Job found and left on the volume."""

    revision: str
    sha256: str
    size_bytes: int
    path: str
    rank: int | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a Job failed; ``final`` ones are not tried again until something changes."""

    reason: str
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class FetchRunning:
    """A Job that has not ended."""

    reason: Reason
    message: str


Outcome = Fetched | FetchFailure | FetchRunning


def read_outcome(
    job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], now: datetime.datetime
) -> Outcome:
    """What became of a Job, by its conditions and its pod's termination message."""
    ended = _condition(job, "Complete") or _condition(job, "Failed")
    pod = max(pods, key=lambda p: p["metadata"].get("creationTimestamp") or "", default=None)
    terminated = _terminated(pod)
    if terminated is not None:
        told = _told(terminated.get("message"))
        if told is not None:
            return told
        if ended or _phase(pod) in ("Failed", "Succeeded"):
            return _silent(terminated)
    if ended is None:
        return _waiting(job, pod, now)
    if ended.get("reason") == "DeadlineExceeded":
        return FetchFailure(
            Reason.FETCH_TIMED_OUT,
            f"Fetching took longer than {job['spec'].get('activeDeadlineSeconds')} s.",
        )
    said = ended.get("message") or ended.get("reason") or "no pod"
    return FetchFailure(Reason.FETCH_FAILED, f"The Job ended without a result: {said}")


def _told(message: str | None) -> Outcome | None:
    """What a termination message says; None where the container wrote none of ours."""
    try:
        told = json.loads(message or "")
        if not told["ok"]:
            reason = str(told["reason"])
            return FetchFailure(reason, str(told["message"]), reason in FINAL_REASONS)
        return Fetched(
            revision=str(told["resolvedRevision"]),
            sha256=str(told["sha256"]),
            size_bytes=int(told["sizeBytes"]),
            path=str(told["path"]),
            rank=told.get("rank"),
            target_modules=tuple(told.get("targetModules") or ()),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _silent(terminated: Mapping[str, Any]) -> FetchFailure:
    """A container that ended without a word."""
    if terminated.get("reason") == "OOMKilled":
        return FetchFailure(
            Reason.FETCH_KILLED,
            "The fetch was killed for memory: raise the memory limit of fetch Jobs "
            "(fetchResources), or give a smaller file.",
        )
    return FetchFailure(
        Reason.FETCH_FAILED,
        f"The fetch ended with exit code {terminated.get('exitCode')} "
        f"({terminated.get('reason') or 'no reason'}) and without a result.",
    )


def _waiting(
    job: Mapping[str, Any], pod: Mapping[str, Any] | None, now: datetime.datetime
) -> FetchRunning:
    name = job["metadata"]["name"]
    if pod is None:
        made = moment(job["metadata"].get("creationTimestamp")) or now
        if (now - made).total_seconds() > START_SECONDS:
            return FetchRunning(
                Reason.FETCH_NOT_STARTED,
                f"Job {name} has no pod; `kubectl describe job {name}` says why (a quota, or an "
                "admission policy).",
            )
        return FetchRunning(Reason.FETCHING, f"Job {name} starts.")
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            return FetchRunning(
                Reason.FETCH_NOT_STARTED, f"The image of Job {name}: {waiting.get('message')}"
            )
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return FetchRunning(
                Reason.FETCH_NOT_STARTED,
                f"The pod of Job {name} has no node: {condition.get('message')}",
            )
    return FetchRunning(Reason.FETCHING, f"Job {name} is running.")


def _condition(job: Mapping[str, Any], type_: str) -> Mapping[str, Any] | None:
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition.get("type") == type_ and condition.get("status") == "True":
            return dict(condition)
    return None


def _terminated(pod: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    for status in ((pod or {}).get("status") or {}).get("containerStatuses") or ():
        ended = (status.get("state") or {}).get("terminated")
        if ended:
            return dict(ended)
    return None


def _phase(pod: Mapping[str, Any] | None) -> str | None:
    return ((pod or {}).get("status") or {}).get("phase")

"""The Job that fetches and checks weights on a CPU.

A Job's name is made of what it does: the same object, source, Secret and attempt have the same
name, so that an operator that was killed finds its Job again instead of starting another one.
`planning.fetch_outcome` reads what became of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.operator.kube.labels import (
    ATTEMPT,
    FINGERPRINT,
    OWNER_UID,
    digest,
    labels,
    owner_reference,
    short_name,
)
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.pods import (
    DATA_DIR,
    Volumes,
    base_pod,
    container_security,
    egress,
    from_secret,
    mounts,
    pod_volumes,
)
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import credential_keys
from calotype.serving.wire.fetch_order import FetchOrder

CONFIG_DIR = "/etc/calotype/fetch"
KEEP_SECONDS = 3600
"""A finished Job is kept so long, for whoever wants to read its log."""
FETCHED_SOURCES = ("huggingFace", "s3", "http", "merge")


@dataclass(frozen=True, slots=True)
class FetchTask:
    """What one Job shall do, and for whom."""

    order: FetchOrder
    """fetch.json."""
    owner: Object
    """The custom resource whose weights are fetched."""
    namespace: str
    """Where the Job runs: the model's namespace, for its cache volume is there."""
    model: str
    fingerprint: str
    """Digest of everything that, changed, makes another attempt worthwhile."""
    attempt: int
    credentials: str | None = None
    """Name of the Secret in the owner's namespace."""
    job_owner: Object | None = None
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
    def secret(self) -> str | None:
        """Name of the Secret that the Job's container reads."""
        return self.job_name if self.credentials and self.crosses_namespaces else self.credentials


def build_job(task: FetchTask, volumes: Volumes, settings: OperatorSettings) -> Manifest:
    """The Job. Its ConfigMap and its copy of the Secret belong to it: `build_config`."""
    metadata = task.owner["metadata"]
    own = {"model": task.model}
    if task.order.kind == "adapter":
        own |= {"adapter": metadata["name"], "adapter_namespace": metadata["namespace"]}
    pod_labels = labels(settings, "fetch", **own)
    environment = [
        {"name": "CALOTYPE_DATA_DIR", "value": DATA_DIR},
        {"name": "HOME", "value": "/tmp"},
        *egress(settings),
    ]
    if task.secret:
        keys = credential_keys(task.order.source)
        environment += [from_secret(key, task.secret, key) for key in keys]
    container = {
        "name": "fetch",
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "command": ["calotype", "fetch", task.order.kind],
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
            "labels": pod_labels,
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
                "metadata": {"labels": pod_labels},
                "spec": {
                    **base_pod(settings, None),
                    "restartPolicy": "Never",
                    "containers": [container],
                    "volumes": [*pod_volumes(volumes), config],
                },
            },
        },
    }


def build_config(task: FetchTask, job: Object) -> Manifest:
    """The ConfigMap with fetch.json; it dies with the Job."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _beside(job),
        "data": {"fetch.json": task.order.to_json()},
    }


def build_secret_copy(task: FetchTask, job: Object, secret: Object) -> Manifest:
    """The credentials of another namespace, for this Job alone; they die with it."""
    keys = credential_keys(task.order.source)
    data = secret.get("data") or {}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _beside(job),
        "type": "Opaque",
        "data": {key: data[key] for key in keys if key in data},
    }


def _beside(job: Object) -> Manifest:
    metadata = job["metadata"]
    owner = {**job, "apiVersion": "batch/v1", "kind": "Job"}
    return {
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "labels": metadata["labels"],
        "ownerReferences": [owner_reference(owner)],
    }

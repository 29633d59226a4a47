"""What all pods of a model have: who they run as, what they know, and which volumes they see.

Every pod passes Pod Security `restricted`, with a read-only root.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.operator.kube.objects import Manifest
from calotype.operator.settings import OperatorSettings, ResourceProfile
from calotype.serving.wire.ray_env import RAY_CALLS

DATA_DIR = "/var/lib/calotype"
CACHE_DIR = f"{DATA_DIR}/cache"
AUDIT_DIR = f"{DATA_DIR}/audit"
SOURCE_DIR = f"{DATA_DIR}/source"
ADAPTER_SOURCE_DIR = f"{DATA_DIR}/adapter-source"
TRAININGS_DIR = f"{CACHE_DIR}/trainings"
"""What trainings leave there, a folder for each namespace."""
SERVE_PORT = 8000
USER = 10001
DRAIN_SECONDS = 330
"""Longer than the slowest picture, and than the longest synchronous request."""


@dataclass(frozen=True, slots=True)
class Volumes:
    """Which claims a pod of a model sees; None = an empty folder of its own."""

    data: str | None = None
    """The release's volume, at /var/lib/calotype."""
    cache: str | None = None
    """The model's own volume of fetched weights, at /var/lib/calotype/cache."""
    source: str | None = None
    """The claim with the model's files, read-only at /var/lib/calotype/source."""
    adapter_source: str | None = None
    """The claim with an adapter's file, for its fetch Job; /var/lib/calotype/adapter-source."""
    audit: str | None = None
    """The claim for audit logs, at /var/lib/calotype/audit; for pods with a moderator alone."""

    @property
    def keeps_weights(self) -> bool:
        """Whether what a Job fetches is still there for the pods that serve it."""
        return self.cache is not None or self.data is not None


def pod_security(settings: OperatorSettings) -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
        **settings.pod_security_context,
    }


def container_security(settings: OperatorSettings) -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        **settings.container_security_context,
    }


def environment(settings: OperatorSettings, threads: int = 1) -> list[Manifest]:
    """The environment of model pods; secrets by reference."""
    found: list[Manifest] = [
        {"name": "CALOTYPE_DATA_DIR", "value": DATA_DIR},
        {"name": "CALOTYPE_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "HOME", "value": "/tmp"},
        {"name": "OMP_NUM_THREADS", "value": str(threads)},
        {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        *({"name": name, "value": value} for name, value in RAY_CALLS.items()),
    ]
    if settings.database_secret_ref is not None:
        found.append(
            from_secret("CALOTYPE_DATABASE_URL", **settings.database_secret_ref.model_dump())
        )
    elif settings.database_url:
        found.append({"name": "CALOTYPE_DATABASE_URL", "value": settings.database_url})
    if settings.blob_url:
        found.append({"name": "CALOTYPE_BLOB_URL", "value": settings.blob_url})
    if settings.internal_token_secret_ref is not None:
        found.append(
            from_secret(
                "CALOTYPE_INTERNAL_TOKEN", **settings.internal_token_secret_ref.model_dump()
            )
        )
    return found


def environment_from(settings: OperatorSettings) -> list[Manifest]:
    """Whole Secrets as environment: the object store's keys."""
    ref = settings.blob_secret_ref
    return [{"secretRef": {"name": ref.name}}] if ref is not None else []


def from_secret(variable: str, name: str, key: str, optional: bool = False) -> Manifest:
    """One variable of a container, read from a Secret when the container starts."""
    ref: Manifest = {"name": name, "key": key}
    if optional:
        ref["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": ref}}


def mounts(volumes: Volumes) -> list[Manifest]:
    found: list[Manifest] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "data", "mountPath": DATA_DIR},
    ]
    if volumes.cache:
        found.append({"name": "cache", "mountPath": CACHE_DIR})
    if volumes.audit:
        found.append({"name": "audit", "mountPath": AUDIT_DIR})
    if volumes.source:
        found.append({"name": "source", "mountPath": SOURCE_DIR, "readOnly": True})
    if volumes.adapter_source:
        found.append({"name": "adapter-source", "mountPath": ADAPTER_SOURCE_DIR, "readOnly": True})
    return found


def pod_volumes(volumes: Volumes) -> list[Manifest]:
    found: list[Manifest] = [{"name": "tmp", "emptyDir": {}}]
    data: Manifest = {"emptyDir": {}}
    if volumes.data:
        data = {"persistentVolumeClaim": {"claimName": volumes.data}}
    found.append({"name": "data", **data})
    if volumes.cache:
        found.append({"name": "cache", "persistentVolumeClaim": {"claimName": volumes.cache}})
    if volumes.audit:
        found.append({"name": "audit", "persistentVolumeClaim": {"claimName": volumes.audit}})
    for name, claim in (("source", volumes.source), ("adapter-source", volumes.adapter_source)):
        if claim:
            reference = {"claimName": claim, "readOnly": True}
            found.append({"name": name, "persistentVolumeClaim": reference})
    return found


def placement(profile: ResourceProfile | None) -> Manifest:
    """The fields of a pod that choose its node."""
    if profile is None:
        return {}
    found: Manifest = {}
    if profile.node_selector:
        found["nodeSelector"] = dict(profile.node_selector)
    if profile.tolerations:
        found["tolerations"] = list(profile.tolerations)
    if profile.affinity:
        found["affinity"] = dict(profile.affinity)
    if profile.runtime_class_name:
        found["runtimeClassName"] = profile.runtime_class_name
    if profile.priority_class_name:
        found["priorityClassName"] = profile.priority_class_name
    return found


def pull_secrets(settings: OperatorSettings) -> Manifest:
    names = [s if isinstance(s, str) else s.name for s in settings.image_pull_secrets]
    return {"imagePullSecrets": [{"name": name} for name in names]} if names else {}


def base_pod(settings: OperatorSettings, profile: ResourceProfile | None) -> Manifest:
    """The fields of a pod spec beside its containers and volumes."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(settings),
        **pull_secrets(settings),
        **placement(profile),
    }

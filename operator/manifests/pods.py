"""What all pods of a model have: who they run as, what they know, and which volumes they see.

Every pod passes Pod Security `restricted`, with a read-only root.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests.model_secret import MARKS, TOKEN, model_secret_name
from calotype.operator.settings import CA_DIR, OperatorSettings, ResourceProfile
from calotype.serving.wire.ray_env import RAY_CALLS

DATA_DIR = "/var/lib/calotype"
CACHE_DIR = f"{DATA_DIR}/cache"
AUDIT_DIR = f"{DATA_DIR}/audit"
MARKS_DIR = f"{DATA_DIR}/provenance"
SOURCE_DIR = f"{DATA_DIR}/source"
ADAPTER_SOURCE_DIR = f"{DATA_DIR}/adapter-source"
TRAININGS_DIR = f"{CACHE_DIR}/trainings"
"""What trainings leave there, a folder for each namespace."""
TLS_DIR = "/etc/calotype-tls"
TLS_CERTIFICATE, TLS_KEY = f"{TLS_DIR}/tls.crt", f"{TLS_DIR}/tls.key"
SERVE_PORT = 8000
USER = 10001
DRAIN_SECONDS = 330
"""Longer than the slowest picture, and than the longest synchronous request."""


@dataclass(frozen=True, slots=True)
class Volumes:
    """Which claims a pod of a model sees; None = an empty folder of its own."""

    data: str | None = None
    """The release's volume: its folder of weights, and of audit logs where there is a moderator."""
    cache: str | None = None
    """The model's own volume of fetched weights, at /var/lib/calotype/cache."""
    source: str | None = None
    """The claim with the model's files, read-only at /var/lib/calotype/source."""
    adapter_source: str | None = None
    """The claim with an adapter's file, for its fetch Job; /var/lib/calotype/adapter-source."""
    audit: str | None = None
    """The claim for audit logs, at /var/lib/calotype/audit; for pods with a moderator alone."""
    tls: str | None = None
    """The Secret of certificate, key and authority, at /etc/calotype-tls; for model apps alone."""
    moderator: bool = False
    """Whether the pod has a moderator."""
    marks: bool = False
    """Whether the pod marks pictures, or knows marks."""
    authorities: str | None = None
    """The ConfigMap of authorities that the pod believes, at /etc/calotype-ca."""

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
    """The environment of the pods of models and trainings; no secrets."""
    found: list[Manifest] = [
        {"name": "CALOTYPE_DATA_DIR", "value": DATA_DIR},
        {"name": "CALOTYPE_NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "HOME", "value": "/tmp"},
        {"name": "OMP_NUM_THREADS", "value": str(threads)},
        {"name": "TOKENIZERS_PARALLELISM", "value": "false"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        *({"name": name, "value": value} for name, value in RAY_CALLS.items()),
        *egress(settings),
    ]
    return found


def egress(settings: OperatorSettings) -> list[Manifest]:
    """How a container reaches the world outside the cluster."""
    return [{"name": n, "value": v} for n, v in settings.egress.variables().items()]


def access(settings: OperatorSettings, model: str) -> list[Manifest]:
    """How a model's pods reach its jobs and pictures: through the gateways, with its own token."""
    secret = model_secret_name(model)
    tls = {
        "CALOTYPE_TLS_CERTIFICATE": TLS_CERTIFICATE,
        "CALOTYPE_TLS_KEY": TLS_KEY,
        "CALOTYPE_TLS_CA": f"{TLS_DIR}/ca.crt",
    }
    return [
        {"name": "CALOTYPE_DATABASE_URL", "value": settings.job_store_url},
        {"name": "CALOTYPE_BLOB_URL", "value": settings.job_store_url},
        from_secret("CALOTYPE_INTERNAL_TOKEN", secret, TOKEN),
        from_secret("CALOTYPE_MARKS_SECRET", secret, MARKS),
        *({"name": n, "value": v} for n, v in tls.items() if settings.models_tls is not None),
    ]


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
    # Of the release's volume some folders: jobs, keys and pictures lie on it, too.
    if volumes.cache:
        found.append({"name": "cache", "mountPath": CACHE_DIR})
    elif volumes.data:
        found.append({"name": "release", "mountPath": CACHE_DIR, "subPath": "cache"})
    if volumes.audit:
        found.append({"name": "audit", "mountPath": AUDIT_DIR})
    elif volumes.data and volumes.moderator:
        found.append({"name": "release", "mountPath": AUDIT_DIR, "subPath": "audit"})
    if volumes.data and volumes.marks:
        marks = {"mountPath": MARKS_DIR, "subPath": "provenance", "readOnly": True}
        found.append({"name": "release", **marks})
    if volumes.source:
        found.append({"name": "source", "mountPath": SOURCE_DIR, "readOnly": True})
    if volumes.adapter_source:
        found.append({"name": "adapter-source", "mountPath": ADAPTER_SOURCE_DIR, "readOnly": True})
    if volumes.tls:
        found.append({"name": "tls", "mountPath": TLS_DIR, "readOnly": True})
    if volumes.authorities:
        found.append({"name": "authorities", "mountPath": CA_DIR, "readOnly": True})
    return found


def pod_volumes(volumes: Volumes) -> list[Manifest]:
    found: list[Manifest] = [{"name": "tmp", "emptyDir": {}}]
    found.append({"name": "data", "emptyDir": {}})
    if any(mount["name"] == "release" for mount in mounts(volumes)):
        found.append({"name": "release", "persistentVolumeClaim": {"claimName": volumes.data}})
    if volumes.cache:
        found.append({"name": "cache", "persistentVolumeClaim": {"claimName": volumes.cache}})
    if volumes.audit:
        found.append({"name": "audit", "persistentVolumeClaim": {"claimName": volumes.audit}})
    for name, claim in (("source", volumes.source), ("adapter-source", volumes.adapter_source)):
        if claim:
            reference = {"claimName": claim, "readOnly": True}
            found.append({"name": name, "persistentVolumeClaim": reference})
    if volumes.tls:
        found.append({"name": "tls", "secret": {"secretName": volumes.tls}})
    if volumes.authorities:
        found.append({"name": "authorities", "configMap": {"name": volumes.authorities}})
    return found


def health_check(settings: OperatorSettings) -> Manifest:
    """What a kubelet asks a model app; it believes every certificate."""
    asked: Manifest = {"path": "/-/healthz", "port": "serve"}
    if settings.models_tls is not None:
        asked["scheme"] = "HTTPS"
    return {"httpGet": asked, "timeoutSeconds": 5}


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

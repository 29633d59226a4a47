"""``runtime: SinglePod``: the whole model app in one pod, without KubeRay.

Pure builders. The pod reads its application from a ConfigMap and follows it while it runs, so a
changed configuration never changes the pod.
"""

from __future__ import annotations

import json
from dataclasses import replace

from calotype.operator.kube.labels import MODEL, labels, owner_reference, workload_name
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.application import ServeApplication
from calotype.operator.manifests.pods import (
    DRAIN_SECONDS,
    SERVE_PORT,
    Volumes,
    access,
    base_pod,
    container_security,
    environment,
    health_check,
    mounts,
    pod_volumes,
)
from calotype.operator.settings import OperatorSettings, ResourceProfile

MODEL_DIR = "/etc/calotype/model"


def config_map_name(model: str) -> str:
    return f"{workload_name(model)}-app"


def build_config(
    owner: Object, application: ServeApplication, settings: OperatorSettings
) -> Manifest:
    """The ConfigMap with model.json."""
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(name),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels(settings, "model", model=name),
            "ownerReferences": [owner_reference(owner)],
        },
        "data": {"model.json": json.dumps(application, separators=(",", ":"))},
    }


def build_service(owner: Object, settings: OperatorSettings) -> Manifest:
    """The Service of the pod."""
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": workload_name(name),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels(settings, "model", model=name),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "selector": selector(settings, name),
            "ports": [
                {
                    "name": "serve",
                    "port": SERVE_PORT,
                    "targetPort": "serve",
                    "protocol": "TCP",
                    "appProtocol": settings.scheme,
                }
            ],
        },
    }


def selector(settings: OperatorSettings, model: str) -> dict[str, str]:
    """Labels by which Service and Deployment know the pod."""
    all_labels = labels(settings, "model", model=model)
    wanted = ("app.kubernetes.io/instance", "app.kubernetes.io/component", MODEL)
    return {key: all_labels[key] for key in wanted}


def build_deployment(
    owner: Object,
    profile: ResourceProfile,
    volumes: Volumes,
    settings: OperatorSettings,
    *,
    suspended: bool,
) -> Manifest:
    """The Deployment of one pod; suspended = of none."""
    name = owner["metadata"]["name"]
    volumes = replace(
        volumes,
        audit=settings.audit_claim,
        tls=settings.models_tls.secret if settings.models_tls is not None else None,
        moderator=True,
        marks=True,
    )
    probe = health_check(settings)
    container: Manifest = {
        "name": "model-app",
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "command": ["calotype", "model-app"],
        "args": ["--config", f"{MODEL_DIR}/model.json", "--port", str(SERVE_PORT)],
        "ports": [{"name": "serve", "containerPort": SERVE_PORT, "protocol": "TCP"}],
        "env": [*environment(settings, profile.threads), *access(settings, name)],
        "resources": profile.resources(),
        "securityContext": container_security(settings),
        "volumeMounts": [
            *mounts(volumes),
            {"name": "model", "mountPath": MODEL_DIR, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
        # Loading a model takes minutes; Serve answers as soon as the application runs.
        "startupProbe": {**probe, "periodSeconds": 5, "failureThreshold": 360},
        "livenessProbe": {**probe, "periodSeconds": 15, "failureThreshold": 4},
        "readinessProbe": {**probe, "periodSeconds": 5, "failureThreshold": 2},
    }
    config = {"name": "model", "configMap": {"name": config_map_name(name)}}
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": workload_name(name),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels(settings, "model", model=name),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "replicas": 0 if suspended else 1,
            # Two pods would be two dispatchers of one queue.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": selector(settings, name)},
            "template": {
                "metadata": {"labels": labels(settings, "model", model=name)},
                "spec": {
                    **base_pod(settings, profile),
                    "terminationGracePeriodSeconds": DRAIN_SECONDS,
                    "containers": [container],
                    "volumes": [*pod_volumes(volumes), config, shared_memory],
                },
            },
        },
    }

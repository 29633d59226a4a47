"""``runtime: RayService``: an ImageModel as a RayService of KubeRay, and what KubeRay leaves to us.

Pure builders. Three groups of workers: control (dispatcher, moderator, HTTP), generators, and text
encoders where they have GPUs of their own; the head runs no replica. KubeRay does not hand changed
replica bounds to a running cluster, so `replica_patch` says what to change there; and it makes a
second cluster for most other changes, which `cluster_hash` and `gpus_of` foretell.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from calotype.operator.kube.labels import (
    APPLIED_HASH,
    CLUSTER_HASH,
    digest,
    labels,
    owner_reference,
    workload_name,
)
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.application import (
    CONTROL,
    GENERATOR,
    TEXT_ENCODER,
    group_capacity,
    group_resource,
)
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
from calotype.serving.config import ImageModel, Replicas

KEEP_OLD_SECONDS = 330
"""The old cluster of an upgrade goes on until its pictures are finished."""
IDLE_SECONDS = 60
_STRATEGIES = {
    "NewCluster": "NewCluster",
    "Incremental": "NewClusterWithIncrementalUpgrade",
    "InPlaceOnly": "None",
}
_GROUP_FIELDS_WITHOUT_NEW_CLUSTER = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
_POD_FIELDS_WITHOUT_NEW_CLUSTER = ("tolerations", "schedulingGates")


def service_name(model: str) -> str:
    """The Service that KubeRay makes, and whose selector it switches in upgrades."""
    return f"{workload_name(model)}-serve-svc"


@dataclass(frozen=True, slots=True)
class Group:
    """One worker group: how many pods of which profile."""

    name: str
    replicas: Replicas
    profile: ResourceProfile | None
    """None = the control pod, which has the settings' own resources."""


def groups_of(
    model: ImageModel, profile: ResourceProfile, encoder_profile: ResourceProfile | None
) -> list[Group]:
    spec = model.spec
    found = [
        Group(CONTROL, Replicas(min=1, max=1), None),
        Group(GENERATOR, spec.replicas, profile),
    ]
    if encoder_profile is not None and spec.text_encoder is not None:
        found.append(Group(TEXT_ENCODER, spec.text_encoder.replicas, encoder_profile))
    return found


def build_rayservice(
    owner: Object,
    model: ImageModel,
    groups: Sequence[Group],
    serve_config: str,
    volumes: Volumes,
    settings: OperatorSettings,
    *,
    cluster: Object | None = None,
) -> Manifest:
    """The RayService.

    Args:
        serve_config: `application.serve_config`.
        cluster: the cluster's spec to keep instead of the one that the model asks for.
    """
    name = model.name
    wanted = (
        dict(cluster) if cluster is not None else build_cluster(name, groups, volumes, settings)
    )
    spec: Manifest = {
        "serveConfigV2": serve_config,
        "excludeHeadPodFromServeSvc": True,
        "rayClusterDeletionDelaySeconds": KEEP_OLD_SECONDS,
        "upgradeStrategy": _strategy(model, settings),
        "rayClusterConfig": wanted,
        "suspend": model.spec.suspend,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": workload_name(name),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels(settings, "model", model=name),
            "annotations": {
                CLUSTER_HASH: cluster_hash(wanted),
                APPLIED_HASH: digest(spec),
            },
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": spec,
    }


def build_cluster(
    name: str, groups: Sequence[Group], volumes: Volumes, settings: OperatorSettings
) -> Manifest:
    """``rayClusterConfig``."""
    cluster: Manifest = {
        "rayVersion": settings.ray_version,
        # Ray's ports do what they are asked: KubeRay makes a token that its pods know.
        "authOptions": {"mode": "token"},
        # Also where there is nothing to scale: switching it on later would take a second cluster.
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_SECONDS,
            "securityContext": container_security(settings),
        },
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(name, None, "ray-head", volumes, settings, head=True),
        },
        "workerGroupSpecs": [_group(name, group, volumes, settings) for group in groups],
    }
    if settings.redis is not None:
        redis: Manifest = {"redisAddress": settings.redis.address}
        if settings.redis.password_secret_ref is not None:
            ref = settings.redis.password_secret_ref.model_dump()
            redis["redisPassword"] = {"valueFrom": {"secretKeyRef": ref}}
        cluster["gcsFaultToleranceOptions"] = redis
    return cluster


def cluster_hash(cluster: Object) -> str:
    """Equal for two specs between which KubeRay changes the running cluster, or nothing at all."""
    found = json.loads(json.dumps(cluster))
    for group in found.get("workerGroupSpecs", []):
        for field in _GROUP_FIELDS_WITHOUT_NEW_CLUSTER:
            group.pop(field, None)
    for group in [found.get("headGroupSpec", {}), *found.get("workerGroupSpecs", [])]:
        pod = group.get("template", {}).get("spec", {})
        for field in _POD_FIELDS_WITHOUT_NEW_CLUSTER:
            pod.pop(field, None)
    return digest(found)


def has_certificate(cluster: Object) -> bool:
    """Whether Serve's proxies in a cluster of this spec have one to show."""
    pod = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {})
    return any(volume["name"] == "tls" for volume in pod.get("volumes", ()))


def gpus_of(cluster: Object) -> dict[str, int]:
    """GPU resource -> how many a cluster of this spec has with its present replicas."""
    found: dict[str, int] = {}
    for group in cluster.get("workerGroupSpecs", []):
        replicas = int(group.get("replicas", 0))
        for container in group["template"]["spec"]["containers"]:
            for resource, amount in container.get("resources", {}).get("limits", {}).items():
                if "/" in resource and replicas:
                    found[resource] = found.get(resource, 0) + int(amount) * replicas
    return found


def replica_patch(running: Object, wanted: Object) -> list[Manifest] | None:
    """A JSON patch that gives a running RayCluster the bounds of a spec; None = it has them.

    The number of replicas between the bounds is the autoscaler's.
    """
    bounds = {group["groupName"]: group for group in wanted.get("workerGroupSpecs", [])}
    patch: list[Manifest] = []
    for index, group in enumerate(running["spec"].get("workerGroupSpecs", [])):
        bound = bounds.get(group["groupName"])
        if bound is None:
            continue
        low, high = bound["minReplicas"], bound["maxReplicas"]
        now = int(group.get("replicas", low))
        target = {
            "minReplicas": low,
            "maxReplicas": high,
            "replicas": min(max(now, low), high),
        }
        path = f"/spec/workerGroupSpecs/{index}"
        changes = [
            {"op": "add", "path": f"{path}/{field}", "value": value}
            for field, value in target.items()
            if group.get(field) != value
        ]
        if changes:
            # Groups are known by their place: the test fails where somebody moved them meanwhile.
            patch.append({"op": "test", "path": f"{path}/groupName", "value": group["groupName"]})
            patch += changes
    return patch or None


def _strategy(model: ImageModel, settings: OperatorSettings) -> Manifest:
    found: Manifest = {"type": _STRATEGIES[model.spec.upgrade_strategy]}
    if model.spec.upgrade_strategy == "Incremental":
        found["clusterUpgradeOptions"] = {
            "gatewayClassName": settings.gateway_class_name,
            "maxSurgePercent": 100,
            "stepSizePercent": 25,
            "intervalSeconds": 30,
        }
    return found


def _group(model: str, group: Group, volumes: Volumes, settings: OperatorSettings) -> Manifest:
    resource = {group_resource(group.name): group_capacity(group.name)}
    # KubeRay puts the value on a shell's command line, hence the second pair of quotes.
    quoted = json.dumps(json.dumps(resource, separators=(",", ":")))
    params = {"num-cpus": "1", "resources": quoted}
    if group.profile is not None and group.profile.gpus:
        params["num-gpus"] = str(group.profile.gpus)
    volumes = replace(volumes, marks=group.name != TEXT_ENCODER)
    if group.name == CONTROL:  # the moderators are there
        volumes = replace(volumes, audit=settings.audit_claim, moderator=True)
    return {
        "groupName": group.name,
        "replicas": group.replicas.min,
        "minReplicas": group.replicas.min,
        "maxReplicas": group.replicas.max,
        "rayStartParams": params,
        "template": _pod(model, group.profile, "ray-worker", volumes, settings),
    }


def _pod(
    model: str,
    profile: ResourceProfile | None,
    container_name: str,
    volumes: Volumes,
    settings: OperatorSettings,
    *,
    head: bool = False,
) -> Manifest:
    tls = settings.models_tls
    if tls is not None:  # Serve has a proxy on every node
        volumes = replace(volumes, tls=tls.secret)
    container: Manifest = {
        "name": container_name,
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "ports": [
            {"name": "serve", "containerPort": SERVE_PORT},
            {"name": "metrics", "containerPort": 8080},
            *(_HEAD_PORTS if head else []),
        ],
        "env": [*environment(settings), *access(settings, model)],
        "resources": profile.resources() if profile is not None else settings.control_resources,
        "securityContext": container_security(settings),
        "volumeMounts": mounts(volumes),
    }
    if tls is not None and not head:
        # KubeRay's own one asks Serve's proxy by plain HTTP. The head's does not ask it.
        container["readinessProbe"] = {
            **health_check(settings),
            "initialDelaySeconds": 10,
            "periodSeconds": 5,
            "failureThreshold": 1,
        }
    spec = base_pod(settings, profile)
    if head:
        # It has no replica that could drain; Ray would wait for its own nodes for two minutes.
        container["env"].append({"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "0"})
        # The autoscaler beside the head asks the API server; KubeRay gives it an account.
        del spec["automountServiceAccountToken"]
    pod_labels = labels(settings, "model", model=model)
    # KubeRay finds its head by a name label of its own.
    del pod_labels["app.kubernetes.io/name"]
    return {
        "metadata": {"labels": pod_labels},
        "spec": {
            **spec,
            "terminationGracePeriodSeconds": DRAIN_SECONDS,
            "containers": [container],
            "volumes": pod_volumes(volumes),
        },
    }


_HEAD_PORTS = [
    {"name": "gcs-server", "containerPort": 6379},
    {"name": "dashboard", "containerPort": 8265},
    {"name": "client", "containerPort": 10001},
]

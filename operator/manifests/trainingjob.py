"""A LoRATraining as a RayJob of KubeRay, and the LoRAAdapter that it becomes.

Pure builders. The trainer runs as the job's entrypoint, on a cluster of its own that ends with it;
checkpoints lie on the volume, so that a suspended training goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true, unknown
from calotype.operator.kube.labels import labels, owner_reference, training_job_name
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.pods import (
    DATA_DIR,
    SOURCE_DIR,
    TRAININGS_DIR,
    Volumes,
    base_pod,
    container_security,
    environment,
    from_secret,
    mounts,
    pod_volumes,
)
from calotype.operator.settings import OperatorSettings, ResourceProfile
from calotype.serving.config import API_VERSION, CREDENTIAL_KEYS, LoRATraining

CONFIG_DIR = "/etc/calotype/training"
OUTPUT_DIR = f"{DATA_DIR}/output"
ADAPTER_FILE = "adapter.safetensors"
KEEP_SECONDS = 600
PROGRESS_PORT = 8000
PROGRESS_PATH = "/internal/v1/training"
"""Where the trainer says how far it is, on the head of its cluster."""
GROUP = "trainer"


def config_name(training: str) -> str:
    return training_job_name(training)


def training_volumes(training: LoRATraining, settings: OperatorSettings) -> Volumes:
    """The claims that a trainer sees: the release's, and the one of its data set."""
    data = training.spec.dataset.persistent_volume_claim
    in_release = training.metadata.namespace == settings.operator_namespace
    return Volumes(
        data=settings.data_claim if in_release else None,
        source=data.claim_name if data is not None else None,
        authorities=settings.egress.ca_config_map,
    )


def credential_keys(training: LoRATraining) -> tuple[str, ...]:
    """The keys that the Secret of a training must have: of its data set and of its output."""
    found: dict[str, None] = {}
    for place in (training.spec.dataset, training.spec.output):
        if place is not None:
            given = place.model_dump(by_alias=True, exclude_none=True)
            found |= dict.fromkeys(CREDENTIAL_KEYS.get(next(iter(given)), ()))
    return tuple(found)


def output_folder(training: LoRATraining) -> str:
    """Where the trainer writes, inside its pods."""
    claim = training.spec.output.persistent_volume_claim if training.spec.output else None
    if claim is not None:
        return f"{OUTPUT_DIR}/{claim.path}/{training.name}"
    metadata = training.metadata
    return f"{TRAININGS_DIR}/{metadata.namespace}/{training.name}"


def build_config(
    owner: Object,
    training: LoRATraining,
    base: Object,
    settings: OperatorSettings,
) -> Manifest:
    """The ConfigMap with training.json, what `calotype train lora` reads."""
    spec = training.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    document = {
        "name": training.name,
        "namespace": training.metadata.namespace,
        "spec": spec,
        "model": base,
        "outputDir": output_folder(training),
        "volumeDir": SOURCE_DIR if training.spec.dataset.persistent_volume_claim else None,
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_name(training.name),
            "namespace": training.metadata.namespace,
            "labels": labels(settings, "training", training=training.name),
            "ownerReferences": [owner_reference(owner)],
        },
        "data": {"training.json": json.dumps(document, separators=(",", ":"))},
    }


def build_rayjob(
    owner: Object,
    training: LoRATraining,
    profile: ResourceProfile,
    settings: OperatorSettings,
) -> Manifest:
    """The RayJob."""
    command = ["calotype", "train", "lora", "--config", f"{CONFIG_DIR}/training.json"]
    spec: Manifest = {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "backoffLimit": 1,
        "suspend": training.spec.suspend,
        "submitterPodTemplate": _submitter(settings),
        "rayClusterSpec": {
            "rayVersion": settings.ray_version,
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": _pod(training, None, "ray-head", settings),
            },
            "workerGroupSpecs": [
                {
                    "groupName": GROUP,
                    "replicas": 1,
                    "minReplicas": 1,
                    "maxReplicas": 1,
                    "rayStartParams": {"num-gpus": str(profile.gpus)} if profile.gpus else {},
                    "template": _pod(training, profile, "ray-worker", settings),
                }
            ],
        },
    }
    if training.spec.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = training.spec.active_deadline_seconds
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": training_job_name(training.name),
            "namespace": training.metadata.namespace,
            "labels": labels(settings, "training", training=training.name),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": spec,
    }


def build_adapter(training: LoRATraining, settings: OperatorSettings) -> Manifest:
    """The LoRAAdapter of a finished training. It outlives the training, so it has no owner."""
    template = training.spec.adapter_template
    words = list(template.spec.trigger_words)
    if not words and training.spec.caption.trigger_word is not None:
        words = [training.spec.caption.trigger_word]
    spec = template.spec.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
    )
    model = training.spec.model_ref.model_dump(mode="json", by_alias=True, exclude_none=True)
    spec |= {"modelRef": model, "source": _source(training)}
    if words:
        spec["triggerWords"] = words
    output = training.spec.output
    ref = training.spec.credentials_secret_ref
    if output is not None and output.s3 is not None and ref is not None:
        spec["credentialsSecretRef"] = {"name": ref.name}
    own = labels(settings, "training", training=training.name)
    metadata: Manifest = {
        "name": template.metadata.name or training.name,
        "namespace": training.metadata.namespace,
        "labels": {**own, **template.metadata.labels},
    }
    if template.metadata.annotations:
        metadata["annotations"] = dict(template.metadata.annotations)
    return {"apiVersion": API_VERSION, "kind": "LoRAAdapter", "metadata": metadata, "spec": spec}


def _source(training: LoRATraining) -> Manifest:
    output = training.spec.output
    if output is not None and output.s3 is not None:
        s3 = output.s3.model_dump(mode="json", by_alias=True, exclude_none=True)
        folder = s3["uri"].rstrip("/")
        return {"s3": {**s3, "uri": f"{folder}/{training.name}/{ADAPTER_FILE}"}}
    if output is not None and output.persistent_volume_claim is not None:
        claim = output.persistent_volume_claim
        path = f"{claim.path}/{training.name}/{ADAPTER_FILE}"
        return {
            "persistentVolumeClaim": {
                "claimName": claim.claim_name,
                "path": path.removeprefix("./"),
            }
        }
    return {"path": f"{output_folder(training)}/{ADAPTER_FILE}"}


@dataclass(frozen=True, slots=True)
class JobState:
    """What a RayJob says."""

    phase: str
    running: Fact
    succeeded: Fact
    failure: str | None = None


def read_job(job: Object | None, suspended: bool) -> JobState:
    """The phase of a training by its RayJob."""
    run, done = Condition.RUNNING, Condition.SUCCEEDED
    status = (job or {}).get("status") or {}
    deployment, result = status.get("jobDeploymentStatus"), status.get("jobStatus")
    message = str(status.get("message") or "").strip()[-600:]
    if result == "SUCCEEDED" or (deployment == "Complete" and result != "FAILED"):
        text = "The training has ended well."
        return JobState(
            "Succeeded",
            false(run, Reason.JOB_SUCCEEDED, text),
            true(done, Reason.JOB_SUCCEEDED, text),
        )
    if deployment in ("Failed", "ValidationFailed") or (
        deployment == "Complete" and result == "FAILED"
    ):
        text = f"The training failed: {message or status.get('reason') or 'no message'}"
        return JobState(
            "Failed",
            false(run, Reason.JOB_FAILED, text),
            false(done, Reason.JOB_FAILED, text),
            text,
        )
    if suspended:
        text = "spec.suspend is true; it goes on from its last checkpoint afterwards."
        return JobState(
            "Suspended",
            false(run, Reason.SUSPENDED, text),
            unknown(done, Reason.SUSPENDED, text),
        )
    if deployment == "Running":
        text = "The trainer is at work."
        return JobState(
            "Running", true(run, Reason.JOB_RUNNING, text), unknown(done, Reason.JOB_RUNNING, text)
        )
    text = f"The cluster is being made ({deployment or 'new'})."
    return JobState(
        "Starting", false(run, Reason.STARTING, text), unknown(done, Reason.STARTING, text)
    )


def _submitter(settings: OperatorSettings) -> Manifest:
    container = {
        "name": "ray-job-submitter",
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": container_security(settings),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "spec": {
            **base_pod(settings, None),
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        }
    }


def _pod(
    training: LoRATraining,
    profile: ResourceProfile | None,
    container_name: str,
    settings: OperatorSettings,
) -> Manifest:
    volumes = training_volumes(training, settings)
    claim = training.spec.output.persistent_volume_claim if training.spec.output else None
    variables = environment(settings, profile.threads if profile is not None else 1)
    ref = training.spec.credentials_secret_ref
    if ref is not None:
        variables += [from_secret(key, ref.name, key) for key in credential_keys(training)]
    config_mount = {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True}
    container: Manifest = {
        "name": container_name,
        "image": settings.serve_image,
        "imagePullPolicy": settings.serve_image_pull_policy,
        "env": variables,
        "resources": profile.resources() if profile is not None else settings.control_resources,
        "securityContext": container_security(settings),
        "volumeMounts": [*mounts(volumes), config_mount],
    }
    config = {"name": "config", "configMap": {"name": config_name(training.name)}}
    pod_volume_list = [*pod_volumes(volumes), config]
    if claim is not None:
        container["volumeMounts"].append({"name": "output", "mountPath": OUTPUT_DIR})
        reference = {"claimName": claim.claim_name}
        pod_volume_list.append({"name": "output", "persistentVolumeClaim": reference})
    pod_labels = labels(settings, "training", training=training.name)
    del pod_labels["app.kubernetes.io/name"]
    return {
        "metadata": {"labels": pod_labels},
        "spec": {
            **base_pod(settings, profile),
            "containers": [container],
            "volumes": pod_volume_list,
        },
    }

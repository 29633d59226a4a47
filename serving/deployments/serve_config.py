"""From manifests to what Ray Serve is told: ``user_config``, scaling, applications.

Imports no Ray: whoever decides what shall run is not the process that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from calotype.serving.config import ImageModel, LoRAAdapter, Manifests
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.preparation import moderation_of
from calotype.serving.wire.application import (
    DispatcherConfig,
    GeneratorConfig,
    ModeratorConfig,
    TextEncoderConfig,
)

R = TypeVar("R", ImageModel, LoRAAdapter)

IMPORT_PATH = "calotype.serving.deployments.cluster:build_parts"
POLICY_PATH = "calotype.serving.deployments.autoscaling:QueueSecondsPolicy"
GPUS = "gpus"
"""What an application asks for of this machine's GPUs; for whoever knows them, not for Serve."""
MODEL_CPUS = 0.5
"""What a replica with a part of the model counts for."""
QUIET_LOG = {"log_level": "WARNING", "enable_access_log": False}
"""Reports and long polls would fill the log several times a second."""
OWN_ANNOTATIONS = "calotype.dev/"
"""How the names of those annotations begin that replicas read."""


def app_name(model: str) -> str:
    """The Serve application of a model."""
    return f"model-{model}"


def applications(manifests: Manifests, threads: int) -> list[JsonObject]:
    """One application for each model, below ``/`` and its name.

    Args:
        threads: torch threads of text encoder and generator.
    """
    return [
        _application(model, manifests, moderation_of(model, manifests), threads)
        for model in manifests.models
    ]


def _application(
    model: ImageModel, manifests: Manifests, moderation: ModeratorConfig, threads: int
) -> JsonObject:
    configs = user_config(model, manifests.adapters, moderation)
    deployments: list[dict[str, Any]] = [
        {"name": name, "user_config": config} for name, config in configs.items()
    ]
    for deployment in deployments:
        if deployment["name"] == "Generator":
            policy = {"policy": {"policy_function": POLICY_PATH}}
            deployment["autoscaling_config"] = scaling(model) | policy
    return {
        "name": app_name(model.name),
        "route_prefix": f"/{model.name}",
        "import_path": IMPORT_PATH,
        "args": {"model": model.name, "threads": threads},
        "deployments": deployments,
        GPUS: {
            "device": model.spec.device,
            "devices": model.spec.acceleration.devices_per_picture,
        },
    }


def scaling(model: ImageModel) -> dict[str, Any]:
    """Bounds and delays of Serve's ``autoscaling_config``."""
    spec = model.spec
    return {
        "min_replicas": spec.replicas.min,
        "max_replicas": spec.replicas.max,
        "initial_replicas": max(1, spec.replicas.min),
        "upscale_delay_s": spec.autoscaling.upscale_delay_seconds,
        "downscale_delay_s": spec.autoscaling.downscale_delay_seconds,
    }


def user_config(
    model: ImageModel,
    adapters: Sequence[LoRAAdapter],
    moderation: ModeratorConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Deployment name -> its ``user_config`` (`wire.application`) as JSON."""
    described = _described(model)
    mine = [a for a in adapters if a.spec.model_ref.name == model.name]
    configs = {
        "Dispatcher": DispatcherConfig(model=model.name),
        "Moderator": moderation or ModeratorConfig(),
        "TextEncoder": TextEncoderConfig(model=described),
        "Generator": GeneratorConfig(model=described, adapters=[_described(a) for a in mine]),
    }
    return {name: config.payload() for name, config in configs.items()}


def _described(resource: R) -> R:
    """The manifest without what a cluster notes in an object's metadata, and with all defaults.

    A file from ``kubectl get -o yaml`` has a resourceVersion that every status changes; replicas
    would be told again and again of what is the same for them.
    """
    document = resource.model_dump(mode="json", by_alias=True, exclude_none=True)
    metadata: dict[str, Any] = {"name": resource.name, "namespace": resource.metadata.namespace}
    annotations = document["metadata"].get("annotations") or {}
    mine = {key: value for key, value in annotations.items() if key.startswith(OWN_ANNOTATIONS)}
    return type(resource).model_validate(
        {**document, "metadata": metadata | ({"annotations": mine} if mine else {})}
    )

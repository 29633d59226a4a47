"""One model as an application of Ray Serve: the document that serveConfigV2 and model.json hold.

Pure: no Ray is imported. What a manifest says travels as ``user_config``, which restarts nothing;
what is an actor's option (GPUs, custom resources) restarts replicas, so nothing that changes often
stands there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.pods import TLS_CERTIFICATE, TLS_KEY
from calotype.operator.settings import ResourceProfile
from calotype.serving.config import ImageModel, LoRAAdapter, Replicas
from calotype.serving.wire.application import (
    DispatcherConfig,
    GeneratorConfig,
    ModeratorConfig,
    TextEncoderConfig,
)
from calotype.serving.wire.config_hash import config_hash as hash_of
from calotype.serving.wire.document import Document, JsonObject

IMPORT_PATH = "calotype.serving.deployments.cluster:build_app"
POD_IMPORT_PATH = "calotype.serving.deployments.cluster:build_parts"
"""For one pod, where the process that holds Ray answers instead of an ingress."""
POLICY_PATH = "calotype.serving.deployments.autoscaling:QueueSecondsPolicy"
DRAIN_SECONDS = 300.0

CONTROL, GENERATOR, TEXT_ENCODER = "control", "generator", "text-encoder"
"""Worker groups of a Ray cluster."""


GENERATOR_SHARE, ENCODER_SHARE = 2, 1
"""Of a generator's pod: room for one generator and a text encoder, never for two generators."""


def group_capacity(group: str) -> int:
    """How much of its custom resource one pod of a group has: Ray takes whole numbers only."""
    return GENERATOR_SHARE + ENCODER_SHARE if group == GENERATOR else 1


def gpu_shares(
    profile: ResourceProfile, encoder_profile: ResourceProfile | None
) -> tuple[float, float]:
    """GPUs of one generator and of one text encoder.

    Without a profile of its own the encoder takes one of several GPUs of the replica, or lives on
    the only one: a fraction makes Ray show both actors the same device.
    """
    if encoder_profile is not None:
        return float(profile.gpus), float(encoder_profile.gpus)
    if profile.gpus > 1:
        return float(profile.gpus - 1), 1.0
    return (0.75, 0.25) if profile.gpus else (0.0, 0.0)


def group_resource(group: str) -> str:
    """The custom resource of Ray that only nodes of a group have."""
    return f"calotype_{group.replace('-', '_')}"


class ServeDeployment(TypedDict):
    """One deployment as Ray Serve's configuration has it."""

    name: str
    ray_actor_options: Manifest
    user_config: NotRequired[JsonObject]
    autoscaling_config: NotRequired[Manifest]
    max_ongoing_requests: NotRequired[int]
    graceful_shutdown_timeout_s: NotRequired[float]


class ServeApplication(TypedDict):
    """An application as Ray Serve's configuration has it."""

    name: str
    route_prefix: str
    import_path: str
    args: Manifest
    runtime_env: Manifest
    deployments: list[ServeDeployment]


def build_application(
    model: ImageModel,
    manifest: Manifest,
    adapters: Sequence[Object],
    moderation: ModeratorConfig,
    profile: ResourceProfile,
    encoder_profile: ResourceProfile | None,
    *,
    groups: bool,
    max_outage_seconds: float = 900.0,
) -> ServeApplication:
    """The application.

    Args:
        manifest: of the model, as `manifests.model_manifest` renders it.
        adapters: rendered manifests.
        encoder_profile: None = the text encoder lives beside the generators.
        groups: whether there are worker groups (a Ray cluster), or one pod for everything.
        max_outage_seconds: how long jobs wait for a part that is away.
    """
    spec = model.spec
    served = ImageModel.model_validate(manifest)
    encoder_group = TEXT_ENCODER if encoder_profile is not None else GENERATOR
    generator_gpus, encoder_gpus = gpu_shares(profile, encoder_profile)
    control = _share(groups, CONTROL, 0.001, 0)
    encoder = _deployment(
        "TextEncoder",
        TextEncoderConfig(model=served),
        _share(groups, encoder_group, ENCODER_SHARE, encoder_gpus),
    )
    if spec.text_encoder is not None:
        encoder["autoscaling_config"] = _bounds(spec.text_encoder.replicas)
    generator = _deployment(
        "Generator",
        GeneratorConfig(
            model=served, adapters=[LoRAAdapter.model_validate(adapter) for adapter in adapters]
        ),
        _share(groups, GENERATOR, GENERATOR_SHARE, generator_gpus),
    )
    generator["max_ongoing_requests"] = 16
    generator["graceful_shutdown_timeout_s"] = DRAIN_SECONDS
    generator["autoscaling_config"] = _scaling(model)
    dispatcher = DispatcherConfig(model=model.name, max_outage_seconds=max_outage_seconds)
    ingress: list[ServeDeployment] = [{"name": "Ingress", "ray_actor_options": control}]
    return {
        "name": model.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH if groups else POD_IMPORT_PATH,
        "args": {"model": model.name, "threads": profile.threads, "gpus": generator_gpus},
        "runtime_env": {},
        "deployments": [
            _deployment("Dispatcher", dispatcher, control),
            _deployment("Moderator", moderation, control),
            encoder,
            generator,
            *(ingress if groups else []),
        ],
    }


def serve_config(application: ServeApplication, *, tls: bool = False) -> str:
    """``serveConfigV2``: JSON, which is YAML too, and in one order of keys.

    Args:
        tls: Serve's proxies speak HTTPS. It is theirs for life: another word takes another cluster.
    """
    config: Manifest = {"applications": [application]}
    if tls:
        config["http_options"] = {"ssl_keyfile": TLS_KEY, "ssl_certfile": TLS_CERTIFICATE}
    return json.dumps(config, separators=(",", ":"))


def config_hash(application: Object) -> str:
    """The ``configHash`` of a model app whose replicas were given this application."""
    return hash_of(generator_config(application))


def generator_config(application: Object) -> Object:
    """The ``user_config`` of the generators; empty where the application has none."""
    for deployment in application.get("deployments") or ():
        if deployment.get("name") == "Generator":
            return deployment.get("user_config") or {}
    return {}


def _deployment(name: str, config: Document, actor: Manifest) -> ServeDeployment:
    return {"name": name, "ray_actor_options": actor, "user_config": config.payload()}


def _share(groups: bool, group: str, share: float, gpus: float) -> Manifest:
    """An actor's options. CPUs are not counted: pods bound them, and groups place the actors."""
    found: Manifest = {"num_cpus": 0, "num_gpus": gpus}
    if groups:
        found["resources"] = {group_resource(group): share}
    return found


def _bounds(replicas: Replicas) -> Manifest:
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "initial_replicas": max(1, replicas.min),
    }


def _scaling(model: ImageModel) -> Manifest:
    spec = model.spec
    found = {
        **_bounds(spec.replicas),
        "upscale_delay_s": spec.autoscaling.upscale_delay_seconds,
        "downscale_delay_s": spec.autoscaling.downscale_delay_seconds,
        # Without arguments: Serve restarts all replicas when they change. The target stands in the
        # model's manifest, and the generators report it.
        "policy": {"policy_function": POLICY_PATH},
    }
    if spec.replicas.min == 0 and spec.autoscaling.scale_to_zero_after_seconds is not None:
        found["downscale_to_zero_delay_s"] = spec.autoscaling.scale_to_zero_after_seconds
    return found

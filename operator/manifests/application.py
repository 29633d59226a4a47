"""One model as an application of Ray Serve: the document that serveConfigV2 and model.json hold.

Pure: no Ray is imported. What a manifest says travels as ``user_config``, which restarts nothing;
what is an actor's option (GPUs, custom resources) restarts replicas, so nothing that changes often
stands there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.operator.settings import ResourceProfile
from calotype.serving.config import ImageModel, Replicas
from calotype.serving.wire.config_hash import config_hash as hash_of

IMPORT_PATH = "calotype.serving.deployments.cluster:build_app"
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


def build_application(
    model: ImageModel,
    manifest: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]],
    moderation: Mapping[str, Any],
    profile: ResourceProfile,
    encoder_profile: ResourceProfile | None,
    *,
    groups: bool,
) -> dict[str, Any]:
    """The application.

    Args:
        manifest: of the model, as `manifests.model_manifest` renders it.
        adapters: rendered manifests.
        moderation: ``policy``: ``{"name", "spec"}`` of a ModerationPolicy, or None = the package's;
            ``policies``: name -> spec of those that teams and adapters name.
        encoder_profile: None = the text encoder lives beside the generators.
        groups: whether there are worker groups (a Ray cluster), or one pod for everything.
    """
    spec = model.spec
    encoder_group = TEXT_ENCODER if encoder_profile is not None else GENERATOR
    generator_gpus, encoder_gpus = gpu_shares(profile, encoder_profile)
    encoder = _deployment(
        "TextEncoder",
        {"model": dict(manifest)},
        _share(groups, encoder_group, ENCODER_SHARE, encoder_gpus),
    )
    if spec.text_encoder is not None:
        encoder["autoscaling_config"] = _bounds(spec.text_encoder.replicas)
    generator = _deployment(
        "Generator",
        {"model": dict(manifest), "adapters": [dict(adapter) for adapter in adapters]},
        _share(groups, GENERATOR, GENERATOR_SHARE, generator_gpus),
        max_ongoing_requests=16,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    generator["autoscaling_config"] = _scaling(model)
    control = _share(groups, CONTROL, 0.001, 0)
    return {
        "name": model.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"model": model.name, "threads": profile.threads, "gpus": generator_gpus},
        "runtime_env": {},
        "deployments": [
            _deployment("Dispatcher", {"model": model.name}, control),
            _deployment("Moderator", dict(moderation), control),
            encoder,
            generator,
            _deployment("Ingress", None, control),
        ],
    }


def serve_config(application: Mapping[str, Any]) -> str:
    """``serveConfigV2``: JSON, which is YAML too, and in one order of keys."""
    return json.dumps({"applications": [application]}, separators=(",", ":"))


def config_hash(application: Mapping[str, Any]) -> str:
    """What ``/internal/v1/status`` calls ``configHash`` once replicas were given this."""
    generator = next(d for d in application["deployments"] if d["name"] == "Generator")
    return hash_of(generator["user_config"])


def _deployment(
    name: str, user_config: dict[str, Any] | None, actor: dict[str, Any], **options: Any
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "ray_actor_options": actor, **options}
    if user_config is not None:
        found["user_config"] = user_config
    return found


def _share(groups: bool, group: str, share: float, gpus: float) -> dict[str, Any]:
    """An actor's options. CPUs are not counted: pods bound them, and groups place the actors."""
    found: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus}
    if groups:
        found["resources"] = {group_resource(group): share}
    return found


def _bounds(replicas: Replicas) -> dict[str, Any]:
    return {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "initial_replicas": max(1, replicas.min),
    }


def _scaling(model: ImageModel) -> dict[str, Any]:
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

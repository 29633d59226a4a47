"""The model app of Ray Serve: dispatcher, moderator, text encoder, generator.

One application per ImageModel. What a manifest says travels as ``user_config``: Serve gives it to
every replica, also to one that takes the place of a dead one, and changing it restarts nothing.
`cluster` names it to Serve.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from calotype.serving.deployments.gpu_shares import GpuShares
from calotype.serving.deployments.replicas.dispatcher import DispatcherDeployment
from calotype.serving.deployments.replicas.generator import GeneratorDeployment
from calotype.serving.deployments.replicas.moderator import ModeratorDeployment
from calotype.serving.deployments.replicas.text_encoder import TextEncoderDeployment
from calotype.serving.deployments.serve_config import MODEL_CPUS, QUIET_LOG

DRAIN_SECONDS = 300.0
"""Longer than the slowest picture; Serve's own 20 s would cut most of them off."""
QUICK_SHUTDOWN_SECONDS = 0.5
"""How often Serve looks whether a replica that shall stop is idle; its own 2 s delay every end."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the deployments of a model app keep what outlives them."""

    database_url: str
    blob_url: str
    audit_folder: pathlib.Path


@dataclass(frozen=True, slots=True)
class ModelApp:
    """The bound deployments that others call; the generator pulls the text encoder in."""

    dispatcher: Any
    moderator: Any
    generator: Any


def bind_model_app(
    places: Places,
    model: str,
    scaling: AutoscalingConfig,
    threads: int,
    gpus: GpuShares,
) -> ModelApp:
    """The deployments of one model; a Serve config file gives them their ``user_config``.

    Args:
        threads: torch threads of text encoder and generator.
        gpus: of one generator replica and of one of the text encoder.
    """
    light: dict[str, Any] = {"num_cpus": 0}
    heavy: dict[str, Any] = {"num_cpus": MODEL_CPUS}

    def deployment(cls: type, name: str, **options: Any) -> Any:
        return serve.deployment(cls).options(
            name=name,
            graceful_shutdown_wait_loop_s=QUICK_SHUTDOWN_SECONDS,
            logging_config=QUIET_LOG,
            **options,
        )

    moderator = deployment(
        ModeratorDeployment, "Moderator", max_ongoing_requests=64, ray_actor_options=light
    ).bind(str(places.audit_folder), places.database_url)
    dispatcher = deployment(
        DispatcherDeployment,
        "Dispatcher",
        num_replicas=1,
        max_ongoing_requests=10_000,
        ray_actor_options=light,
    ).bind(places.database_url, model, moderator)
    text_encoder = deployment(
        TextEncoderDeployment,
        "TextEncoder",
        max_ongoing_requests=32,
        ray_actor_options=heavy | {"num_gpus": gpus.encoder},
    ).bind(threads, dispatcher)
    generator = deployment(
        GeneratorDeployment,
        "Generator",
        autoscaling_config=scaling,
        max_ongoing_requests=16,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options=heavy | {"num_gpus": gpus.generator},
    ).bind(places.blob_url, threads, dispatcher, moderator, text_encoder)
    return ModelApp(dispatcher, moderator, generator)

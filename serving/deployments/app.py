"""The model app of Ray Serve: dispatcher, moderator, text encoder, generator.

    serve run calotype.serving.deployments.app:build_app manifests=examples data_dir=data
    serve build calotype.serving.deployments.application:app -o serve.yaml

One application per ImageModel. What a manifest says travels as ``user_config``: Serve gives it to
every replica, also to one that takes the place of a dead one, and changing it restarts nothing.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from calotype.serving.config import ImageModel, LoRAAdapter, load_manifests, with_defaults
from calotype.serving.config.environment import DATA_DIR
from calotype.serving.database.connection import sqlite_url
from calotype.serving.deployments.gpu_shares import NO_GPUS, GpuShares
from calotype.serving.deployments.preparation import moderation_of
from calotype.serving.deployments.ray_host.environment import QUIET_THREADS
from calotype.serving.deployments.replicas.dispatcher import DispatcherDeployment
from calotype.serving.deployments.replicas.gateway import GatewayDeployment
from calotype.serving.deployments.replicas.generator import GeneratorDeployment
from calotype.serving.deployments.replicas.moderator import ModeratorDeployment
from calotype.serving.deployments.replicas.text_encoder import TextEncoderDeployment
from calotype.serving.deployments.serve_config import (
    MODEL_CPUS,
    POLICY_PATH,
    QUIET_LOG,
    scaling,
    user_config,
)
from calotype.serving.wire.application import ModeratorConfig

DRAIN_SECONDS = 300.0
"""Longer than the slowest picture; Serve's own 20 s would cut most of them off."""
QUICK_SHUTDOWN_SECONDS = 0.5
"""How often Serve looks whether a replica that shall stop is idle; its own 2 s delay every end."""


class AppOptions(BaseModel):
    """Arguments of ``serve run``."""

    model_config = ConfigDict(extra="forbid")

    manifests: str = Field("", description="Files or folders of manifests, separated by commas.")
    data_dir: str = Field("data", description="Folder of the job database and the pictures.")
    threads: int = Field(1, ge=1, description="Threads of torch in one replica.")
    gpus: float = Field(0, ge=0, description="GPUs of one generator and one text encoder.")


def build_app(arguments: dict[str, Any]) -> Application:
    """The first model of the manifests with a gateway in front: everything behind one port.

    Args:
        arguments: `AppOptions`; from ``serve run`` every value is text.
    """
    options = AppOptions.model_validate(arguments)
    paths = [pathlib.Path(part) for part in options.manifests.split(",") if part]
    found = with_defaults(load_manifests(paths))
    model, adapters = found.models[0], found.adapters
    data_dir = pathlib.Path(options.data_dir).resolve()
    name = "default"  # what `serve run` calls its application
    generator = build_model_app(
        *(model, adapters, moderation_of(model, found), data_dir),
        threads=options.threads,
        gpus=GpuShares(options.gpus, options.gpus),
        # Replicas do not get the arguments of the command that started them: the keys of the marks
        # lie in the data folder.
        environment=QUIET_THREADS | {DATA_DIR: str(data_dir)},
    )
    config = user_config(model, adapters)["Generator"]
    ingress = serve.deployment(serve.ingress()(GatewayDeployment))
    return ingress.options(
        name="Gateway",
        user_config=config,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    ).bind(str(data_dir), name, os.environ.get("CALOTYPE_API_KEY"), generator)


def build_model_app(
    model: ImageModel,
    adapters: Sequence[LoRAAdapter],
    moderation: ModeratorConfig | None,
    data_dir: pathlib.Path,
    *,
    threads: int = 1,
    gpus: GpuShares = NO_GPUS,
    environment: Mapping[str, str] | None = None,
) -> Application:
    """One model's deployments; the generator is the root.

    Args:
        moderation: the moderator's configuration; None = it checks by the package's policy.
        threads: torch threads of text encoder and generator.
        gpus: of one generator replica and of one of the text encoder.
        environment: variables of the replicas; None where they inherit all that they need.
    """
    places = Places(sqlite_url(data_dir), (data_dir / "assets").as_uri(), data_dir / "audit")
    configs = user_config(model, adapters, moderation)
    bounds = AutoscalingConfig(
        **scaling(model), policy=AutoscalingPolicy(policy_function=POLICY_PATH)
    )
    return bind_model_app(places, model.name, bounds, configs, threads, gpus, environment).generator


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
    configs: Mapping[str, dict[str, Any]],
    threads: int,
    gpus: GpuShares,
    environment: Mapping[str, str] | None = None,
) -> ModelApp:
    """The deployments of one model.

    Args:
        configs: deployment name -> ``user_config``; empty where a Serve config file gives them.
        threads, gpus, environment: see `build_model_app`.
    """
    told = {"runtime_env": {"env_vars": dict(environment)}} if environment else {}
    light = {"num_cpus": 0, **told}
    heavy = {"num_cpus": MODEL_CPUS, **told}

    def deployment(cls: type, name: str, **options: Any) -> Any:
        return serve.deployment(cls).options(
            name=name,
            user_config=configs.get(name),
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

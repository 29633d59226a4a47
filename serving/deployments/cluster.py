"""The model app of a cluster: what the operator names as ``import_path`` of a Serve application.

    name: flux-2-dev
    route_prefix: /
    import_path: calotype.serving.deployments.cluster:build_app
    args: {model: flux-2-dev, threads: 4, gpus: 1}
    deployments:
      - {name: Dispatcher, user_config: {model: flux-2-dev}}
      - {name: Moderator, user_config: {policy: null, policies: {}}}
      - {name: TextEncoder, user_config: {model: ...}}
      - {name: Generator, user_config: {model: ..., adapters: [...]}, autoscaling_config: {...}}

What a manifest says is in the ``user_config`` of the deployments (`serve_config.user_config`), so
that changing it restarts nothing. Where things are kept comes from the environment of the pods
(`calotype.serving.config.environment`). No gateway is inside: the ingress answers the cluster's
gateways. On one machine ``build_parts`` is named instead: the ingress is in the process that holds
Ray there (`ray_host.ingress`).
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from calotype.serving.config import describe
from calotype.serving.config.environment import ClusterEnvironment, Storage
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.deployments.app import (
    QUICK_SHUTDOWN_SECONDS,
    ModelApp,
    Places,
    bind_model_app,
)
from calotype.serving.deployments.gpu_shares import GpuShares
from calotype.serving.deployments.replicas.ingress import IngressDeployment
from calotype.serving.deployments.serve_config import POLICY_PATH, QUIET_LOG


class ClusterOptions(BaseModel):
    """``args`` of the application. Changing one of them restarts every replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="Name of the ImageModel.")
    threads: int = Field(1, ge=1, description="Threads of torch in one replica.")
    gpus: float = Field(0, ge=0, description="GPUs of one generator and one text encoder.")


def build_app(arguments: dict[str, Any]) -> Application:
    """The deployments of one model behind an ingress.

    Raises:
        InvalidRequest: an argument or an environment variable is missing or wrong.
    """
    ClusterEnvironment.read()
    parts = _bind(arguments)
    ingress = serve.deployment(serve.ingress()(IngressDeployment)).options(
        name="Ingress",
        max_ongoing_requests=2000,
        graceful_shutdown_wait_loop_s=QUICK_SHUTDOWN_SECONDS,
        logging_config=QUIET_LOG,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(parts.dispatcher, parts.moderator, parts.generator)


def build_parts(arguments: dict[str, Any]) -> Application:
    """The same deployments without the ingress.

    Raises:
        InvalidRequest: an argument or an environment variable is missing or wrong.
    """
    return _bind(arguments).generator


def _bind(arguments: dict[str, Any]) -> ModelApp:
    try:
        options = ClusterOptions.model_validate(arguments)
    except ValidationError as error:
        raise InvalidRequest(f"args of the application: {describe(error)}") from None
    kept = Storage.read()
    places = Places(kept.database_url, kept.blob_url, kept.data_dir / "audit")
    # One replica, unless the config file says otherwise.
    scaling = AutoscalingConfig(
        min_replicas=1, max_replicas=1, policy=AutoscalingPolicy(policy_function=POLICY_PATH)
    )
    gpus = GpuShares(options.gpus, options.gpus)
    return bind_model_app(places, options.model, scaling, options.threads, gpus)

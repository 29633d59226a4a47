"""Serve applications of one Ray, by the calls that KubeRay makes through Serve's REST interface."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from calotype.serving.config import describe
from calotype.serving.core.errors import CalotypeError, ModelLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.gpu_shares import local_shares
from calotype.serving.deployments.remote import call
from calotype.serving.deployments.serve_config import GPUS, MODEL_CPUS


def deploy(applications: Sequence[JsonObject]) -> None:
    """Has Serve run exactly these; what differs is changed. Returns at once.

    Raises:
        ModelLoadFailed: one describes no application, or needs GPUs that are not there.
    """
    config = ServeDeploySchema(
        applications=[_checked(_placed(application)) for application in applications]
    )
    _get_global_client().deploy_apps(config)


def _checked(application: JsonObject) -> ServeApplicationSchema:
    try:
        return ServeApplicationSchema.model_validate(application)
    except ValidationError as error:
        name = application.get("name", "default")
        raise ModelLoadFailed(f"The application {name}: {describe(error)}") from None


def _placed(application: JsonObject) -> JsonObject:
    """With its share of this machine's GPUs, where it asks for one.

    As an option of the two deployments and not as an argument of the application: a change of an
    argument restarts every replica.
    """
    wanted = application.get(GPUS)
    if not isinstance(wanted, dict):
        return application
    present = int(ray.cluster_resources().get("GPU", 0))
    shares = local_shares(str(wanted["device"]), int(wanted["devices"]), present)
    gpus = {"Generator": shares.generator, "TextEncoder": shares.encoder}
    deployments = []
    for deployment in application["deployments"]:
        share = gpus.get(deployment["name"])
        actor = {"ray_actor_options": {"num_cpus": MODEL_CPUS, "num_gpus": share}}
        deployments.append(deployment if share is None else deployment | actor)
    kept = {name: value for name, value in application.items() if name != GPUS}
    return kept | {"deployments": deployments}


def statuses(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Application -> its status in Serve's words, and the last line of what is wrong."""
    known = serve.status().applications
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        overview = known.get(name)
        lines = [] if overview is None else str(overview.message).strip().splitlines()
        status = "DEPLOYING" if overview is None else str(overview.status.value)
        found[name] = (status, lines[-1].strip(" .") if lines else "")
    return found


async def drain(name: str, seconds: float) -> None:
    """Returns when no picture of the application is being drawn any more, or in time."""
    with contextlib.suppress(RayServeException, CalotypeError):
        dispatcher = serve.get_deployment_handle("Dispatcher", name)
        await call(
            lambda: dispatcher.drain.remote(seconds),
            "The dispatcher",
            patience=0,
            limit=seconds + 10,
        )


def shut_down() -> None:
    """Ends every replica."""
    serve.shutdown()

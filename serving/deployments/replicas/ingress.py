"""What stands behind the HTTP side of a model app: the handles of its deployments.

In a Ray cluster that side is a deployment itself; on one machine `ray_host.ingress` has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI

from calotype.serving.cluster.model_ingress import build_ingress
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.deployments.remote import RemoteSafety, call
from calotype.serving.wire.model_status import ModelAppStatus

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from calotype.serving.core.request import Pixels

SUBMIT_PATIENCE = 10.0
MODERATE_PATIENCE = 15.0
STATUS_PATIENCE = 2.0


class ServedModelApp:
    """`model_ingress.ModelApp` over the handles of an application; holds no state."""

    def __init__(self, dispatcher: DeploymentHandle, moderator: DeploymentHandle) -> None:
        self._dispatcher = dispatcher
        self._safety = RemoteSafety(moderator, MODERATE_PATIENCE)

    async def submit(self, job_id: str) -> None:
        await call(
            lambda: self._dispatcher.submit.remote(job_id),
            "The dispatcher",
            patience=SUBMIT_PATIENCE,
        )

    async def wait(self, job_id: str, seconds: float) -> None:
        await call(
            lambda: self._dispatcher.wait.remote(job_id, seconds),
            "The dispatcher",
            patience=0,
            limit=seconds + 5,
        )

    async def cancel(self, job_id: str) -> None:
        await call(lambda: self._dispatcher.cancel.remote(job_id), "The dispatcher")

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
    ) -> list[Decision]:
        return list(
            await asyncio.gather(
                *(self._safety.check_prompt(text, scope) for text in texts),
                *(
                    self._safety.check_image(image, ImageContext.of_upload(scope))
                    for image in images
                ),
            )
        )

    async def status(self) -> ModelAppStatus:
        """What the dispatcher says of the whole app."""
        found = await call(
            lambda: self._dispatcher.status.remote(),
            "The dispatcher",
            patience=STATUS_PATIENCE,
            limit=5,
        )
        return ModelAppStatus.model_validate(found)


class IngressDeployment(ServedModelApp):
    """The HTTP side as a Ray Serve deployment.

    Args:
        generator: bound so that Serve deploys it beside the ingress; called by nobody here.
    """

    def __init__(
        self, dispatcher: DeploymentHandle, moderator: DeploymentHandle, generator: DeploymentHandle
    ) -> None:
        super().__init__(dispatcher, moderator)
        self._token = ClusterEnvironment.read().internal_token

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_ingress(self, self._token)

"""`protocols.GenerationBackend` over the handles of the model apps."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ray import serve

from calotype.serving.cluster.remote_backend import model_status
from calotype.serving.core.decision import CheckScope, Decision, ImageContext
from calotype.serving.core.errors import CalotypeError, ModerationUnavailable, Overloaded
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.database.database import Database
from calotype.serving.deployments.remote import RemoteSafety, call
from calotype.serving.wire.model_status import ModelAppStatus

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from calotype.serving.core.request import Pixels

log = logging.getLogger(__name__)

SUBMIT_PATIENCE = 15.0
POLL_SECONDS = 0.5
"""Pause of a wait whose dispatcher is away; the caller asks the database after it."""


class RayBackend:
    """Finds the dispatcher of a job's model by name, so it outlives redeployments.

    Args:
        models: model name -> name of its Serve application; may be replaced while running.
    """

    def __init__(self, database: Database, models: Mapping[str, str]) -> None:
        self.models = dict(models)
        self._database = database
        self._model_of = functools.lru_cache(10_000)(self._look_up)

    async def submit(self, job_id: str) -> None:
        dispatcher = await self._dispatcher_of(job_id)
        await call(
            lambda: dispatcher.submit.remote(job_id), "The dispatcher", patience=SUBMIT_PATIENCE
        )

    async def wait(self, job_id: str, timeout: float) -> None:
        try:
            dispatcher = await self._dispatcher_of(job_id)
            await call(
                lambda: dispatcher.wait.remote(job_id, timeout),
                "The dispatcher",
                patience=0,
                limit=timeout + 5,
            )
        except Overloaded as error:
            log.warning("waiting without the dispatcher: %s", error.message)
            await asyncio.sleep(min(POLL_SECONDS, timeout))

    async def cancel(self, job_id: str) -> None:
        dispatcher = await self._dispatcher_of(job_id)
        await call(lambda: dispatcher.cancel.remote(job_id), "The dispatcher")

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        apps = [app for name, app in self.models.items() if models is None or name in models]
        if not apps:
            raise ModerationUnavailable(
                "None of the models whose policy it is checked against runs at the moment.",
                retry_after=5,
            )
        safety = RemoteSafety(self._handle("Moderator", apps[0]), 15.0)
        context = ImageContext.of_upload(scope)
        return list(
            await asyncio.gather(
                *(safety.check_prompt(text, scope) for text in texts),
                *(safety.check_image(image, context) for image in images),
            )
        )

    async def status(self) -> list[ModelStatus]:
        return [await self._status(model, app) for model, app in self.models.items()]

    async def _status(self, model: str, app: str) -> ModelStatus:
        try:
            handle = self._handle("Dispatcher", app)
            found = await call(
                lambda: handle.status.remote(), "The dispatcher", patience=2, limit=5
            )
        except CalotypeError as error:
            return ModelStatus(model, ready=False, message=error.message, answers=False)
        return model_status(model, ModelAppStatus.model_validate(found))

    async def _dispatcher_of(self, job_id: str) -> DeploymentHandle:
        model = await asyncio.to_thread(self._model_of, job_id)
        if model not in self.models:
            raise Overloaded("The model of this job is not served at the moment.", retry_after=30)
        return self._handle("Dispatcher", self.models[model])

    def _look_up(self, job_id: str) -> str:
        """The model of a job, which never changes.

        Raises:
            Overloaded: there is no such job, or not any more.
        """
        job = self._database.jobs.get_job(job_id)
        if job is None:
            raise Overloaded("This job is not known at the moment.", retry_after=30)
        return job.model

    def _handle(self, deployment: str, app: str) -> DeploymentHandle:
        try:
            return serve.get_deployment_handle(deployment, app)
        except Exception as error:  # Serve itself is away or the app is not there
            raise Overloaded(f"The application {app} is not running.", retry_after=5) from error

"""`protocols.GenerationBackend` over HTTP: model apps that run elsewhere, or are away for a while.

Jobs are durable before anything is sent here. A model app that cannot be reached costs time and
nothing else: its dispatcher finds the jobs in the database when it comes back.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx
from PIL import Image
from pydantic import ValidationError

from calotype.moderation.policy.text_time import text_seconds
from calotype.serving.config import describe
from calotype.serving.core.decision import CheckScope, Decision
from calotype.serving.core.errors import (
    CalotypeError,
    ModerationUnavailable,
    Overloaded,
    error_from_payload,
)
from calotype.serving.core.protocols import PART_BYTES, ModelStatus
from calotype.serving.core.tls import believed_certificates
from calotype.serving.database.database import Database
from calotype.serving.wire.model_status import ModelAppStatus
from calotype.serving.wire.model_token import ModelIdentity, make_model_token

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
CALL_SECONDS = 15.0
CHECK_SECONDS = 60.0
STATUS_SECONDS = 3.0
STATUS_AGE = 1.0
"""For so long an answer to `status` is good for the next one who asks."""
PAUSE_SECONDS = 0.5
"""How often the database is asked instead of a dispatcher that is away."""


def model_status(model: str, app: ModelAppStatus) -> ModelStatus:
    """The part of a model app's status that a gateway shows."""
    return ModelStatus(
        model,
        ready=app.ready,
        replicas=app.replicas,
        queue_seconds=app.queue_seconds,
        adapters=app.adapters,
        message=app.message,
    )


class RemoteBackend:
    """Sends requests to the ingress of each model app (`cluster.model_ingress`).

    Args:
        token: the internal token of this service.
    """

    def __init__(self, database: Database, token: str) -> None:
        self.endpoints: dict[str, str] = {}
        """Model -> base URL of its app; may be replaced while running."""
        self.namespaces: dict[str, str] = {}
        """Model -> namespace of its ImageModel."""
        self.default_model: str | None = None
        """Of requests that name none."""
        self._token = token
        self._database = database
        self._model_of = functools.lru_cache(10_000)(self._look_up)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(CALL_SECONDS, connect=CONNECT_SECONDS),
            # A waiting client holds one connection.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            verify=believed_certificates(),
            trust_env=False,
        )
        self._asking = asyncio.Lock()
        self._statuses: list[ModelStatus] = []
        self._asked = float("-inf")

    async def close(self) -> None:
        await self._client.aclose()

    async def submit(self, job_id: str) -> None:
        await self._post(await self._app_of(job_id), f"jobs/{job_id}/submit")

    async def wait(self, job_id: str, timeout: float) -> None:
        try:
            model = await self._app_of(job_id)
            await self._post(
                model, f"jobs/{job_id}/wait", timeout + 5, params={"seconds": f"{timeout:.3f}"}
            )
        except CalotypeError as error:
            log.debug("waiting for job %s without its model app: %s", job_id, error.message)
            await asyncio.sleep(min(PAUSE_SECONDS, timeout))

    async def cancel(self, job_id: str) -> None:
        await self._post(await self._app_of(job_id), f"jobs/{job_id}/cancel")

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        """Asks the first model app that answers, of those that may see what any team asks.

        Args:
            models: those that know the policies of the team's requests; None = every one.
        """
        problem = "This service has no model at the moment."
        seconds = text_seconds(CHECK_SECONDS, sum(map(len, texts)))
        for model in self._moderating_models():
            if models is not None and model not in models:
                continue
            try:
                answer = await self._post(
                    model, "moderate", seconds, content=_moderate_body(texts, images, scope)
                )
            except Overloaded as error:
                problem = error.message
                continue
            return [Decision.from_payload(found) for found in answer.json()["decisions"]]
        raise ModerationUnavailable(f"The safety stage cannot check it. {problem}", retry_after=5)

    def _moderating_models(self) -> list[str]:
        """The default model, then the others of its namespace: those of other namespaces are run by
        others, and are no place for what a team asks without naming a model."""
        home = self.namespaces.get(self.default_model or "")
        own = [m for m in self.endpoints if home is None or self.namespaces.get(m) == home]
        return sorted(own, key=lambda model: model != self.default_model)

    async def status(self) -> list[ModelStatus]:
        async with self._asking:
            if time.monotonic() - self._asked > STATUS_AGE:
                self._statuses = list(
                    await asyncio.gather(*(self._status(model) for model in list(self.endpoints)))
                )
                self._asked = time.monotonic()
            return self._statuses

    async def _status(self, model: str) -> ModelStatus:
        try:
            answer = await self._call(model, "GET", "status", STATUS_SECONDS)
            return model_status(model, ModelAppStatus.model_validate_json(answer.content))
        except CalotypeError as error:
            away = error.details.get("estimated_seconds")
            return ModelStatus(
                model,
                ready=False,
                message=error.message,
                answers=False,
                away_seconds=float(away) if isinstance(away, int | float) else None,
            )
        except ValidationError as error:
            problem = f"Its app answers what is no status: {describe(error)}"
            return ModelStatus(model, ready=False, message=problem)

    async def _app_of(self, job_id: str) -> str:
        model = await asyncio.to_thread(self._model_of, job_id)
        if model not in self.endpoints:
            raise Overloaded("The model of this job is not served at the moment.", retry_after=30)
        return model

    def _look_up(self, job_id: str) -> str:
        """The model of a job, which never changes.

        Raises:
            Overloaded: there is no such job, or not any more.
        """
        job = self._database.jobs.get_job(job_id)
        if job is None:
            raise Overloaded("This job is not known at the moment.", retry_after=30)
        return job.model

    def _token_of(self, model: str) -> str:
        """What a model app knows us by: it opens no other one."""
        namespace = self.namespaces.get(model)
        if namespace is None:
            return self._token
        return make_model_token(self._token, ModelIdentity(namespace, model))

    async def _post(
        self,
        model: str,
        path: str,
        seconds: float = CALL_SECONDS,
        *,
        params: Mapping[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
    ) -> httpx.Response:
        return await self._call(model, "POST", path, seconds, params=params, content=content)

    async def _call(
        self, model: str, method: str, path: str, seconds: float, **content: Any
    ) -> httpx.Response:
        """One request.

        Raises:
            Overloaded: the app cannot be reached, or something between answers for it.
            CalotypeError: what the app raised.
        """
        url = self.endpoints.get(model, "").rstrip("/")
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        headers = {"authorization": f"Bearer {self._token_of(model)}"}

        async def ask() -> httpx.Response:
            return await self._client.request(
                method,
                f"{url}/internal/v1/{path}",
                timeout=timeout,
                headers=headers,
                **content,
            )

        try:
            try:
                answer = await ask()
            except (httpx.ReadError, httpx.RemoteProtocolError):
                if method != "GET":
                    raise
                answer = await ask()  # the connection was of an app that has died since
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Overloaded(
                f"The model {model} cannot be reached at the moment.", retry_after=10
            ) from error
        if answer.is_success:
            return answer
        raise _error(model, answer)


def _error(model: str, answer: httpx.Response) -> CalotypeError:
    try:
        return error_from_payload(answer.json()["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        # Serve's own proxy, while the app behind it is not there.
        return Overloaded(
            f"The model {model} is starting or stopping (status {answer.status_code}).",
            retry_after=10,
        )


async def _moderate_body(
    texts: Sequence[str], images: Sequence[Pixels], scope: CheckScope | None
) -> AsyncIterator[bytes]:
    """The JSON of a call of `moderate`, in pieces: its pictures may be large."""
    asked = None if scope is None else scope.to_payload()
    yield f'{{"texts": {json.dumps(list(texts))}, "scope": {json.dumps(asked)}'.encode()
    yield b', "images": ['
    for number, image in enumerate(images):
        yield b', "' if number else b'"'
        packed = await asyncio.to_thread(_packed, image)
        for start in range(0, len(packed), PART_BYTES):
            yield base64.b64encode(packed[start : start + PART_BYTES])
        yield b'"'
    yield b"]}"


def _packed(pixels: Pixels) -> memoryview:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return file.getbuffer()

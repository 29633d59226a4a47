"""What a model app answers to gateways and to the operator, over HTTP.

    POST /internal/v1/jobs/{id}/submit          204; the job is queued in the database
    POST /internal/v1/jobs/{id}/wait?seconds=   204 when it is over or the time is
    POST /internal/v1/jobs/{id}/cancel          204
    POST /internal/v1/moderate                     {"texts": [...], "images": [base64 file, ...]}
    GET  /internal/v1/status                    how the model and its replicas are

All of them need ``Authorization: Bearer $CALOTYPE_INTERNAL_TOKEN``: the token of the model
(`wire.model_token`), or the internal one of a service whose parts share it. An error is the JSON of
`CalotypeError.to_payload` under ``error``. Jobs and pictures do not travel here: both sides know
the same job database and the same blob store. The other end is `remote_backend`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.http.body import read_json
from calotype.serving.api.http.failures import wire
from calotype.serving.core.decision import CheckScope, Decision
from calotype.serving.core.errors import CalotypeError, InvalidRequest, Unauthenticated
from calotype.serving.wire.model_status import ModelAppStatus
from calotype.serving.wire.model_token import read_model_token

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

MAX_WAIT_SECONDS = 60.0
MAX_BODY_BYTES = 128 * 1024 * 1024
"""More than a gateway sends: one view of a picture that /v1/moderations takes, or its texts."""


class ModelApp(Protocol):
    """What stands behind the ingress; see `protocols.GenerationBackend`."""

    async def submit(self, job_id: str) -> None: ...

    async def wait(self, job_id: str, seconds: float) -> None: ...

    async def cancel(self, job_id: str) -> None: ...

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
    ) -> list[Decision]:
        """Decisions for every text, then for every image."""
        ...

    async def status(self) -> ModelAppStatus:
        """The answer of GET /internal/v1/status."""
        ...


def build_ingress(model_app: ModelApp, token: str) -> FastAPI:
    """The HTTP side of a model app.

    Args:
        token: what callers must show.
    """
    ingress = Ingress(model_app, token)
    app = FastAPI(title="calotype model app", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(CalotypeError, _on_error)
    jobs = "/internal/v1/jobs/{job_id}"
    app.add_api_route(f"{jobs}/submit", ingress.submit, methods=["POST"])
    app.add_api_route(f"{jobs}/wait", ingress.wait, methods=["POST"])
    app.add_api_route(f"{jobs}/cancel", ingress.cancel, methods=["POST"])
    app.add_api_route("/internal/v1/moderate", ingress.moderate, methods=["POST"])
    app.add_api_route("/internal/v1/status", ingress.status, methods=["GET"])
    return app


class Ingress:
    """The routes; holds no state."""

    def __init__(self, model_app: ModelApp, token: str) -> None:
        self._app, self._token = model_app, token.encode()

    async def submit(self, request: Request) -> Response:
        await self._app.submit(self._job(request))
        return Response(status_code=204)

    async def wait(self, request: Request) -> Response:
        await self._app.wait(self._job(request), _seconds(request))
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        await self._app.cancel(self._job(request))
        return Response(status_code=204)

    async def moderate(self, request: Request) -> JSONResponse:
        self._check(request)
        body = await read_json(request, MAX_BODY_BYTES)
        texts, images = body.get("texts"), body.get("images")
        if not isinstance(texts, list) or not isinstance(images, list):
            raise InvalidRequest("The body must hold the lists texts and images.")
        pictures = await asyncio.to_thread(lambda: [_pixels(image) for image in images])
        scope = body.get("scope")
        if scope is not None and not isinstance(scope, dict):
            raise InvalidRequest("scope must be an object with policies and wish, or null.")
        decisions = await self._app.moderate(
            [str(text) for text in texts], pictures, CheckScope.from_payload(scope)
        )
        return JSONResponse({"decisions": [decision.to_payload() for decision in decisions]})

    async def status(self, request: Request) -> JSONResponse:
        self._check(request)
        return JSONResponse((await self._app.status()).payload())

    def _job(self, request: Request) -> str:
        self._check(request)
        return str(request.path_params["job_id"])

    def _check(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        token = self._token.decode()
        known = hmac.compare_digest(given.encode("utf-8", "replace"), self._token)
        if scheme != "Bearer" or not (known or read_model_token(token, given) is not None):
            raise Unauthenticated(
                "The internal token is missing or wrong: gateway and model app must have the same "
                "CALOTYPE_INTERNAL_TOKEN."
            )


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CalotypeError)
    return JSONResponse({"error": error.to_payload()}, status_code=wire(error).status)


def _seconds(request: Request) -> float:
    given = request.query_params.get("seconds", "")
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise InvalidRequest(
            f"seconds must be 0 to {MAX_WAIT_SECONDS:g}, got {given[:40]!r}.", param="seconds"
        )
    return seconds


def _pixels(image: object) -> Pixels:
    try:
        data = base64.b64decode(str(image), validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest(f"images must hold base64 of picture files: {error}.") from None

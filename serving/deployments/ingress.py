"""What a model app answers to gateways and to the operator, over HTTP.

    POST /internal/v1/jobs/{id}/submit          204; the job is queued in the store
    POST /internal/v1/jobs/{id}/wait?seconds=   204 when it is over or the time is
    POST /internal/v1/jobs/{id}/cancel          204
    POST /internal/v1/judge                     {"texts": [...], "images": [base64 file, ...]}
    GET  /internal/v1/status                    see `status_payload`

All of them need ``Authorization: Bearer $CALOTYPE_INTERNAL_TOKEN``. An error is the JSON of
`CalotypeError.to_payload` under ``error``. Jobs and pictures do not travel here: both sides know
the same job database and the same blob store.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.serving.api.body import read_json
from calotype.serving.api.failures import wire
from calotype.serving.deployments.remote import RemoteSafety, call
from calotype.serving.environment import ClusterEnvironment
from calotype.serving.errors import CalotypeError, InvalidRequest, Unauthenticated

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from calotype.serving.request import Pixels

MAX_WAIT_SECONDS = 60.0
MAX_BODY_BYTES = 256 * 1024 * 1024
"""What the gateway lets through: 64 pictures of /v1/moderations, decoded and packed again."""
SUBMIT_PATIENCE = 10.0
JUDGE_PATIENCE = 15.0


class IngressDeployment:
    """Relays to the handles of its application; holds no state.

    Args:
        generator: bound so that Serve deploys it beside the ingress; called by nobody here.
    """

    def __init__(
        self, dispatcher: DeploymentHandle, moderator: DeploymentHandle, generator: DeploymentHandle
    ) -> None:
        self._dispatcher = dispatcher
        self._safety = RemoteSafety(moderator, JUDGE_PATIENCE)
        self._token = ClusterEnvironment.read().internal_token.encode()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="calotype model app", docs_url=None, redoc_url=None, openapi_url=None)
        app.add_exception_handler(CalotypeError, _on_error)
        jobs = "/internal/v1/jobs/{job_id}"
        app.add_api_route(f"{jobs}/submit", self.submit, methods=["POST"])
        app.add_api_route(f"{jobs}/wait", self.wait, methods=["POST"])
        app.add_api_route(f"{jobs}/cancel", self.cancel, methods=["POST"])
        app.add_api_route("/internal/v1/judge", self.judge, methods=["POST"])
        app.add_api_route("/internal/v1/status", self.status, methods=["GET"])
        return app

    async def submit(self, request: Request) -> Response:
        job_id = self._job(request)
        await call(
            lambda: self._dispatcher.submit.remote(job_id),
            "The dispatcher",
            patience=SUBMIT_PATIENCE,
        )
        return Response(status_code=204)

    async def wait(self, request: Request) -> Response:
        job_id, seconds = self._job(request), _seconds(request)
        await call(
            lambda: self._dispatcher.wait.remote(job_id, seconds),
            "The dispatcher",
            patience=0,
            limit=seconds + 5,
        )
        return Response(status_code=204)

    async def cancel(self, request: Request) -> Response:
        job_id = self._job(request)
        await call(lambda: self._dispatcher.cancel.remote(job_id), "The dispatcher")
        return Response(status_code=204)

    async def judge(self, request: Request) -> JSONResponse:
        self._check(request)
        body = await read_json(request, MAX_BODY_BYTES)
        texts, images = body.get("texts"), body.get("images")
        if not isinstance(texts, list) or not isinstance(images, list):
            raise InvalidRequest("The body must hold the lists texts and images.")
        pictures = await asyncio.to_thread(lambda: [_pixels(image) for image in images])
        decisions = await asyncio.gather(
            *(self._safety.judge_prompt(str(text)) for text in texts),
            *(self._safety.judge_image(picture) for picture in pictures),
        )
        return JSONResponse({"decisions": decisions})

    async def status(self, request: Request) -> JSONResponse:
        self._check(request)
        found = await call(
            lambda: self._dispatcher.status.remote(), "The dispatcher", patience=2, limit=5
        )
        return JSONResponse(status_payload(found))

    def _job(self, request: Request) -> str:
        self._check(request)
        return str(request.path_params["job_id"])

    def _check(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            raise Unauthenticated(
                "The internal token is missing or wrong: gateway and model app must have the same "
                "CALOTYPE_INTERNAL_TOKEN."
            )


def status_payload(status: Mapping[str, Any]) -> dict[str, Any]:
    """`DispatcherDeployment.status` with the names of the wire."""
    return {
        "name": status["name"],
        "ready": status["ready"],
        "replicas": status["replicas"],
        "queueSeconds": status["queue_seconds"],
        "configHash": status["config_hash"],
        "message": status["message"],
        "adapters": status["adapters"],
        "replicaStates": status["replica_states"],
    }


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

"""What gateways answer to model apps: the jobs of one model, and the pictures of these jobs.

    POST   /internal/v1/store/NAME   {arguments}; the answer is {"result": ...}
    GET, PUT, DELETE /internal/v1/blobs/KEY
    GET    /internal/v1/teams        for the operator: whose the teams are

A pod of a model has no way to the job database or to the bucket. Its token says whose model it is
(`wire.model_token`), and nothing here shows or changes what belongs to another one: jobs of other
models do not exist, a picture may be read where a running job is drawn from it, written where none
is yet, and an ending names only pictures that nobody else has. It listens on a port of its own,
which the chart routes to pods of models alone. The other end is `remote_job_store` and
`storage.gateway`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from calotype.moderation.records.heads import Head
from calotype.serving.api.http.body import limited_stream, read_json
from calotype.serving.api.http.failures import wire
from calotype.serving.api.http.stored import file_response, from_loop
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.core.errors import (
    CalotypeError,
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields
from calotype.serving.core.protocols import BlobStore, OpenBlob
from calotype.serving.core.request import GenerationRequest
from calotype.serving.database.database import Database
from calotype.serving.jobs.endings import Ending
from calotype.serving.jobs.forecast import Forecast
from calotype.serving.jobs.lease import LeaseProgress
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.outage import Outage
from calotype.serving.jobs.records import Checkpoint, JobRecord, PreviewRecord
from calotype.serving.storage import check_key
from calotype.serving.wire.job_calls import BLOBS_PATH, PATH, ending_of, row_payload
from calotype.serving.wire.model_token import read_model_token
from calotype.serving.wire.team_owners import TEAMS_PATH, OwnedTeam, TeamOwners, operator_token

MODERATORS_LOG = "audit-"
"""How the names of logs begin that moderators write."""
MAX_CALL_BYTES = 8 * 1024 * 1024
MAX_BLOB_BYTES = 128 * 1024 * 1024
"""Of a checkpoint of a large batch; pictures are smaller."""
BLOB_SECONDS = 60.0
BLOBS_AT_ONCE = 2
"""Written by one model; some MiB of each are held in memory on their way."""


def build_job_store_api(
    database: Database, blobs: BlobStore, catalog: Catalog, internal_token: str
) -> FastAPI:
    """The application of the internal port."""
    api = JobStoreApi(database, blobs, catalog, internal_token)
    app = FastAPI(title="calotype job store", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(CalotypeError, _on_error)
    app.add_api_route(f"{PATH}/{{name}}", api.call, methods=["POST"])
    app.add_api_route(TEAMS_PATH, api.teams, methods=["GET"])
    app.add_api_route(f"{BLOBS_PATH}/{{key:path}}", api.blob, methods=["GET", "PUT", "DELETE"])
    return app


class JobStoreApi:
    """The routes."""

    def __init__(
        self, database: Database, blobs: BlobStore, catalog: Catalog, internal_token: str
    ) -> None:
        self._database, self._blobs = database, blobs
        self._catalog, self._internal_token = catalog, internal_token
        self._rooms: dict[str, asyncio.Semaphore] = {}
        """Of each model, so that one that is slow does not delay the others."""

    async def call(self, request: Request) -> JSONResponse:
        calls = ModelJobs(self._database, self._model(request)).calls()
        found = calls.get(request.path_params["name"])
        if found is None:
            raise NotFound("The job store has no such call.")
        arguments = await read_json(request, MAX_CALL_BYTES)
        try:
            result = await asyncio.to_thread(lambda: found(**arguments))
        except (TypeError, KeyError) as error:
            raise InvalidRequest(f"The arguments of the call cannot be used: {error}.") from None
        return JSONResponse({"result": result})

    async def blob(self, request: Request) -> Response:
        model = self._model(request)
        pictures = ModelPictures(self._database, self._blobs, model)
        key = check_key(request.path_params["key"])
        if request.method == "GET":
            found = await asyncio.to_thread(pictures.open, key)
            return file_response(found, "application/octet-stream")
        async with self._rooms.setdefault(model, asyncio.Semaphore(BLOBS_AT_ONCE)):
            if request.method == "PUT":
                stream = limited_stream(request, MAX_BLOB_BYTES, BLOB_SECONDS)
                parts = from_loop(stream, asyncio.get_running_loop())
                await asyncio.to_thread(pictures.put_parts, key, parts)
            else:
                await asyncio.to_thread(pictures.delete, key)
        return Response(status_code=204)

    async def teams(self, request: Request) -> JSONResponse:
        wanted = f"Bearer {operator_token(self._internal_token)}".encode()
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, wanted):
            raise Unauthenticated("This is not the operator's token.")
        found = await asyncio.to_thread(self._database.teams.list_teams)
        owned = [OwnedTeam(name=t.name, namespace=t.namespace, uid=t.uid) for t in found]
        return JSONResponse(TeamOwners(teams=owned).payload())

    def _model(self, request: Request) -> str:
        """The model whose token is shown.

        One that is not on offer any more ends its jobs: gateways forget a model first, and its pods
        go when they have drained.

        Raises:
            Unauthenticated: it is nobody's, or of an ImageModel whose name is another one's.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        claimed = read_model_token(self._internal_token, token) if scheme == "Bearer" else None
        owners = {model.name: model.metadata.namespace for model in self._catalog.models()}
        if claimed is None or owners.get(claimed.name, claimed.namespace) != claimed.namespace:
            raise Unauthenticated("This is no token of a model here.")
        return claimed.name


class ModelJobs:
    """The job database as one model's dispatcher may use it."""

    def __init__(self, database: Database, model: str) -> None:
        self._database, self._model = database, model

    def calls(self) -> dict[str, Callable[..., Any]]:
        """Every call by its name."""
        return {
            name: getattr(self, name)
            for name in vars(type(self))
            if not name.startswith("_") and name != "calls"
        }

    # -- jobs ----------------------------------------------------------------------------------

    def get_job(self, job_id: str) -> JsonObject | None:
        return _shown(self._job(job_id))

    def open_jobs(self, status: str) -> list[JsonObject | None]:
        if status not in ("queued", "running"):
            raise InvalidRequest("Open jobs are queued or running.")
        found = self._database.jobs.open_jobs(self._model, status)  # type: ignore[arg-type]
        return [_shown(job) for job in found]

    def expired_leases(self, now: float) -> list[JsonObject | None]:
        return [_shown(job) for job in self._database.jobs.expired_leases(self._model, now)]

    def queued_job_ids(self, made_after: float | None) -> list[str]:
        return self._database.jobs.queued_job_ids(self._model, made_after)

    def start_job(self, job_id: str, replica: str, lease_expires: float) -> JsonObject | None:
        if self._job(job_id) is None:
            return None
        return _shown(self._database.jobs.start_job(job_id, replica, lease_expires))

    def requeue_job(
        self, job_id: str, fence: int, count_attempt: bool, outage: JsonObject | None
    ) -> JsonObject | None:
        if self._job(job_id) is None:
            return None
        waits = None if outage is None else Outage(**known_fields(Outage, outage))
        return _shown(self._database.jobs.requeue_job(job_id, fence, count_attempt, waits))

    def postpone_job(self, job_id: str, outage: JsonObject) -> None:
        if self._job(job_id) is not None:
            self._database.jobs.postpone_job(job_id, Outage(**known_fields(Outage, outage)))

    def renew_leases(
        self, replica: str, progress: dict[str, JsonObject], lease_expires: float
    ) -> None:
        own = {
            job_id: LeaseProgress.from_payload(at)
            for job_id, at in progress.items()
            if self._job(job_id) is not None
        }
        self._database.jobs.renew_leases(replica, own, lease_expires)

    def record_moderation(self, job_id: str, moderation: JsonObject) -> None:
        if self._job(job_id) is not None:
            record = ModerationRecord.from_payload(moderation)
            self._database.jobs.record_moderation(job_id, record)

    def finish_job(self, job_id: str, ending: JsonObject) -> JsonObject | None:
        job = self._job(job_id)
        if job is None or job.over:
            return None
        return _shown(self._database.jobs.finish_job(job_id, self._own(job, ending_of(ending))))

    # -- what belongs to jobs ------------------------------------------------------------------

    def get_checkpoint(self, job_id: str) -> JsonObject | None:
        if self._job(job_id) is None:
            return None
        found = self._database.intermediates.get_checkpoint(job_id)
        return None if found is None else row_payload(found)

    def save_checkpoint(self, checkpoint: JsonObject) -> bool:
        row = Checkpoint.from_payload(checkpoint)
        job = self._job(row.job_id)
        if job is None or not row.blob_key.startswith(_checkpoints(job)):
            return False
        return self._database.intermediates.save_checkpoint(row)

    def drop_checkpoint(self, job_id: str) -> None:
        if self._job(job_id) is not None:
            self._database.intermediates.drop_checkpoint(job_id)

    def add_preview(self, preview: JsonObject) -> bool:
        row = PreviewRecord.from_payload(preview)
        job = self._job(row.job_id)
        own = job is not None and row.blob_key.startswith(f"{job.team_id}/")
        if not own or self._database.files.is_named(row.blob_key):
            return False  # another's; or this very preview, told before by a call without answer
        return self._database.intermediates.add_preview(row)

    def save_forecast(self, updated: float, figures: JsonObject) -> None:
        forecast = Forecast.from_payload(self._model, {**figures, "updated": updated})
        self._database.forecasts.save_forecast(forecast)

    def get_team(self, team_id: str) -> JsonObject | None:
        """Its share of the machines; nothing that is a secret."""
        found = self._database.teams.get_team(team_id)
        return None if found is None else row_payload(replace(found, webhook_secret=None))

    # -- what the safety stage asks ------------------------------------------------------------

    def takedown_stamp(self) -> tuple[int, int]:
        return self._database.takedowns.stamp()

    def list_takedowns(self) -> list[JsonObject]:
        """By what they are known again; not whose they were, or who had them taken down."""
        rows = self._database.takedowns.list_takedowns()
        return [row_payload(replace(row, reason="", actor="", team_ids=None)) for row in rows]

    def note_head(self, log: str, lines: int, digest: str, time: float) -> None:
        """Keeps the head of a moderator's log until a gateway signs it."""
        if not log.startswith(MODERATORS_LOG):
            raise PermissionDenied(f"{log[:80]!r} is not the log of a moderator.")
        self._database.audit_heads.note(Head(log, lines, digest, time), self._model)

    # -- bounds --------------------------------------------------------------------------------

    def _job(self, job_id: str) -> JobRecord | None:
        """A job of this model; those of others do not exist."""
        job = self._database.jobs.get_job(str(job_id))
        return job if job is not None and job.model == self._model else None

    def _own(self, job: JobRecord, ending: Ending) -> Ending:
        """The ending with rows of this job alone."""
        stored = [replace(row, job_id=job.id, team_id=job.team_id) for row in ending.stored]
        held = [replace(row, job_id=job.id, team_id=job.team_id) for row in ending.held]
        keys = [row.blob_key for row in stored] + [row.blob_key for row in held]
        self._check_new(job, keys)
        return replace(ending, stored=stored, held=held)

    def _check_new(self, job: JobRecord, keys: list[str]) -> None:
        """
        Raises:
            PermissionDenied: a picture is another team's, or a row names it already.
        """
        for key in keys:
            if not key.startswith(f"{job.team_id}/") or self._database.files.is_named(key):
                raise PermissionDenied(f"The picture {key[:80]!r} is not one of this job's own.")


class ModelPictures:
    """The blobs that one model's generators may read and write."""

    def __init__(self, database: Database, blobs: BlobStore, model: str) -> None:
        self._database, self._blobs, self._model = database, blobs, model

    def open(self, key: str) -> OpenBlob:
        for job in self._running(key):
            if key.startswith(_checkpoints(job)) or key in _drawn_from(job):
                return self._blobs.open(key)
        raise NotFound(f"There is no stored file {key[:80]!r}.")

    def put_parts(self, key: str, parts: Iterator[bytes]) -> None:
        """
        Raises:
            PermissionDenied: no job of the model is being drawn for the team.
            Conflict: another picture lies there.
        """
        running = self._running(key)
        if not running:
            raise PermissionDenied("No job of this model is being drawn for that team.")
        if not any(key.startswith(_checkpoints(job)) for job in running):
            try:
                if _digest(self._blobs.open(key).parts) != _digest(parts):
                    raise Conflict(f"Another file is stored as {key[:80]!r}.", code="conflict")
                return  # written before by a call whose answer was lost
            except NotFound:
                pass
        self._blobs.put_parts(key, parts)

    def delete(self, key: str) -> None:
        """Nothing is deleted that a row names; the sweeper takes what is garbage."""
        if not self._database.files.is_named(key):
            self._blobs.delete(key)

    def _running(self, key: str) -> list[JobRecord]:
        """Jobs that are drawn by this model, of the team that the key is of."""
        team = key.partition("/")[0]
        jobs = self._database.jobs.open_jobs(self._model, "running")
        return [job for job in jobs if job.team_id == team]


def _shown(job: JobRecord | None) -> JsonObject | None:
    """A job without what only gateways need: whom to tell of it, and by whose key it came."""
    if job is None:
        return None
    return row_payload(replace(job, webhook=None, api_key_id=None, idempotency=None))


def _checkpoints(job: JobRecord) -> str:
    """How the keys of a job's checkpoints begin."""
    return f"{job.team_id}/checkpoints/{job.id}-"


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _drawn_from(job: JobRecord) -> set[str]:
    """The pictures that a job's request names."""
    request = GenerationRequest.from_payload(job.request)
    maps = [control.image for control in request.controls]
    names = (request.image, request.mask, *request.references, *maps)
    return {name for name in names if name is not None}


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CalotypeError)
    return JSONResponse({"error": error.to_payload()}, status_code=wire(error).status)

"""/v1/datasets: pictures with captions to train on, checked after they were uploaded."""

from __future__ import annotations

import asyncio
import io
import posixpath
import zipfile
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.generation.files import find_file, keep_file
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, read_json, room_for_body
from calotype.serving.api.http.failures import error_object
from calotype.serving.api.http.multipart import FORM_COPIES, Form, FormFile, is_multipart, read_form
from calotype.serving.api.http.pages import Deleted, Page, list_object, page_size
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import InvalidRequest, NotFound, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import ImageSize
from calotype.serving.database.blob_refs import JOB_INPUT
from calotype.serving.database.training.datasets import CHECKING, DatasetRecord
from calotype.serving.jobs.records import FileRecord, KeyRecord, new_id
from calotype.serving.training.dataset.archive_check import DatasetSettings

router = APIRouter(tags=["training"])

Caller = Annotated[KeyRecord, Depends(allowed("trainings"))]
Writer = Annotated[KeyRecord, Depends(allowed("trainings", counted=True))]

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_COUNTS = ("pictures", "held_out", "buckets", "captions", "digest", "warnings", "problems")


class DatasetBody(DatasetSettings):
    """A data set out of an archive that was uploaded to /v1/files."""

    name: str = Field("", max_length=255, description="For people. Default: the file's name.")
    file_id: str | None = Field(
        None, max_length=64, description="A zip or tar archive; or send parts 'file' in a form."
    )


class DatasetObject(TypedDict):
    """A data set. ``status``: checking, ready or refused."""

    id: str
    object: Literal["dataset"]
    name: str
    status: str
    sha256: str
    settings: JsonObject
    created_at: int
    checked_at: int | None
    report: JsonObject | None
    error: JsonObject | None


_FORM: dict[str, object] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": DatasetBody.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "One zip or tar archive, or pictures with .txt files.",
                        },
                        "rights": {"type": "string", "description": "JSON."},
                    },
                }
            },
        },
    }
}


@router.post("/v1/datasets", openapi_extra=_FORM)
async def create_dataset(request: Request, key: Writer) -> DatasetObject:
    """Takes an archive, or single pictures, and begins to check them: GET says what was found."""
    gateway = gateway_of(request)
    settings = gateway.settings
    if not is_multipart(request):
        raw = await read_json(request, SMALL_BODY, settings.body_seconds)
        body = parse(DatasetBody, raw)
        return await _add(gateway, key, body, await _uploaded(gateway, key, body))
    async with room_for_body(request, key.team_id, settings.max_upload_bytes, FORM_COPIES):
        form = await read_form(request, settings.max_upload_bytes, settings.body_seconds)
        body = parse(DatasetBody, form.fields, form=True)
        if body.file_id is not None:
            raise InvalidRequest("file_id cannot stand beside files.", param="file_id")
        filename, data = await asyncio.to_thread(_archive_of, form)
        file = await asyncio.to_thread(
            keep_file,
            gateway,
            key.team_id,
            data,
            "bin",
            purpose=JOB_INPUT,
            filename=filename,
            content_type="application/octet-stream",
            expires=None,
        )
        return await _add(gateway, key, body, file)


@router.get("/v1/datasets")
async def list_datasets(
    request: Request, key: Caller, limit: str = "20", after: str | None = None
) -> Page[DatasetObject]:
    """The team's data sets, newest first; their reports in short."""
    gateway, count = gateway_of(request), page_size(limit)
    datasets = gateway.database.datasets
    page = await asyncio.to_thread(
        lambda: datasets.list_datasets(key.team_id, limit=count + 1, after=after)
    )
    found = [_described(record, whole=False) for record in page[:count]]
    return list_object(found, len(page) > count)


@router.get("/v1/datasets/{dataset_id}")
async def get_dataset(request: Request, dataset_id: str, key: Caller) -> DatasetObject:
    """What became of every file."""
    datasets = gateway_of(request).database.datasets
    return _described(await asyncio.to_thread(datasets.get_dataset, dataset_id, key.team_id))


@router.delete("/v1/datasets/{dataset_id}")
async def delete_dataset(request: Request, dataset_id: str, key: Caller) -> Deleted:
    """Forgets the data set and its pictures; adapters that learnt from it stay."""
    database = gateway_of(request).database
    gone = await asyncio.to_thread(database.datasets.delete_dataset, dataset_id, key.team_id)
    try:
        await asyncio.to_thread(database.files.delete_file, gone.file_id, key.team_id)
    except NotFound:
        pass  # it was deleted before
    return {"id": dataset_id, "object": "dataset", "deleted": True}


async def _uploaded(gateway: Gateway, key: KeyRecord, body: DatasetBody) -> FileRecord:
    """A file of the data set's own, with the bytes of one that was uploaded."""
    if body.file_id is None:
        raise InvalidRequest(
            "Missing required parameter: 'file_id'; or send the archive as part 'file' of a form.",
            code="missing_required_parameter",
            param="file_id",
        )
    try:
        file = await find_file(gateway, body.file_id, key.team_id)
    except NotFound as error:
        raise NotFound(error.message, error.code, "file_id") from None
    own = FileRecord(
        id=new_id("file"),
        team_id=key.team_id,
        purpose=JOB_INPUT,
        filename=file.filename,
        content_type=file.content_type,
        size=file.size,
        sha256=file.sha256,
        blob_key="",
        created=gateway.database.clock.time(),
        expires=None,
    )
    kept = await asyncio.to_thread(
        lambda: gateway.database.files.share_blob(own, most_bytes=gateway.settings.team_file_bytes)
    )
    if kept is None:
        raise NotFound(f"There is no file '{body.file_id}'.", param="file_id")
    return kept


async def _usual_resolution(gateway: Gateway, key: KeyRecord, otherwise: int) -> int:
    """The shorter side of what the team's default model draws."""
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    try:
        size = ImageSize.parse(gateway.catalog.model(None, team).spec.defaults.size)
    except NotFound:  # no model yet
        return otherwise
    return min(size.width, size.height)


def _archive_of(form: Form) -> tuple[str, bytes]:
    """Name and bytes of the archive; single files are put into one."""
    form.check_files(("file",))
    files = form.all_files("file")
    if not files:
        raise InvalidRequest(
            "Missing required parameter: 'file'.", code="missing_required_parameter", param="file"
        )
    if len(files) == 1 and files[0].filename.lower().endswith(_ARCHIVES):
        return files[0].filename, files[0].data
    return "upload.zip", _zipped(files)


def _zipped(files: list[FormFile]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for place, file in enumerate(files):
            name = posixpath.basename(file.filename.replace("\\", "/")) or f"file-{place}"
            # A fixed time: the same files make the same archive.
            archive.writestr(zipfile.ZipInfo(name), file.data)
    return made.getvalue()


async def _add(
    gateway: Gateway, key: KeyRecord, body: DatasetBody, file: FileRecord
) -> DatasetObject:
    settings = body.model_dump(mode="json", exclude={"name", "file_id"}, exclude_none=True)
    if "resolution" not in body.model_fields_set:
        settings["resolution"] = await _usual_resolution(gateway, key, settings["resolution"])
    record = DatasetRecord(
        id=new_id("dataset"),
        team_id=key.team_id,
        name=body.name or file.filename,
        file_id=file.id,
        sha256=file.sha256,
        settings=settings,
        status=CHECKING,
        created=gateway.database.clock.time(),
    )
    await asyncio.to_thread(gateway.database.datasets.add_dataset, record)
    return _described(record)


def _described(record: DatasetRecord, *, whole: bool = True) -> DatasetObject:
    report = record.report
    if report is not None and not whole:
        short = {name: report[name] for name in _COUNTS}
        report = short | {name: len(report[name]) for name in ("used", "refused", "duplicates")}
    return {
        "id": record.id,
        "object": "dataset",
        "name": record.name,
        "status": record.status,
        "sha256": record.sha256,
        "settings": record.settings,
        "created_at": int(record.created),
        "checked_at": None if record.checked is None else int(record.checked),
        "report": report,
        "error": None if record.error is None else error_object(error_from_payload(record.error)),
    }

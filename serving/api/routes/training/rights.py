"""/v1/rights: what adapters learnt from, and consent that is taken back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, json_body, read_json
from calotype.serving.api.http.body_parts import Body
from calotype.serving.api.http.pages import Deleted, Page, list_object
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.review.removal import end_jobs
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.training.revocations import (
    Affected,
    AffectedAdapter,
    RevocationRecord,
)
from calotype.serving.jobs.endings import rights_revoked_ending
from calotype.serving.jobs.records import KeyRecord

router = APIRouter(tags=["rights"])

Keeper = Annotated[KeyRecord, Depends(allowed("moderation"))]
"""Whoever takes pictures down may also take consent back."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_MAX_BODY = 16 * 1024 * 1024


class AffectedAdapterObject(TypedDict):
    """An adapter that learnt from the picture."""

    digest: str
    name: str
    dataset_digest: str
    rights: JsonObject | None
    pictures: int
    retrain: str | None
    """The command that trains it again without the picture."""


class RevocationAnswer(TypedDict):
    """What a revocation quarantines."""

    id: str
    object: Literal["rights.revocation"]
    dry_run: bool
    adapters: list[AffectedAdapterObject]
    asset_ids: list[str]
    asset_count: int
    job_count: int
    ended_jobs: int


class RevocationObject(TypedDict):
    """A picture that may not be learnt from any more."""

    id: str
    object: Literal["rights.revocation"]
    reason: str
    by: str
    created_at: int


class OriginObject(TypedDict):
    sha256: str
    rights: JsonObject | None


class AdapterObject(TypedDict):
    """What an adapter learnt from."""

    id: str
    object: Literal["rights.adapter"]
    name: str
    dataset_digest: str
    command: str | None
    created_at: int
    pictures: list[OriginObject]


class RevocationBody(Body):
    """A picture whose consent is taken back."""

    picture_sha256: Sha256 = Field(description="sha256 of the picture's file.")
    reason: str = Field(min_length=1, max_length=4000, description="For the record.")
    dry_run: bool = Field(False, description="Only say what it would quarantine.")


class OriginBody(Body):
    sha256: Sha256 = Field(description="Of the picture's file.")
    rights: JsonObject | None = Field(None, description="basis, holder, licence, evidence, expires")


class AdapterBody(Body):
    """What an adapter learnt from."""

    digest: str = Field(min_length=1, max_length=255, description="As recipes name the adapter.")
    name: str = Field(min_length=1, max_length=255)
    dataset_digest: str = Field(max_length=64)
    command: str | None = Field(None, max_length=4000, description="That trained it.")
    pictures: list[OriginBody] = Field(min_length=1, max_length=100_000)


@router.post("/v1/rights/revocations", openapi_extra=json_body(RevocationBody))
async def revoke(request: Request, key: Keeper) -> RevocationAnswer:
    """Quarantines every adapter that learnt from a picture, and every picture drawn with those.

    Nothing is deleted; DELETE lifts it.
    """
    gateway = gateway_of(request)
    raw = await read_json(request, SMALL_BODY, gateway.settings.body_seconds)
    body = parse(RevocationBody, raw)
    revocations, sha256 = gateway.database.revocations, body.picture_sha256
    if body.dry_run:
        found = await asyncio.to_thread(revocations.affected, sha256)
        return _answer(sha256, found, ended=0, dry_run=True)
    found = await asyncio.to_thread(revocations.revoke, sha256, body.reason, key.id)
    await asyncio.to_thread(end_jobs, gateway, found.open_jobs, rights_revoked_ending())
    return _answer(sha256, found, ended=len(found.open_jobs), dry_run=False)


@router.get("/v1/rights/revocations")
async def list_revocations(request: Request, key: Keeper) -> Page[RevocationObject]:
    """Pictures that may not be learnt from any more, the oldest first."""
    found = await asyncio.to_thread(gateway_of(request).database.revocations.list_revocations)
    return list_object([_described(record) for record in found], has_more=False)


@router.delete("/v1/rights/revocations/{picture_sha256}")
async def restore(request: Request, picture_sha256: str, key: Keeper) -> Deleted:
    """Consent was given again: adapters and pictures are served as before."""
    revocations = gateway_of(request).database.revocations
    await asyncio.to_thread(revocations.lift, picture_sha256[:64], key.id)
    return {"id": picture_sha256, "object": "rights.revocation", "deleted": True}


@router.post("/v1/rights/adapters", openapi_extra=json_body(AdapterBody))
async def record_adapter(request: Request, key: Keeper) -> AdapterObject:
    """Notes what an adapter learnt from, as its file says; again is no error."""
    gateway = gateway_of(request)
    raw = await read_json(request, _MAX_BODY, gateway.settings.body_seconds)
    body = parse(AdapterBody, raw)
    rows: list[tuple[str, JsonObject | None]] = []
    for one in body.pictures:
        checked = None if one.rights is None else parse(Rights, one.rights)
        rights = None if checked is None else checked.model_dump(mode="json", exclude_none=True)
        rows.append((one.sha256, rights))
    origins = gateway.database.origins
    await asyncio.to_thread(
        origins.record, body.digest, body.name, body.dataset_digest, rows, body.command
    )
    return await get_adapter(request, body.digest, key)


@router.get("/v1/rights/adapters/{digest}")
async def get_adapter(request: Request, digest: str, key: Keeper) -> AdapterObject:
    """What an adapter learnt from."""
    origins = gateway_of(request).database.origins
    found = await asyncio.to_thread(origins.get_adapter, digest)
    if found is None:
        raise NotFound(f"It is not recorded what the adapter '{digest[:80]}' learnt from.")
    rows = await asyncio.to_thread(origins.origins_of, digest)
    return {
        "id": found.digest,
        "object": "rights.adapter",
        "name": found.name,
        "dataset_digest": found.dataset_digest,
        "command": found.command,
        "created_at": int(found.created),
        "pictures": [{"sha256": row.picture_sha256, "rights": row.rights} for row in rows],
    }


def _answer(sha256: str, found: Affected, *, ended: int, dry_run: bool) -> RevocationAnswer:
    return {
        "id": sha256,
        "object": "rights.revocation",
        "dry_run": dry_run,
        "adapters": [_adapter(one, sha256) for one in found.adapters],
        "asset_ids": list(found.assets),
        "asset_count": found.asset_count,
        "job_count": found.jobs,
        "ended_jobs": ended,
    }


def _adapter(one: AffectedAdapter, sha256: str) -> AffectedAdapterObject:
    return {
        "digest": one.digest,
        "name": one.name,
        "dataset_digest": one.dataset_digest,
        "rights": one.rights,
        "pictures": one.pictures,
        "retrain": one.retraining(sha256),
    }


def _described(record: RevocationRecord) -> RevocationObject:
    return {
        "id": record.picture_sha256,
        "object": "rights.revocation",
        "reason": record.reason,
        "by": record.actor,
        "created_at": int(record.created),
    }

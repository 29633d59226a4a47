"""GET /v1/assets: pictures after the answer, by key or by signed address."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from typing_extensions import TypedDict

from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.failures import quarantined
from calotype.serving.api.http.pages import Deleted
from calotype.serving.api.http.signing import content_url, signature_fits
from calotype.serving.api.http.stored import file_response
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import NotFound
from calotype.serving.jobs.records import AssetRecord, KeyRecord

router = APIRouter(tags=["assets"])

check_key = allowed("images")


class AssetObject(TypedDict):
    """A stored picture."""

    id: str
    object: Literal["asset"]
    job_id: str
    content_type: str
    width: int
    height: int
    seed: int
    sha256: str
    created_at: int
    expires_at: int | None
    url: str


async def _find(gateway: Gateway, asset_id: str, team_id: str | None) -> AssetRecord:
    asset = await asyncio.to_thread(gateway.database.files.get_asset, asset_id, team_id)
    if asset is None:
        raise NotFound(f"There is no asset '{asset_id[:80]}'.")
    if await asyncio.to_thread(gateway.database.origins.quarantined_job, asset.job_id):
        raise quarantined(f"The asset '{asset_id}'")
    if asset.expires is not None and asset.expires <= gateway.database.clock.time():
        raise NotFound(f"The asset '{asset_id}' has expired.", code="expired")
    return asset


@router.get("/v1/assets/{asset_id}")
async def get_asset(
    request: Request, asset_id: str, key: Annotated[KeyRecord, Depends(check_key)]
) -> AssetObject:
    gateway = gateway_of(request)
    asset = await _find(gateway, asset_id, key.team_id)
    return {
        "id": asset.id,
        "object": "asset",
        "job_id": asset.job_id,
        "content_type": asset.content_type,
        "width": asset.width,
        "height": asset.height,
        "seed": asset.seed,
        "sha256": asset.sha256,
        "created_at": int(asset.created),
        "expires_at": None if asset.expires is None else int(asset.expires),
        "url": content_url(gateway, gateway.base_url(request), asset.id),
    }


@router.delete("/v1/assets/{asset_id}")
async def delete_asset(
    request: Request, asset_id: str, key: Annotated[KeyRecord, Depends(check_key)]
) -> Deleted:
    """Forgets the picture: its addresses stop working at once."""
    gateway = gateway_of(request)
    if not await asyncio.to_thread(gateway.database.files.delete_asset, asset_id, key.team_id):
        raise NotFound(f"There is no asset '{asset_id[:80]}'.")
    return {"id": asset_id, "object": "asset", "deleted": True}


@router.head("/v1/assets/{asset_id}/content", include_in_schema=False)
@router.get("/v1/assets/{asset_id}/content")
async def get_content(
    request: Request, asset_id: str, expires: str = "", signature: str = ""
) -> Response:
    """The picture itself, by signature; with an API key a redirect to the signed address."""
    gateway = gateway_of(request)
    if not signature:
        key = await check_key(request)
        asset = await _find(gateway, asset_id, key.team_id)
        return RedirectResponse(
            content_url(gateway, gateway.base_url(request), asset.id), status_code=302
        )
    until = int(expires[:15]) if expires.isascii() and expires.isdigit() else 0
    if not signature_fits(gateway.url_secret, asset_id, until, signature):
        # The same answer as for an asset that never was: a guess learns nothing.
        raise NotFound(f"There is no asset '{asset_id[:80]}'.")
    if until <= gateway.database.clock.time():
        raise NotFound(
            "This address has expired; ask GET /v1/assets/{id} for a new one.", code="expired"
        )
    asset = await _find(gateway, asset_id, None)
    return file_response(
        await asyncio.to_thread(gateway.blobs.open, asset.blob_key),
        asset.content_type,
        {"etag": f'"{asset.sha256}"', "cache-control": "private, max-age=3600, immutable"},
        head=request.method == "HEAD",
    )

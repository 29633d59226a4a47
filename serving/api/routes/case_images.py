"""The picture of a case, for its reviewer: blurred, or as it is and on record."""

from __future__ import annotations

import asyncio
import io
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from calotype.moderation.images.decode import blur, iter_views
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import Conflict, NotFound
from calotype.serving.database.review.cases import Reviewer, check_reviewer
from calotype.serving.images.sealing import unseal
from calotype.serving.jobs.records import AssetRecord, HeldRecord, KeyRecord

router = APIRouter(tags=["moderation"])

BLURRED_SIDE = 256
"""Longer side of a blurred picture: no more of it is needed to tell which one it is."""


@router.get("/v1/moderation/cases/{case_id}/picture")
async def case_image(
    request: Request,
    case_id: str,
    key: Annotated[KeyRecord, Depends(allowed("moderation"))],
    reveal: bool = False,
) -> Response:
    """The picture of the case: a small blurred PNG. ``reveal`` gives the file to whoever has taken
    the case, and writes it down first. Pictures of the own team are not shown."""
    gateway = gateway_of(request)
    database = gateway.database
    case = await asyncio.to_thread(database.cases.get_case, case_id)
    check_reviewer(case, Reviewer(key.id, key.team_id))
    held = await asyncio.to_thread(database.held_images.get_held, case.subject)
    asset: AssetRecord | HeldRecord | None = held
    if asset is None:
        asset = await asyncio.to_thread(database.files.get_asset, case.subject)
    if asset is None:
        raise NotFound(
            f"The case '{case.id}' has no picture: it is about a prompt, or the picture is gone."
        )
    if reveal:
        mine = case.held_by == key.id and (case.held_until or 0.0) > database.clock.time()
        if not mine:
            raise Conflict(
                f"The case '{case.id}' is not held by {key.id}: take it first. Pictures are only "
                "shown unblurred to whoever works on their case.",
                code="case_conflict",
            )
        await asyncio.to_thread(
            database.reviewer_audit.record_action,
            key.id,
            "picture.revealed",
            case.id,
            {"asset_id": case.subject},
        )
    if held is not None:
        data = await asyncio.to_thread(open_held, gateway, held)
    else:
        data = await asyncio.to_thread(gateway.blobs.get, asset.blob_key)
    if reveal:
        return _answer(data, asset.content_type)
    return _answer(await asyncio.to_thread(blurred, data), "image/png")


def open_held(gateway: Gateway, held: HeldRecord) -> bytes:
    """The file of a held picture. Raises StorageFailed: it is gone or was changed."""
    return unseal(gateway.blobs.get(held.blob_key), held.seal, held.asset_id)


def blurred(data: bytes) -> bytes:
    """A picture file as a small PNG that tells no details."""
    small = Image.fromarray(next(iter_views(data)))
    small.thumbnail((BLURRED_SIDE, BLURRED_SIDE))
    file = io.BytesIO()
    Image.fromarray(blur(np.asarray(small))).save(file, "PNG")
    return file.getvalue()


def _answer(data: bytes, content_type: str) -> Response:
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(data, media_type=content_type, headers=headers)

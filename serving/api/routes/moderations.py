"""POST /v1/moderations in OpenAI's shape; the decisions come from the service's own policy."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import decode_image
from calotype.moderation.wire import openai_result_of_payload
from calotype.serving.api.generation.access import check_open
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import read_json
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.decision import CheckScope
from calotype.serving.core.errors import InvalidRequest, ModerationUnavailable
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import KeyRecord

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

router = APIRouter(tags=["OpenAI"])

MAX_INPUTS = 64
MAX_TEXT_CHARS = 100_000
MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_VIEWS = 64
"""Of all pictures of one request: a file may look several ways, and each of them is judged."""


@router.post("/v1/moderations")
async def moderate(
    request: Request, key: Annotated[KeyRecord, Depends(allowed("images", counted=True))]
) -> JsonObject:
    """Judges texts and pictures: one result per string, one for a list of parts."""
    gateway = gateway_of(request)
    raw = await read_json(request, gateway.settings.max_body_bytes)
    for name in raw:
        if name not in ("input", "model"):
            raise InvalidRequest(
                f"Unknown parameter: '{name[:80]}'.", code="unknown_parameter", param=name[:80]
            )
    model = raw.get("model") or "omni-moderation-latest"
    if not isinstance(model, str):
        raise InvalidRequest("model must be a string.", code="invalid_type", param="model")
    texts, images, joined = await asyncio.to_thread(_read_input, raw.get("input"))
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    check_open(gateway.catalog, team)
    scope = CheckScope((team.policy,)) if team is not None and team.policy else None
    models = team.allowed_models if team is not None else None
    decisions = await gateway.backend.moderate(texts, images, scope, models)
    for decision in decisions:
        if decision.unavailable:
            raise ModerationUnavailable(
                "The safety stage cannot judge at the moment. Try again in a few seconds.",
                retry_after=5,
            )
    results = [openai_result_of_payload(decision.to_payload()) for decision in decisions]
    return {
        "id": f"modr-{secrets.token_hex(12)}",
        "model": model,
        "results": [_join(results)] if joined else results,
    }


def _read_input(given: Any) -> tuple[list[str], list[Pixels], bool]:
    """Texts, pictures, and whether all of them make one result."""
    if given is None:
        raise InvalidRequest(
            "Missing required parameter: 'input'.", code="missing_required_parameter", param="input"
        )
    if isinstance(given, str):
        return [_text(given, "input")], [], False
    if not isinstance(given, list) or not given:
        raise InvalidRequest(
            "input must be a string, a list of strings or a list of parts, and not empty.",
            code="invalid_type",
            param="input",
        )
    if len(given) > MAX_INPUTS:
        raise InvalidRequest(
            f"input has {len(given)} entries; at most {MAX_INPUTS} are possible.", param="input"
        )
    if all(isinstance(part, str) for part in given):
        return [_text(part, f"input[{i}]") for i, part in enumerate(given)], [], False
    texts: list[str] = []
    images: list[Pixels] = []
    for index, part in enumerate(given):
        where = f"input[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), f"{where}.text"))
        elif kind == "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            images += _image(url, f"{where}.image_url")
            if len(images) > MAX_VIEWS:
                raise InvalidRequest(
                    f"The pictures up to {where} have more than {MAX_VIEWS} frames together; "
                    "send fewer at a time.",
                    code="invalid_image",
                    param=where,
                )
        else:
            raise InvalidRequest(
                f"{where} must be {{'type': 'text', ...}} or {{'type': 'image_url', ...}}.",
                param=where,
            )
    return texts, images, True


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise InvalidRequest(f"{where} must be a string.", code="invalid_type", param=where)
    if len(given) > MAX_TEXT_CHARS:
        raise InvalidRequest(
            f"{where} has {len(given):,} characters; at most {MAX_TEXT_CHARS:,} are possible.",
            param=where,
        )
    return given


def _image(url: Any, where: str) -> list[Pixels]:
    """Every view of the picture behind a data URL: see `moderation.pictures`."""
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise InvalidRequest(
            f"{where} must be a data URL such as 'data:image/png;base64,...'; other addresses "
            "are not fetched.",
            code="invalid_image",
            param=where,
        )
    try:
        data = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            f"{where} holds no valid base64.", code="invalid_image", param=where
        ) from None
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequest(
            f"{where} has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are possible.",
            code="image_file_too_large",
            param=where,
        )
    try:
        return decode_image(data, where)
    except ImageError as error:
        raise InvalidRequest(str(error), code="invalid_image", param=where) from None


def _join(results: Sequence[JsonObject]) -> JsonObject:
    """Text and pictures as one result: true if any, the highest score, every kind of input."""
    first = results[0]
    names = list(first["categories"])
    kinds = "category_applied_input_types"
    return {
        "flagged": any(result["flagged"] for result in results),
        "categories": {
            name: any(result["categories"][name] for result in results) for name in names
        },
        "category_scores": {
            name: max(result["category_scores"][name] for result in results) for name in names
        },
        kinds: {
            name: sorted({kind for result in results for kind in result[kinds][name]}, reverse=True)
            for name in names
        },
    }

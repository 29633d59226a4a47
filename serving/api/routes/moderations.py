"""POST /v1/moderations in OpenAI's shape; the decisions come from the service's own policy."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from calotype.moderation.errors import ImageError
from calotype.moderation.images.decode import count_pixels, iter_views
from calotype.moderation.wire import openai_result_of_payload
from calotype.serving.api.generation.access import check_open
from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import read_json, room_for_body
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.decision import CheckScope
from calotype.serving.core.errors import InvalidRequest, ModerationUnavailable
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.records import KeyRecord

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

router = APIRouter(tags=["OpenAI"])

MAX_INPUTS = 64
MAX_TEXT_CHARS = 100_000
MAX_TEXT_CHARS_TOGETHER = 400_000
MAX_PICTURES = 16
MAX_IMAGE_BYTES = 20 * 1024 * 1024
MAX_PIXELS = 25_000_000
"""Of one picture, all its frames together."""
MAX_PIXELS_TOGETHER = 100_000_000
MAX_VIEWS = 64
"""Of all pictures of one request: a file may look several ways, and each of them is checked."""
_BYTES_PER_PIXEL = 20
"""The frame, the view, and the view on its way to a model app."""


@dataclass(frozen=True, slots=True)
class _Input:
    texts: list[str]
    pictures: list[tuple[str, str]]
    """(where it stands, data URL): decoded when its turn comes."""
    joined: bool
    """Whether all of it makes one result."""


@router.post("/v1/moderations")
async def moderate(
    request: Request, key: Annotated[KeyRecord, Depends(allowed("images", counted=True))]
) -> JsonObject:
    """Checks texts and pictures: one result per string, one for a list of parts."""
    gateway = gateway_of(request)
    settings = gateway.settings
    async with room_for_body(request, key.team_id, settings.max_body_bytes):
        raw = await read_json(request, settings.max_body_bytes, settings.body_seconds)
        return await _checked(gateway, key, raw)


async def _checked(gateway: Gateway, key: KeyRecord, raw: JsonObject) -> JsonObject:
    for name in raw:
        if name not in ("input", "model"):
            raise InvalidRequest(
                f"Unknown parameter: '{name[:80]}'.", code="unknown_parameter", param=name[:80]
            )
    model = raw.get("model") or "omni-moderation-latest"
    if not isinstance(model, str):
        raise InvalidRequest("model must be a string.", code="invalid_type", param="model")
    given = _read_input(raw.get("input"))
    _check_together(given.texts, given.pictures)
    team = await asyncio.to_thread(gateway.database.teams.get_team, key.team_id)
    check_open(gateway.catalog, team)
    scope = CheckScope((team.policy,)) if team is not None and team.policy else None
    models = team.allowed_models if team is not None else None

    async def check(texts: Sequence[str], views: Sequence[Pixels]) -> list[JsonObject]:
        decisions = await gateway.backend.moderate(texts, views, scope, models)
        if any(decision.unavailable for decision in decisions):
            raise ModerationUnavailable(
                "The safety stage cannot check it at the moment. Try again in a few seconds.",
                retry_after=5,
            )
        return [openai_result_of_payload(decision.to_payload()) for decision in decisions]

    results = await check(given.texts, []) if given.texts else []
    budget = _Budget()
    for where, url in given.pictures:
        data = _picture(url, where)
        pixels = await asyncio.to_thread(budget.pixels_of, data, where)
        async with gateway.memory.pixels.reserve(key.team_id, pixels * _BYTES_PER_PIXEL):
            views = iter_views(data, where, budget.left())
            del data
            while (view := await asyncio.to_thread(budget.next_view, views, where)) is not None:
                results += await check([], [view])
                del view
    return {
        "id": f"modr-{secrets.token_hex(12)}",
        "model": model,
        "results": [_join(results)] if given.joined else results,
    }


class _Budget:
    """What the pictures of one request may hold."""

    def __init__(self) -> None:
        self._pixels, self._views = MAX_PIXELS_TOGETHER, MAX_VIEWS

    def pixels_of(self, data: bytes, where: str) -> int:
        """Of the first frame. Raises InvalidRequest: it is no picture, or there are too many."""
        try:
            pixels = count_pixels(data, where)
        except ImageError as error:
            raise InvalidRequest(str(error), code="invalid_image", param=where) from None
        if pixels > self._pixels:
            raise InvalidRequest(
                f"The pictures up to {where} have more than {MAX_PIXELS_TOGETHER:,} pixels "
                "together; send fewer at a time.",
                code="invalid_image",
                param=where,
            )
        return pixels

    def left(self) -> int:
        """Pixels of the next picture."""
        return min(MAX_PIXELS, self._pixels)

    def next_view(self, views: Iterator[Pixels], where: str) -> Pixels | None:
        """None when there is none. Raises InvalidRequest: damaged, or too many of them."""
        try:
            view = next(views, None)
        except ImageError as error:
            raise InvalidRequest(str(error), code="invalid_image", param=where) from None
        if view is None:
            return None
        self._views -= 1
        self._pixels -= view.shape[0] * view.shape[1]
        if self._views < 0:
            raise InvalidRequest(
                f"The pictures up to {where} have more than {MAX_VIEWS} frames together; "
                "send fewer at a time.",
                code="invalid_image",
                param=where,
            )
        return view


def _read_input(given: Any) -> _Input:
    if given is None:
        raise InvalidRequest(
            "Missing required parameter: 'input'.", code="missing_required_parameter", param="input"
        )
    if isinstance(given, str):
        return _Input([_text(given, "input")], [], False)
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
        return _Input([_text(part, f"input[{i}]") for i, part in enumerate(given)], [], False)
    texts: list[str] = []
    pictures: list[tuple[str, str]] = []
    for index, part in enumerate(given):
        where = f"input[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), f"{where}.text"))
        elif kind == "image_url":
            source = part.get("image_url")
            url = source.get("url") if isinstance(source, dict) else source
            pictures.append((f"{where}.image_url", _data_url(url, f"{where}.image_url")))
        else:
            raise InvalidRequest(
                f"{where} must be {{'type': 'text', ...}} or {{'type': 'image_url', ...}}.",
                param=where,
            )
    return _Input(texts, pictures, True)


def _check_together(texts: Sequence[str], pictures: Sequence[object]) -> None:
    chars = sum(map(len, texts))
    if chars > MAX_TEXT_CHARS_TOGETHER:
        raise InvalidRequest(
            f"input has {chars:,} characters; at most {MAX_TEXT_CHARS_TOGETHER:,} are possible.",
            param="input",
        )
    if len(pictures) > MAX_PICTURES:
        raise InvalidRequest(
            f"input has {len(pictures)} pictures; at most {MAX_PICTURES} are possible.",
            param="input",
        )


def _text(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise InvalidRequest(f"{where} must be a string.", code="invalid_type", param=where)
    if len(given) > MAX_TEXT_CHARS:
        raise InvalidRequest(
            f"{where} has {len(given):,} characters; at most {MAX_TEXT_CHARS:,} are possible.",
            param=where,
        )
    return given


def _data_url(url: Any, where: str) -> str:
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:80]:
        raise InvalidRequest(
            f"{where} must be a data URL such as 'data:image/png;base64,...'; other addresses "
            "are not fetched.",
            code="invalid_image",
            param=where,
        )
    if len(url) * 3 // 4 > MAX_IMAGE_BYTES + 80:
        raise InvalidRequest(
            f"{where} has about {len(url) * 3 // 4:,} bytes; at most {MAX_IMAGE_BYTES:,} are "
            "possible.",
            code="image_file_too_large",
            param=where,
        )
    return url


def _picture(url: str, where: str) -> bytes:
    try:
        return base64.b64decode(url[url.index(";base64,") + 8 :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(
            f"{where} holds no valid base64.", code="invalid_image", param=where
        ) from None


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

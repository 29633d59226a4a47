"""GET /v1/usage: what was consumed, by team, model, adapter, key and day."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from starlette.requests import Request
from typing_extensions import TypedDict

from calotype.serving.api.http.auth import allowed
from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import InvalidRequest, PermissionDenied
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.accounts.usage import GROUPS
from calotype.serving.jobs.records import KeyRecord

router = APIRouter(tags=["usage"])


class UsageObject(TypedDict):
    """Sums of the jobs of some days."""

    object: Literal["usage"]
    start: str
    end: str
    group_by: list[str]
    data: list[JsonObject]
    """The groups' values, then the sums."""


_MAX_DAYS = 366
_MAX_ROWS = 10_000


@router.get("/v1/usage")
async def get_usage(
    request: Request,
    key: Annotated[KeyRecord, Depends(allowed("jobs"))],
    start: str | None = None,
    end: str | None = None,
    group_by: str = "day,model",
    team: str | None = None,
) -> UsageObject:
    """Sums of the team's jobs that ended from `start` to `end` (days of UTC, both counted).

    ``team=*`` is every team, for keys with the scope admin; then `group_by` may name team.
    """
    database = gateway_of(request).database
    today = datetime.fromtimestamp(database.clock.time(), UTC).date()
    last = today if end is None else _day(end, "end")
    first = last - timedelta(days=29) if start is None else _day(start, "start")
    if not 0 <= (last - first).days < _MAX_DAYS:
        raise InvalidRequest(
            f"start must be no later than end, and at most {_MAX_DAYS} days before.", param="start"
        )
    groups = [name for name in group_by.split(",") if name]
    unknown = [name for name in groups if name not in GROUPS]
    if unknown or len(set(groups)) != len(groups):
        raise InvalidRequest(
            f"group_by must name some of {', '.join(GROUPS)}, each once, separated by commas.",
            param="group_by",
        )
    team_id: str | None = key.team_id
    if team is not None:
        if team != "*":
            raise InvalidRequest("team must be '*' or left out.", param="team")
        if "admin" not in key.scopes:
            raise PermissionDenied("Only a key with the scope 'admin' sees other teams' usage.")
        team_id = None
    rows = await asyncio.to_thread(
        database.usage.report, team_id, first.isoformat(), last.isoformat(), groups, _MAX_ROWS
    )
    return {
        "object": "usage",
        "start": first.isoformat(),
        "end": last.isoformat(),
        "group_by": groups,
        "data": [_row(row) for row in rows],
    }


def _row(row: JsonObject) -> JsonObject:
    return {
        name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()
    }


def _day(text: str, param: str) -> date:
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise InvalidRequest(f"{param} must be a day such as 2026-11-23.", param=param) from None

"""Appeals, reports and held pictures: who was refused or harmed asks, a person answers."""

from __future__ import annotations

import asyncio
import functools
import re
from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from calotype.serving.api.http.auth import allowed
from calotype.serving.api.http.body import SMALL_BODY, json_body, read_json
from calotype.serving.api.http.pages import Page, list_object, page_size
from calotype.serving.api.http.schemas import parse
from calotype.serving.api.review.removal import carry_out
from calotype.serving.api.review.stored_images import (
    fingerprint,
    index_stored,
    marking_keys,
    takedown_of,
)
from calotype.serving.api.routes.case_images import open_held
from calotype.serving.api.routes.takedowns import order_for_report
from calotype.serving.api.state.gateway import Gateway, gateway_of
from calotype.serving.core.errors import Conflict, InvalidRequest, NotFound
from calotype.serving.database.review.cases import (
    VERDICTS,
    CaseRecord,
    Reviewer,
    check_reviewer,
)
from calotype.serving.database.review.removals import Removal
from calotype.serving.database.review.takedowns import TakenDown
from calotype.serving.jobs.records import KeyRecord
from calotype.serving.storage import new_key

router = APIRouter(tags=["moderation"])

Caller = Annotated[KeyRecord, Depends(allowed("images", counted=True))]
Reader = Annotated[KeyRecord, Depends(allowed("images", "moderation"))]
ReviewerKey = Annotated[KeyRecord, Depends(allowed("moderation"))]

_DECISION = re.compile(r"dec_[0-9a-f]{24}")


class CaseObject(TypedDict):
    """An appeal, a report or a held picture."""

    id: str
    object: str
    decision_id: NotRequired[str]
    """Of an appeal; the others have `asset_id`."""
    asset_id: NotRequired[str]
    reason: str
    status: str
    note: str | None
    created_at: int
    decided_at: int | None


class CaseBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AppealBody(CaseBody):
    """Somebody thinks that a refusal is wrong."""

    decision_id: str = Field(description="error.moderation.decision_id of the refusal.")
    reason: str = Field(min_length=1, max_length=4000, description="Why it is wrong.")


class ReportBody(CaseBody):
    """Somebody thinks that a picture should not exist."""

    asset_id: str = Field(min_length=1, max_length=64, description="The picture.")
    reason: str = Field(min_length=1, max_length=4000, description="What is wrong with it.")


class DecideBody(CaseBody):
    """A reviewer's answer."""

    verdict: Literal["upheld", "overturned", "dismissed", "taken_down", "approved", "rejected"] = (
        Field(
            description="upheld or overturned for an appeal, dismissed or taken_down for a report, "
            "approved or rejected for a picture that is held."
        )
    )
    note: str = Field("", max_length=4000, description="What the asking team is told.")


@router.post("/v1/moderation/appeals", openapi_extra=json_body(AppealBody))
async def appeal(request: Request, key: Caller) -> Response:
    """Asks people to look at a refusal again. Asked twice it is the same case."""
    gateway = gateway_of(request)
    body = parse(AppealBody, await read_json(request, SMALL_BODY))
    if not _DECISION.fullmatch(body.decision_id):
        raise InvalidRequest(
            "decision_id must be the 'dec_...' of a refusal (error.moderation.decision_id).",
            param="decision_id",
        )
    case = await asyncio.to_thread(
        gateway.database.cases.open_appeal, key.team_id, body.decision_id, body.reason
    )
    return JSONResponse(describe_case(case), 201)


@router.post("/v1/moderation/reports", openapi_extra=json_body(ReportBody))
async def report(request: Request, key: Caller) -> Response:
    """Reports a picture. Whoever knows its id may, whichever team drew it."""
    gateway = gateway_of(request)
    body = parse(ReportBody, await read_json(request, SMALL_BODY))
    case = await asyncio.to_thread(
        gateway.database.cases.open_report, key.team_id, body.asset_id, body.reason
    )
    return JSONResponse(describe_case(case), 201)


@router.get("/v1/moderation/cases/{case_id}")
async def get_case(request: Request, case_id: str, key: Reader) -> CaseObject:
    """A case of one's own team; a reviewer sees everybody's."""
    reviewer = bool({"moderation", "admin"} & set(key.scopes))
    team = None if reviewer else key.team_id
    case = await asyncio.to_thread(gateway_of(request).database.cases.get_case, case_id, team)
    return describe_case(case)


@router.get("/v1/moderation/cases")
async def list_cases(
    request: Request, key: ReviewerKey, status: str = "open", limit: str = "100"
) -> Page[CaseObject]:
    """The queue, the oldest first."""
    found = await asyncio.to_thread(
        gateway_of(request).database.cases.list_cases, status, page_size(limit)
    )
    return list_object([describe_case(case) for case in found], has_more=False)


@router.post("/v1/moderation/cases/take")
async def take_case(request: Request, key: ReviewerKey) -> Response:
    """The oldest open case that is not about the key's own team, for half an hour this key's alone;
    204 when none waits."""
    reviewer = Reviewer(key.id, key.team_id)
    case = await asyncio.to_thread(gateway_of(request).database.cases.take_case, reviewer)
    return Response(status_code=204) if case is None else JSONResponse(describe_case(case))


@router.post("/v1/moderation/cases/{case_id}/decide", openapi_extra=json_body(DecideBody))
async def decide_case(request: Request, case_id: str, key: ReviewerKey) -> CaseObject:
    """Ends a case that this key took; what is taken down or rejected is gone at once."""
    gateway = gateway_of(request)
    body = parse(DecideBody, await read_json(request, SMALL_BODY))
    case = await asyncio.to_thread(gateway.database.cases.get_case, case_id)
    reviewer = Reviewer(key.id, key.team_id)
    decide = functools.partial(gateway.database.cases.decide_case, case_id, reviewer)
    if case.kind == "review":
        decide = functools.partial(decide_held, gateway, case, reviewer)
    elif body.verdict == "taken_down":
        decide = functools.partial(decide_report, gateway, case, reviewer)
    case = await asyncio.to_thread(decide, body.verdict, body.note)
    return describe_case(case)


def describe_case(case: CaseRecord) -> CaseObject:
    """A case as the API shows it."""
    found: CaseObject = {
        "id": case.id,
        "object": f"moderation.{case.kind}",
        "reason": case.reason,
        "status": case.status,
        "note": case.note,
        "created_at": int(case.created),
        "decided_at": None if case.decided is None else int(case.decided),
    }
    found["decision_id" if case.kind == "appeal" else "asset_id"] = case.subject
    return found


def decide_report(
    gateway: Gateway, case: CaseRecord, reviewer: Reviewer, verdict: str, note: str
) -> CaseRecord:
    """Ends a report by taking its picture down, in one transaction. Raises like `decide_held`."""
    database = gateway.database
    asset = database.files.get_asset(case.subject)
    if asset is None or not is_mine(case, reviewer):  # nothing to take down, or what is wrong
        return database.cases.decide_case(case.id, reviewer, verdict, note)
    order = order_for_report(gateway, asset, case.reason)
    removals: list[Removal] = []

    def take_down(connection: Connection) -> None:
        removals.append(database.takedowns.take_down_in(connection, order, reviewer.key_id)[1])

    decided = database.cases.decide_case(case.id, reviewer, verdict, note, take_down)
    for removal in removals:
        carry_out(gateway, removal)
        index_stored(gateway, marking_keys(gateway))  # what was stored in between
    return decided


def refuse_taken_down(gateway: Gateway, asset_id: str, data: bytes) -> int:
    """The newest of the takedowns that a held picture was compared with.

    Raises:
        Conflict: it falls under one of them.
    """
    newest, refused = TakenDown(gateway.database.takedowns).numbered()
    takedown_id = takedown_of(fingerprint(data, marking_keys(gateway), as_made=True), refused)
    if takedown_id is not None:
        raise Conflict(
            f"The picture '{asset_id}' falls under {takedown_id}: reject it, or lift that first.",
            code="case_conflict",
        )
    return newest


def is_mine(case: CaseRecord, reviewer: Reviewer) -> bool:
    """Whether the reviewer works on the case. `Cases.decide_case` checks it, too, and says why."""
    return case.status == "open" and case.held_by == reviewer.key_id


def decide_held(
    gateway: Gateway, case: CaseRecord, reviewer: Reviewer, verdict: str, note: str
) -> CaseRecord:
    """Ends a case about a held picture: it goes to its team, or is gone.

    Raises:
        Conflict, PermissionDenied: see `Cases.decide_case`.
        NotFound: the picture is not held any more.
    """
    database = gateway.database
    check_reviewer(case, reviewer)
    if verdict not in VERDICTS["review"] or not is_mine(case, reviewer):
        return database.cases.decide_case(case.id, reviewer, verdict, note)  # says what is wrong
    if verdict == "rejected":
        return database.held_images.reject_held(case, reviewer, note)
    held = database.held_images.get_held(case.subject)
    if held is None:
        raise NotFound(f"The picture '{case.subject}' is not held any more.")
    data = open_held(gateway, held)
    newest = refuse_taken_down(gateway, held.asset_id, data)
    key = new_key(held.team_id, data, held.content_type.rpartition("/")[2])
    # Not a picture of anybody until the row names it; what no row names is swept.
    gateway.blobs.put(key, data)
    return database.held_images.release_held(case, reviewer, note, key, newest)

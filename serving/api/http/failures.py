"""Errors on the wire: ONE table from error code or class to HTTP status and ``type``.

A code is looked up first, then the class and its bases. Everything that leaves the gateway with a
status of 400 or more is made here, in the shape of OpenAI's errors (docs/api.md).

Refusals are told in the language that a client asks for with ``Accept-Language``. A job remembers
that of the request that made it: its events and webhooks are told in it.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

from starlette.responses import JSONResponse

from calotype.moderation.policy.refusals import held_message, preferred_language, refusal_message
from calotype.serving.core import errors
from calotype.serving.core.errors import CalotypeError, NotFound
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.refusals import HELD_FOR_REVIEW


class Wire(NamedTuple):
    status: int
    type: str
    retry: bool | None = None
    """``x-should-retry``; None leaves it to the SDK, which repeats 408, 409, 429 and 5xx."""


_USER = "invalid_request_error"

BY_CODE: dict[str, Wire] = {
    "body_too_large": Wire(413, _USER),
    "request_timeout": Wire(408, _USER, retry=False),
    "deadline_unreachable": Wire(429, "requests"),
    "image_file_too_large": Wire(413, _USER),
    "unsupported_content_type": Wire(415, _USER),
    "method_not_allowed": Wire(405, _USER),
    "expired": Wire(410, _USER),
    "resolution_too_large": Wire(400, _USER),
    "insufficient_memory": Wire(400, _USER),
    "rights_revoked": Wire(403, "permission_error", retry=False),
    "picture_quarantined": Wire(451, _USER, retry=False),
    "case_conflict": Wire(409, _USER, retry=False),
    "acceptance_failed": Wire(409, _USER, retry=False),
    "dataset_not_ready": Wire(409, _USER, retry=False),
    "name_taken": Wire(409, _USER, retry=False),
    "training_not_finished": Wire(409, _USER, retry=False),
    "training_over": Wire(409, _USER, retry=False),
    "queue_full": Wire(429, "requests"),
    "insufficient_quota": Wire(429, "insufficient_quota", retry=False),
}

BY_CLASS: dict[type[CalotypeError], Wire] = {
    errors.InvalidRequest: Wire(400, _USER),
    errors.Unauthenticated: Wire(401, _USER),
    errors.PermissionDenied: Wire(403, "permission_error"),
    errors.NotFound: Wire(404, _USER),
    errors.Conflict: Wire(422, "idempotency_error"),
    errors.ContentBlocked: Wire(400, "image_generation_user_error"),
    errors.QuotaExceeded: Wire(429, "requests"),
    errors.RequestError: Wire(400, _USER),
    errors.Overloaded: Wire(503, "server_error"),
    # Not 408, and no retry: an SDK would draw the same slow picture twice more.
    errors.DeadlineExceeded: Wire(504, "server_error", retry=False),
    errors.CapacityError: Wire(503, "server_error"),
    # A damaged adapter stays damaged: the caller must leave it out.
    errors.AdapterLoadFailed: Wire(400, _USER),
    errors.ModelLoadFailed: Wire(503, "server_error"),
    errors.StorageFailed: Wire(503, "server_error"),
    errors.ModerationUnavailable: Wire(503, "server_error"),
    errors.EngineError: Wire(500, "server_error", retry=False),
    errors.Cancelled: Wire(400, _USER),
    CalotypeError: Wire(500, "server_error", retry=False),
}

SHOWN_DETAILS = (
    "moderation_details",
    "moderation",
    "estimated_seconds",
    "reason",
    "attempts",
    "job_id",
)
"""The fields of `CalotypeError.details` that clients see."""

# openai-node ignores a longer Retry-After, openai-python does not retry at all above 120 s.
_MAX_RETRY_AFTER = 60


def wire(error: CalotypeError) -> Wire:
    """Status and type of ``error``."""
    if error.code in BY_CODE:
        return BY_CODE[error.code]
    return next(BY_CLASS[cls] for cls in type(error).__mro__ if cls in BY_CLASS)


def quarantined(what: str) -> NotFound:
    """Of pictures that were drawn with an adapter whose pictures' rights were revoked."""
    return NotFound(
        f"{what} was drawn with an adapter that learnt from a picture whose rights were revoked; "
        "it is not shown.",
        code="picture_quarantined",
    )


def error_object(error: CalotypeError) -> JsonObject:
    """What stands under ``error`` in an answer or a job."""
    return {
        "message": error.message,
        "type": wire(error).type,
        "param": error.param,
        "code": error.code,
    } | {name: value for name, value in error.details.items() if name in SHOWN_DETAILS}


def error_response(error: CalotypeError) -> JSONResponse:
    status, _, retry = wire(error)
    headers: dict[str, str] = {}
    if retry is not None:
        headers["x-should-retry"] = str(retry).lower()
    if status in (429, 503) and retry is not False:
        seconds = min(_MAX_RETRY_AFTER, max(1, math.ceil(error.retry_after or 1)))
        headers["retry-after"] = str(seconds)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error_object(error)}, status_code=status, headers=headers)


def localized(error: CalotypeError, accept_language: str) -> CalotypeError:
    """The same error, with ``moderation.user_message`` in the best language there is.

    Its shape and its ``message`` stay: programs read those.
    """
    moderation = error.details.get("moderation")
    if not isinstance(moderation, dict) or "user_message" not in moderation:
        return error
    categories = error.details.get("moderation_details", {}).get("categories", [])
    language = preferred_language(accept_language)
    if error.code == HELD_FOR_REVIEW:
        sentence = held_message(language)
    else:
        sentence = refusal_message(categories, moderation["user_message"], language)
    answered = copy.copy(error)
    answered.details = error.details | {"moderation": moderation | {"user_message": sentence}}
    return answered

"""How far a fetch is: what a reconcile learns from one step of it, and what a status says of it."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.objects import Manifest, Object
from calotype.serving.config import Retried
from calotype.serving.wire.fetch_result import FetchedWeights


@dataclass(frozen=True, slots=True)
class FetchStep:
    """One step of a fetch."""

    fetched: FetchedWeights | None = None
    failure: Retried | None = None
    """``status.lastFailure`` after this step."""
    reason: Reason | str = Reason.WAITING
    message: str = ""
    again: float | None = None
    """Seconds after which to look again."""
    failed: bool = False


def last_failure(status: Object) -> Retried | None:
    """``status.lastFailure``; None where there is none, or one that cannot be read."""
    try:
        return Retried.model_validate(status["lastFailure"])
    except (KeyError, ValidationError):
        return None


def failure_field(failure: Retried | None) -> Manifest | None:
    """``status.lastFailure`` as JSON."""
    return None if failure is None else failure.model_dump(by_alias=True, exclude_none=True)


def failure_message(failure: Retried) -> str:
    """The failure, how often it was tried and when it is tried again."""
    retry = failure.next_retry_time
    after = f"tried again at {retry}" if retry else "tried again after a change"
    return f"{failure.message} (attempt {failure.attempts}; {after})"

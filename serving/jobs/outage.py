"""Passing faults of what a job needs: the job waits for the part and goes on when it is back.

A fault gives the lease back with a pause that grows. It is counted apart from the deaths of
replicas, and ends the job only when the part has been away for too long.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from calotype.serving.core.errors import (
    CalotypeError,
    DependencyUnavailable,
    ModerationUnavailable,
    OutOfMemory,
    Overloaded,
    StorageFailed,
)
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields
from calotype.serving.jobs.records import JobRecord

PART = "part"
"""Field of `CalotypeError.details`: the part whose fault it is."""
SAFETY_STAGE = "safety_stage"
SAFETY_CHECK = "safety_check"
"""The safety stage is there, and did not finish with this content in its time."""
DEVICE_MEMORY = "device_memory"
FINAL = "final"
"""Field of `CalotypeError.details`: asking again does not help."""

_NAMES = {
    "text_encoder": "the text encoder",
    SAFETY_STAGE: "the safety stage",
    SAFETY_CHECK: "the safety stage, which did not finish with it in time",
    "storage": "the object store or the job database",
    DEVICE_MEMORY: "memory of the device, which other requests have taken",
    "adapter": "an adapter that it names",
    "model": "the model",
}
_CODES = {
    SAFETY_STAGE: "moderation_unavailable",
    SAFETY_CHECK: "moderation_unavailable",
    "storage": "storage_unavailable",
}
"""Of `DependencyUnavailable`, where clients know one for the part."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_MOST_FAULTS = {DEVICE_MEMORY: 5, SAFETY_CHECK: 3}
"""After so many it is the request itself: too large, or made for classifiers to hang over."""


@dataclass(frozen=True, slots=True)
class Outage:
    """The column ``outage`` of a job: what it waits for, or waited for last."""

    part: str
    since: float
    """When the first fault of this part was; a fault of another part begins anew."""
    faults: int
    """Of this part, one after the other."""
    retry_at: float
    """When the job is tried again."""
    message: str
    """The last fault: a sentence."""
    leases: int = 0
    """How often a lease was given back, whatever the part."""

    def to_payload(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def of(cls, job: JobRecord) -> Outage | None:
        return None if job.outage is None else cls(**known_fields(cls, job.outage))


def part_at_fault(error: CalotypeError) -> str | None:
    """The part whose passing fault an error is; None where it is the request's own, or a bug."""
    if error.details.get(FINAL):
        return None
    if isinstance(error, ModerationUnavailable):
        return str(error.details.get(PART, SAFETY_STAGE))
    if isinstance(error, StorageFailed):
        return "storage"
    if isinstance(error, Overloaded):
        return str(error.details.get(PART, "model"))
    if isinstance(error, OutOfMemory) and error.details.get(PART) == DEVICE_MEMORY:
        return DEVICE_MEMORY
    return None


def next_outage(
    job: JobRecord, error: CalotypeError, now: float, longest: float, *, leased: bool
) -> Outage | None:
    """What a job waits for after a passing fault; None when it has waited for too long.

    Args:
        longest: seconds for which a part may be away before the job ends.
        leased: a lease was given back for it.
    """
    part, before = part_at_fault(error) or "model", Outage.of(job)
    leases = int(leased) + (before.leases if before else 0)
    since, faults = now, 1
    if before is not None and before.part == part:
        since, faults = before.since, before.faults + 1
    if now - since >= longest or faults >= _MOST_FAULTS.get(part, faults + 1):
        return None
    pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(16, faults - 1))
    # The last attempt is made when the time is over, not after it.
    retry_at = min(now + pause, since + longest)
    return Outage(part, since, faults, retry_at, error.message[:500], leases)


def outage_error(job: JobRecord, error: CalotypeError, now: float) -> CalotypeError:
    """The error of a job that has waited for too long: ``error`` was the last fault."""
    part, before = part_at_fault(error) or "model", Outage.of(job)
    if part == DEVICE_MEMORY:
        return error
    waited = now - before.since if before is not None and before.part == part else 0.0
    return DependencyUnavailable(
        f"The job was given up: it waited {waited:.0f} s for {_NAMES.get(part, part)}. "
        f"The last fault was: {error.message} Send the request again later.",
        code=_CODES.get(part),
        retry_after=30,
        details={"reason": f"{part}_unavailable"},
    )


def waits_for(job: JobRecord) -> Outage | None:
    """The outage that a job waits out; None when it does not wait for a part."""
    return Outage.of(job) if job.status == "queued" else None


def waited_out(job: JobRecord, began: float, now: float) -> float:
    """Seconds since ``began`` for which a job has waited for a part; below 0 where it does not."""
    outage = waits_for(job)
    return -1.0 if outage is None else now - max(began, outage.since)


def waiting_error(job: JobRecord, now: float) -> DependencyUnavailable | None:
    """What a caller is told who gives up waiting for a job that waits itself; None if it does not.

    The job goes on.
    """
    outage = waits_for(job)
    if outage is None:
        return None
    return DependencyUnavailable(
        f"The job {job.id} waits for {_NAMES.get(outage.part, outage.part)} and goes on by itself. "
        f"Send the same request again to wait for it, or ask for it by GET /v1/jobs/{job.id}.",
        code=_CODES.get(outage.part),
        retry_after=max(5.0, outage.retry_at - now),
        details={"reason": f"{outage.part}_unavailable", "job_id": job.id},
    )

"""The right to run a job: who holds it, under which fence, until when.

In memory, by a clock that never goes back; the store keeps what a restarted dispatcher needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from calotype.serving.jobs.predictor import work_units
from calotype.serving.jobs.records import JobRecord


@dataclass(frozen=True, slots=True)
class Lease:
    """What a generator replica gets. JSON-able: `to_payload` and back."""

    job_id: str
    fence: int
    """Names this lease; every later word about the job must carry it."""
    request: dict[str, Any]
    """`GenerationRequest.to_payload`."""
    input: dict[str, Any]
    """How to encode the pictures: ``output_format``, ``output_compression``, ``request_id``..."""
    team_id: str
    expires: float
    """Seconds since the epoch; a heartbeat moves it."""

    @classmethod
    def of(cls, job: JobRecord, expires: float) -> Lease:
        return cls(job.id, job.fence, job.request, job.input, job.team_id, expires)

    def to_payload(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Lease:
        return cls(**payload)


@dataclass(frozen=True, slots=True)
class KnownJob:
    """What a dispatcher remembers of a job that is not over."""

    team: str
    units: float
    """`predictor.work_units` of the whole job."""
    priority: int
    deadline: float | None

    @classmethod
    def of(cls, job: JobRecord) -> KnownJob:
        return cls(job.team_id, work_units(job.request), job.priority, job.deadline)


@dataclass(slots=True)
class HeldLease:
    """The dispatcher's side of a lease."""

    job_id: str
    fence: int
    replica: str
    expires: float
    """By `Clock.monotonic`."""
    done: float = 0.0
    """Share of the steps that are done, 0 to 1."""


class LeaseTable:
    def __init__(self) -> None:
        self._held: dict[str, HeldLease] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldLease]:
        return iter(list(self._held.values()))

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._held

    def grant(self, lease: HeldLease) -> None:
        self._held[lease.job_id] = lease

    def held(self, job_id: str, fence: int, replica: str | None = None) -> HeldLease | None:
        """The lease if it is the current one (and this replica's)."""
        lease = self._held.get(job_id)
        if lease is None or lease.fence != fence:
            return None
        return lease if replica in (None, lease.replica) else None

    def drop(self, job_id: str, fence: int | None = None) -> None:
        lease = self._held.get(job_id)
        if lease is not None and fence in (None, lease.fence):
            del self._held[job_id]

    def expired(self, now: float) -> list[HeldLease]:
        return [lease for lease in self._held.values() if lease.expires <= now]

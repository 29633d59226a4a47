"""The right to run a job: who holds it, under which fence, until when.

In memory, by a clock that never goes back; the database keeps what a restarted dispatcher needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calotype.serving.jobs.judging import held_categories, version_of
from calotype.serving.jobs.recipe import image_recipe
from calotype.serving.jobs.records import Checkpoint, JobRecord


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
    recipe: dict[str, Any] | None = None
    """What the files carry (`stamp_for`)."""
    checkpoint: dict[str, Any] | None = None
    """``{"step", "blob_key"}`` of what another replica left; None = from the beginning."""
    version: Sequence[Any] | None = None
    """What its prompt was judged by (`judging.version_of`)."""
    hold: Sequence[str] | None = None
    """The categories for which its prompt makes every picture wait for a person; None = none."""

    @classmethod
    def of(cls, job: JobRecord, expires: float, checkpoint: Checkpoint | None = None) -> Lease:
        left = None
        judged = (job.moderation or {}).get("input")
        version = None if judged is None else version_of(judged)
        if checkpoint is not None:
            left = {"step": checkpoint.step, "blob_key": checkpoint.blob_key}
        return cls(
            *(job.id, job.fence, job.request, job.input, job.team_id, expires, job.recipe),
            *(left, version, None if judged is None else held_categories(judged)),
        )

    def stamp_for(self, index: int) -> dict[str, Any] | None:
        """The recipe that the file of picture ``index`` carries; see `stamp.stamp`."""
        if self.recipe is None:
            return None
        return image_recipe(self.recipe, index, bool(self.input.get("prompt_in_files")))

    def to_payload(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Lease:
        return cls(**payload)


@dataclass(frozen=True, slots=True)
class KnownJob:
    """What a dispatcher remembers of a job that is not over."""

    team: str
    request: dict[str, Any]
    """What its work is predicted by: drawn size, steps, pictures."""
    priority: int
    deadline: float | None
    created: float

    @classmethod
    def of(cls, job: JobRecord) -> KnownJob:
        work = {name: job.request[name] for name in ("rendered_size", "steps", "n")}
        return cls(job.team_id, work, job.priority, job.deadline, job.created)


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
    granted: float = 0.0
    """By `Clock.monotonic`."""
    alone: bool = True
    """Nothing else ran or waited while it did."""


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

    def done(self, job_id: str) -> float:
        """Share of the job's steps that are done, 0 to 1."""
        lease = self._held.get(job_id)
        return 0.0 if lease is None else lease.done

    def drop(self, job_id: str, fence: int | None = None) -> None:
        lease = self._held.get(job_id)
        if lease is not None and fence in (None, lease.fence):
            del self._held[job_id]

    def expired(self, now: float) -> list[HeldLease]:
        return [lease for lease in self._held.values() if lease.expires <= now]

"""The leases that a dispatcher has granted: to whom, under which fence, until when.

In memory, by a clock that never goes back; the database keeps what a restarted dispatcher needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from calotype.serving.core.errors import CalotypeError


@dataclass(slots=True)
class GrantedLease:
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
    returned: bool = False
    """Its replica gave it back, which could not be recorded yet: it is no death."""
    fault: CalotypeError | None = None
    """The passing fault for which it was given back."""


class LeaseTable:
    """Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._granted: dict[str, GrantedLease] = {}

    def __len__(self) -> int:
        return len(self._granted)

    def __iter__(self) -> Iterator[GrantedLease]:
        return iter(list(self._granted.values()))

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._granted

    def grant(self, lease: GrantedLease) -> None:
        self._granted[lease.job_id] = lease

    def get(self, job_id: str, fence: int, replica: str | None = None) -> GrantedLease | None:
        """The lease if it is the current one (and this replica's)."""
        lease = self._granted.get(job_id)
        if lease is None or lease.fence != fence:
            return None
        return lease if replica in (None, lease.replica) else None

    def done(self, job_id: str) -> float:
        """Share of the job's steps that are done, 0 to 1."""
        lease = self._granted.get(job_id)
        return 0.0 if lease is None else lease.done

    def remove(self, job_id: str, fence: int | None = None) -> None:
        lease = self._granted.get(job_id)
        if lease is not None and fence in (None, lease.fence):
            del self._granted[job_id]

    def extend(self, until: float) -> None:
        """No lease ends before ``until``: this process was the one that did not listen."""
        for lease in self._granted.values():
            if not lease.returned:
                lease.expires = max(lease.expires, until)

    def expired(self, now: float) -> list[GrantedLease]:
        return [lease for lease in self._granted.values() if lease.expires <= now]

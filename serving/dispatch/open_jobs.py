"""What a dispatcher remembers of its jobs that are not over: where each is, and who waits for it.

Nothing here is durable: it can be lost at any moment, and is rebuilt from the job database.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from calotype.serving.dispatch.fair_queue import FairQueue
from calotype.serving.dispatch.lease_table import LeaseTable
from calotype.serving.jobs.predictor import Work
from calotype.serving.jobs.records import JobRecord


@dataclass(frozen=True, slots=True)
class OpenJob:
    team: str
    work: Work
    """What its device time is predicted by."""
    priority: int
    deadline: float | None
    created: float

    @classmethod
    def from_record(cls, job: JobRecord) -> OpenJob:
        work = Work.from_request(job.request)
        return cls(job.team_id, work, job.priority, job.deadline, job.created)


@dataclass(frozen=True, slots=True)
class DispatcherState:
    """Figures for autoscaling, ``ModelStatus`` and metrics."""

    queued: int
    running: int
    checking: int
    """Jobs whose prompts are being checked."""
    postponed: int
    """Jobs that wait for a part which is away."""
    backlog_seconds: float
    """Predicted device seconds of everything that is not over."""


class OpenJobs:
    """Jobs that are being checked, postponed, wait in ``queue`` or run under one of ``leases``.

    Not thread-safe: one event loop owns it.
    """

    def __init__(self) -> None:
        self.queue, self.leases = FairQueue(), LeaseTable()
        self.postponed: dict[str, float] = {}
        """Queued jobs that wait for a part -> when they are tried again (`Clock.time`)."""
        self._jobs: dict[str, OpenJob] = {}
        self._ended: dict[str, asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._jobs))

    def get(self, job_id: str) -> OpenJob | None:
        return self._jobs.get(job_id)

    def add(self, job: JobRecord) -> None:
        self._jobs[job.id] = OpenJob.from_record(job)

    def forget(self, job_id: str) -> None:
        """Without a word to those who wait for it: it is not over."""
        self._jobs.pop(job_id, None)
        self.postponed.pop(job_id, None)

    def end(self, job_id: str) -> None:
        """The job is over: forgets it and wakes those who wait for it."""
        self.forget(job_id)
        self.queue.remove(job_id)
        self.leases.remove(job_id)
        ended = self._ended.pop(job_id, None)
        if ended is not None:
            ended.set()

    def late(self, now: float) -> list[str]:
        """Jobs whose deadline has passed."""
        jobs = self._jobs.items()
        return [job_id for job_id, job in jobs if job.deadline and job.deadline <= now]

    def state(self, backlog_seconds: float) -> DispatcherState:
        queued, running = len(self.queue), len(self.leases)
        checking = max(0, len(self) - queued - running - len(self.postponed))
        return DispatcherState(queued, running, checking, len(self.postponed), backlog_seconds)

    def on_end(self, job_id: str) -> asyncio.Event:
        """Set by `end`."""
        return self._ended.setdefault(job_id, asyncio.Event())


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Returns when the event is set, or after ``seconds``."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()

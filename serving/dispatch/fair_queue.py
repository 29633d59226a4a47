"""Who is next: start-time fair queueing between teams, priority inside a team.

Every team has a virtual clock that runs with the seconds of work it was given, divided by its
weight; the team whose clock is furthest behind is served next. A team that was idle starts at the
present: nobody saves up credit. (Goyal, Vin, Cheng: Start-time Fair Queuing, 1996.)
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class QueuedJob:
    job_id: str
    team: str
    seconds: float
    """Predicted work, charged to the team when the job is taken."""
    priority: int = 0
    """Higher runs first inside its team."""
    charged: bool = False
    """It was taken before and came back through no fault of its team: charge nothing, go first."""
    created: float = 0.0
    """Among equals the older one goes first, whoever was checked first."""


@dataclass(slots=True)
class _Team:
    weight: float = 1.0
    finish: float = 0.0
    heap: list[tuple[int, float, int, str]] = field(default_factory=list)


class FairQueue:
    """Queued jobs of one model. Not thread-safe: one event loop owns it."""

    def __init__(self) -> None:
        self._teams: dict[str, _Team] = {}
        self._jobs: dict[str, QueuedJob] = {}
        self._now = 0.0
        self._arrival = itertools.count()
        self._returned = itertools.count(-1, -1)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._jobs

    def set_weight(self, team: str, weight: float) -> None:
        self._teams.setdefault(team, _Team()).weight = max(weight, 1e-6)

    def push(self, job: QueuedJob) -> None:
        """Adds a job; one that is queued already stays where it is."""
        if job.job_id in self._jobs:
            return
        team = self._teams.setdefault(job.team, _Team())
        if not team.heap:
            team.finish = max(team.finish, self._now)
        order = next(self._returned if job.charged else self._arrival)
        age = -1.0 if job.charged else job.created
        heapq.heappush(team.heap, (-job.priority, age, order, job.job_id))
        self._jobs[job.job_id] = job

    def pop(self) -> QueuedJob | None:
        """Takes the next job and charges its team."""
        waiting = [(team.finish, name) for name, team in self._teams.items() if self._trim(team)]
        if not waiting:
            return None
        start, name = min(waiting)
        team = self._teams[name]
        job = self._jobs.pop(heapq.heappop(team.heap)[3])
        self._now = max(self._now, start)
        if not job.charged:
            team.finish = start + job.seconds / team.weight
        return job

    def order(self) -> list[QueuedJob]:
        """All queued jobs in the order in which `pop` would give them if none came or left."""
        ahead = FairQueue()
        ahead._jobs, ahead._now = dict(self._jobs), self._now
        for name, team in self._teams.items():
            if team.heap:
                ahead._teams[name] = _Team(team.weight, team.finish, list(team.heap))
        return list(iter(ahead.pop, None))

    def remove(self, job_id: str) -> bool:
        """Forgets a job; False when it is not queued."""
        return self._jobs.pop(job_id, None) is not None

    def _trim(self, team: _Team) -> bool:
        # Removed jobs stay in the heap until they reach its top.
        while team.heap and team.heap[0][3] not in self._jobs:
            heapq.heappop(team.heap)
        return bool(team.heap)

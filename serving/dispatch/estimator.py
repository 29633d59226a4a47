"""What a dispatcher knows of time: it learns from jobs that end and foresees those that wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from calotype.serving.core.protocols import Clock
from calotype.serving.database.forecasts import Forecast, foresee
from calotype.serving.dispatch.fair_queue import FairQueue
from calotype.serving.jobs.lease import HeldLease, KnownJob, LeaseTable
from calotype.serving.jobs.predictor import WorkPredictor
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.throughput import Throughput

_RECENT = 32
"""Leases whose company tells how many jobs run at once."""


class Estimator:
    """Of one dispatcher, over its tables of jobs.

    Args:
        most: jobs that a forecast tells of, one by one.
    """

    def __init__(
        self,
        model: str | None,
        clock: Clock,
        known: Mapping[str, KnownJob],
        leases: LeaseTable,
        queue: FairQueue,
        most: int,
    ) -> None:
        self.predictor, self.throughput = WorkPredictor(), Throughput()
        self._model, self._clock, self._most = model or "", clock, most
        self._known, self._leases, self._queue = known, leases, queue
        self._told: Forecast | None = None
        self._together: deque[int] = deque([1], maxlen=_RECENT)

    def backlog_seconds(self) -> float:
        """Predicted device seconds of everything that is not over."""
        return sum(self._left(job_id) for job_id in self._known)

    def forecast(self) -> Forecast:
        """What can be said of the time to come."""
        running = [held.job_id for held in self._leases if held.job_id in self._known]
        waiting = [queued.job_id for queued in self._queue.order() if queued.job_id in self._known]
        told, silent = waiting[: self._most], waiting[self._most :]
        found = foresee(
            self._model,
            self._clock.time(),
            [(job_id, self._left(job_id)) for job_id in running],
            [(job_id, self._left(job_id)) for job_id in told],
            self.predictor,
            self.throughput,
            together=max(self._together),
        )
        beyond = sum(self._left(job_id) for job_id in silent) * found.throughput
        return replace(found, queued=len(waiting), backlog_seconds=found.backlog_seconds + beyond)

    def news(self, repeat_seconds: float) -> Forecast | None:
        """The forecast, when it says something new or the last one is old."""
        found, told = self.forecast(), self._told
        if told is not None and found == replace(told, updated=found.updated):
            if found.updated - told.updated < repeat_seconds:
                return None
        self._told = found
        return found

    def started(self, now: float) -> bool:
        """A job is about to be leased; whether nothing else runs or waits."""
        self.throughput.started(now)
        self._together.append(len(self._leases) + 1)
        for other in self._leases:
            other.alone = False
        return not len(self._leases) and not len(self._queue)

    def ended(self, job: JobRecord, lease: HeldLease | None, device_seconds: float) -> None:
        """A job was drawn in so many measured device seconds; ``lease`` is what it ran under."""
        self.predictor.learn(job.request, device_seconds)
        busy = bool(len(self._leases) or len(self._queue))
        now = self._clock.monotonic()
        self.throughput.ended(now, device_seconds, busy=busy)
        if lease is not None and lease.alone and not busy:
            self.throughput.ran_alone(now - lease.granted, device_seconds)

    def _left(self, job_id: str) -> float:
        whole = self.predictor.predict(self._known[job_id].request)
        return whole * (1 - self._leases.done(job_id))

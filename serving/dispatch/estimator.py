"""Estimates when jobs will be over: it learns from those that end."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from calotype.serving.core.protocols import Clock
from calotype.serving.dispatch.lease_table import GrantedLease
from calotype.serving.dispatch.open_jobs import OpenJobs
from calotype.serving.jobs.forecast import Forecast, make_forecast
from calotype.serving.jobs.predictor import Work, WorkPredictor
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.throughput import Throughput

_RECENT = 32
"""Leases whose company tells how many jobs run at once."""


class Estimator:
    """Of one dispatcher, over its open jobs.

    Args:
        most: jobs of which a forecast tells one by one.
    """

    def __init__(self, model: str | None, clock: Clock, open_jobs: OpenJobs, most: int) -> None:
        self.predictor, self.throughput = WorkPredictor(), Throughput()
        self._model, self._clock, self._most = model or "", clock, most
        self._open = open_jobs
        self._last: Forecast | None = None
        self._together: deque[int] = deque([1], maxlen=_RECENT)

    def backlog_seconds(self) -> float:
        """Predicted device seconds of everything that is not over."""
        return sum(self._remaining(job_id) for job_id in self._open)

    def forecast(self) -> Forecast:
        running = [lease.job_id for lease in self._open.leases if lease.job_id in self._open]
        queue = self._open.queue.order()
        waiting = [queued.job_id for queued in queue if queued.job_id in self._open]
        listed, unlisted = waiting[: self._most], waiting[self._most :]
        found = make_forecast(
            self._model,
            self._clock.time(),
            [(job_id, self._remaining(job_id)) for job_id in running],
            [(job_id, self._remaining(job_id)) for job_id in listed],
            self.predictor,
            self.throughput,
            together=max(self._together),
        )
        beyond = sum(self._remaining(job_id) for job_id in unlisted) * found.throughput
        return replace(found, queued=len(waiting), backlog_seconds=found.backlog_seconds + beyond)

    def changed_forecast(self, repeat_seconds: float) -> Forecast | None:
        """The forecast, when it differs from the last one or that one is old."""
        found, last = self.forecast(), self._last
        if last is not None and found == replace(last, updated=found.updated):
            if found.updated - last.updated < repeat_seconds:
                return None
        self._last = found
        return found

    def started(self, now: float) -> bool:
        """A job is about to be leased; whether nothing else runs or waits."""
        self.throughput.started(now)
        self._together.append(len(self._open.leases) + 1)
        for other in self._open.leases:
            other.alone = False
        return not self._busy

    def ended(self, job: JobRecord, lease: GrantedLease | None, device_seconds: float) -> None:
        """A job was drawn in so many measured device seconds; ``lease`` is what it ran under."""
        self.predictor.learn(Work.from_request(job.request), device_seconds)
        busy, now = self._busy, self._clock.monotonic()
        self.throughput.ended(now, device_seconds, busy=busy)
        if lease is not None and lease.alone and not busy:
            self.throughput.ran_alone(now - lease.granted, device_seconds)

    @property
    def _busy(self) -> bool:
        return bool(len(self._open.leases) or len(self._open.queue))

    def _remaining(self, job_id: str) -> float:
        job = self._open.get(job_id)
        if job is None:
            return 0.0
        return self.predictor.predict(job.work) * (1 - self._open.leases.done(job_id))

"""How long things will take, as the gateway tells its clients."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from calotype.serving.core.errors import Overloaded
from calotype.serving.database.database import Database
from calotype.serving.jobs.forecast import Forecast, promise
from calotype.serving.jobs.predictor import Work
from calotype.serving.jobs.records import JobRecord

FRESH_SECONDS = 60.0
"""An older forecast says nothing any more: its dispatcher is away."""


@dataclass(frozen=True, slots=True)
class JobEstimate:
    queue_position: int | None
    """How many jobs are taken before it; None when it does not wait, or nobody knows."""
    estimated_seconds: float | None
    """Until it is over; None when it is, or nobody knows."""


class Estimates:
    """Forecasts from the database, each read at most every `max_age_seconds`."""

    def __init__(self, database: Database, max_age_seconds: float) -> None:
        self._database, self._max_age = database, max_age_seconds
        self._known: dict[str, tuple[float, Forecast]] = {}

    async def forecast(self, model: str) -> Forecast:
        now = asyncio.get_running_loop().time()
        known = self._known.get(model)
        if known is None or now - known[0] > self._max_age:
            known = (now, await asyncio.to_thread(self._database.forecasts.get_forecast, model))
            self._known[model] = known
        return known[1]

    async def of_job(self, job: JobRecord) -> JobEstimate:
        if job.over:
            return JobEstimate(None, None)
        forecast = await self.forecast(job.model)
        now = self._database.clock.time()
        if not forecast.measured or now - forecast.updated > FRESH_SECONDS:
            return JobEstimate(None, None)
        position = forecast.positions.get(job.id) if job.status == "queued" else None
        left = forecast.seconds_left(job.id, now)
        if left is None:
            # Not in the forecast yet: it stands behind everything that is.
            left = forecast.new_job_seconds(Work.from_request(job.request))
            position = forecast.queued if job.status == "queued" else None
        return JobEstimate(position, left)

    def estimate(self, forecast: Forecast, work: Work) -> float | None:
        """Seconds until a job that is made now is over; None when nothing was measured yet."""
        fresh = self._database.clock.time() - forecast.updated <= FRESH_SECONDS
        return forecast.new_job_seconds(work) if forecast.measured and fresh else None


def check_deadline(estimate: float | None, deadline_seconds: float | None) -> None:
    """Refuses a job that would miss the deadline that its client set.

    Raises:
        Overloaded: with the estimate.
    """
    if estimate is None or deadline_seconds is None or estimate <= deadline_seconds:
        return
    raise Overloaded(
        f"deadline_seconds is {deadline_seconds:g}, but the job would be over in about "
        f"{estimate:.0f} s. Allow that much, or try again later.",
        code="deadline_unreachable",
        param="deadline_seconds",
        retry_after=max(1.0, estimate - deadline_seconds),
        details={"estimated_seconds": round(estimate, 1)},
    )


def promised_by(now: float, estimate: float | None) -> float | None:
    return None if estimate is None else now + promise(estimate)

"""The settings of a dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from calotype.serving.jobs.moderation_checks import CheckRetries


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    lease_seconds: float = 30.0
    """A replica that is silent for so long has lost its jobs; beat three times as often."""
    max_attempts: int = 2
    """Replicas that may die over one job before it is given up."""
    max_fences: int = 50
    """Bound of all leases of one job, for jobs that take the dispatcher down with them."""
    max_outage_seconds: float = 900.0
    """How long a job waits for a part that it needs before it fails."""
    sweep_seconds: float | None = 1.0
    """Pause between sweeps; None = only when `Dispatcher.sweep` is called."""
    rescan_seconds: float = 15.0
    """How often the database is searched for queued jobs that nobody announced."""
    poll_seconds: float = 1.0
    """How often the database is asked for young jobs that nobody announced."""
    max_forecast: int = 2000
    """Jobs that a forecast tells of, one by one."""
    checks_at_once: int = 16
    """Prompts that are checked at the same time."""
    storage_delays: Sequence[float] = (0.1, 0.5, 2.0)
    """Pauses between attempts at a database that cannot be read or written."""
    check_retries: CheckRetries = field(default_factory=CheckRetries)

    @property
    def longest_poll(self) -> float:
        """Seconds that a replica may wait for work: less than a lease lasts, or one that died while
        it waited would be given the same job once more when its lease has ended."""
        return self.lease_seconds * 5 / 6

"""How many requests a second each team may send to this gateway, whatever they ask for.

It keeps one team from taking a gateway from the others by asking. What a team's work may cost is
its quota, in the database (`database.accounts.quotas`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from calotype.serving.core.errors import QuotaExceeded

BURST_SECONDS = 10.0
"""A team that was quiet for so long may send so many seconds' worth at once."""
_MOST_TEAMS = 10_000


class RequestRates:
    """A bucket of requests for each team, in this process.

    Args:
        per_second: requests of one team.
        clock: seconds that never go back.
    """

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._most = max(1.0, per_second * BURST_SECONDS)
        self._buckets: dict[str, tuple[float, float]] = {}
        """Team -> requests left, and when."""

    def take(self, team_id: str) -> None:
        """Counts one request. Raises QuotaExceeded when the team has none left."""
        now = self._clock()
        left, since = self._buckets.pop(team_id, (self._most, now))
        left = min(self._most, left + (now - since) * self._per_second)
        if len(self._buckets) >= _MOST_TEAMS:  # the one that has been quiet for longest
            del self._buckets[next(iter(self._buckets))]
        self._buckets[team_id] = (max(0.0, left - 1.0), now)
        if left < 1.0:
            raise QuotaExceeded(
                f"Your team sends more than {self._per_second:g} requests a second to this "
                "gateway. Wait a moment between them.",
                retry_after=(1.0 - left) / self._per_second,
            )

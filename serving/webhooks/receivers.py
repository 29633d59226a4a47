"""Who of the receivers of webhooks may be sent something now.

A receiver that does not answer holds a connection for a quarter of a minute. So each receiver and
each team gets few of the sender's connections at once, a team that has none gets one before
others get more, and a receiver that fails again and again is left alone for a while.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from calotype.serving.jobs.records import DeliveryRecord

log = logging.getLogger(__name__)

AT_ONCE = 64
PER_TEAM = 8
PER_RECEIVER = 4
_FOR_IDLE_TEAMS = 16
"""Of `AT_ONCE`: kept for teams to which nothing is being sent."""
_FAILURES = 5
"""So many in a row, and a receiver is left alone."""
_FIRST_PAUSE, _LONGEST_PAUSE = 30.0, 900.0
_MOST_KNOWN = 10_000


def receiver_of(delivery: DeliveryRecord) -> str:
    """What failures are counted for: the endpoint, or the address of a job's own webhook."""
    return delivery.endpoint_id or delivery.url


@dataclass(slots=True)
class _Circuit:
    """How a receiver has answered."""

    failures: int = 0
    pause: float = _FIRST_PAUSE
    open_until: float = 0.0


@dataclass(slots=True)
class Receivers:
    """The connections and circuits of one sender.

    Args:
        now: seconds since the epoch.
    """

    now: Callable[[], float]
    _teams: Counter[str] = field(default_factory=Counter)
    _receivers: Counter[str] = field(default_factory=Counter)
    _circuits: dict[str, _Circuit] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Deliveries are chosen inside the transaction that claims them, in another thread."""

    def left_alone(self) -> list[str]:
        """Receivers to which nothing is sent at the moment."""
        now = self.now()
        full = [name for name, running in self._receivers.items() if running >= PER_RECEIVER]
        return full + [name for name, found in self._circuits.items() if found.open_until > now]

    def busy_teams(self) -> list[str]:
        """Teams that have all of their connections."""
        return [team for team, running in self._teams.items() if running >= PER_TEAM]

    def take(self, delivery: DeliveryRecord) -> bool:
        """Takes a connection for a delivery; False when there is none for it."""
        with self._lock:
            return self._take(delivery)

    def _take(self, delivery: DeliveryRecord) -> bool:
        receiver, team = receiver_of(delivery), delivery.team_id
        circuit = self._circuits.get(receiver)
        most = PER_RECEIVER
        if circuit is not None and circuit.failures >= _FAILURES:
            if circuit.open_until > self.now():
                return False
            most = 1  # one attempt shows whether it answers again
        mine = self._teams.get(team, 0)
        free = AT_ONCE - _FOR_IDLE_TEAMS if mine else AT_ONCE
        if self._teams.total() >= free or mine >= PER_TEAM:
            return False
        if self._receivers.get(receiver, 0) >= most:
            return False
        self._teams[team] += 1
        self._receivers[receiver] += 1
        return True

    def give_back(self, delivery: DeliveryRecord) -> None:
        """Its attempt is over."""
        with self._lock:
            for taken, name in (
                (self._teams, delivery.team_id),
                (self._receivers, receiver_of(delivery)),
            ):
                taken[name] -= 1
                if not taken[name]:
                    del taken[name]

    def answered(self, delivery: DeliveryRecord, well: bool) -> None:
        """How a receiver has answered; not at all is not well."""
        name = receiver_of(delivery)
        if well:
            self._circuits.pop(name, None)
            return
        if name not in self._circuits and len(self._circuits) >= _MOST_KNOWN:
            del self._circuits[next(iter(self._circuits))]
        circuit = self._circuits.setdefault(name, _Circuit())
        circuit.failures += 1
        if circuit.failures >= _FAILURES and circuit.open_until <= self.now():
            circuit.open_until = self.now() + circuit.pause
            log.warning(
                "the webhook receiver of delivery %s failed %d times in a row; nothing is sent "
                "to it for %.0f s",
                delivery.id,
                circuit.failures,
                circuit.pause,
            )
            circuit.pause = min(_LONGEST_PAUSE, 2 * circuit.pause)

"""How fast the queue really moves: seconds that pass for one device second of work.

Device time is not all that a job takes, and several jobs share a device; so the pace is measured
where it shows, between the ends of jobs while work waits. What a job takes beside device time
shows when it runs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.97
"""Weight of the past at each end: about the last thirty jobs count."""
_LEARNING_RATE = 0.2
_ENOUGH = 3


@dataclass(slots=True)
class Throughput:
    """Not thread-safe: one event loop owns it."""

    overhead_seconds: float = 0.0
    """Of a job that runs alone, from its lease to its end, beyond what the pace explains."""
    _work: float = 0.0
    _time: float = 0.0
    _ends: int = 0
    _since: float | None = None
    _alone_seen: bool = False

    @property
    def seconds_per_device_second(self) -> float:
        """1 until enough was seen."""
        return self._time / self._work if self._ends >= _ENOUGH and self._work > 0 else 1.0

    def started(self, now: float) -> None:
        """A job was leased; begins a busy time unless one lasts."""
        if self._since is None:
            self._since = now

    def ended(self, now: float, device_seconds: float, *, busy: bool) -> None:
        """A job that took so much device time ended; ``busy`` = others wait or run."""
        if self._since is not None and device_seconds > 0:
            self._work = self._work * _MEMORY + device_seconds
            self._time = self._time * _MEMORY + max(0.0, now - self._since)
            self._ends += 1
            if self._ends == _ENOUGH:
                # What was put down to each job's own overhead so far, the pace explains from here.
                self.overhead_seconds, self._alone_seen = 0.0, False
        self._since = now if busy else None

    def stopped(self) -> None:
        """Nothing waits or runs any more."""
        self._since = None

    def ran_alone(self, seconds: float, device_seconds: float) -> None:
        """A job that met no other was over ``seconds`` after it was leased."""
        spare = max(0.0, seconds - device_seconds * self.seconds_per_device_second)
        rate = _LEARNING_RATE if self._alone_seen else 1.0
        self.overhead_seconds += rate * (spare - self.overhead_seconds)
        self._alone_seen = True

"""What is to be reconciled: keys, each at most once in the queue and never twice at work.

An event adds a key; adding it again before it is taken changes nothing, adding it while it is at
work has it taken once more afterwards. What fails is tried again later and later. The queue knows
nothing of Kubernetes; `service.RECONCILERS` says what is done with a key.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from calotype.operator.runtime.metrics import Metrics

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What a reconcile is about."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Postponed(Exception):
    """Raised by a reconcile that cannot go on for a reason that is no failure of its own."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(seconds, why)
        self.seconds, self.why = seconds, why


Reconcile = Callable[[Key], Awaitable[float | None]]
"""Does what a key needs; returns after how many seconds to look again, None = at the next event."""

FIRST_RETRY = 1.0
LAST_RETRY = 300.0


class WorkQueue:
    """Runs ``reconcile`` for every key that is due, ``workers`` at a time."""

    def __init__(
        self,
        reconcile: Reconcile,
        metrics: Metrics,
        *,
        workers: int = 8,
        clock: Callable[[], float] = time.monotonic,
        first_retry: float = FIRST_RETRY,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._reconcile, self._metrics = reconcile, metrics
        self._workers, self._clock = workers, clock
        self._first_retry, self._jitter = first_retry, jitter
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._active: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Condition()
        self._wakeups: set[asyncio.Task[None]] = set()
        self.last_active = clock()
        """When the queue looked for work last; an old one means that the loop is stuck."""

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Has ``key`` reconciled after ``delay`` seconds, or earlier if that was asked before."""
        due = self._clock() + delay
        earlier = self._due.get(key)
        if earlier is not None and earlier <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        self._metrics.depth.set(len(self._due))
        self.wake()

    def forget(self, key: Key) -> None:
        """Takes a key out that need not be looked at any more."""
        self._due.pop(key, None)
        self._failures.pop(key, None)

    def failures(self, key: Key) -> int:
        return self._failures.get(key, 0)

    @property
    def depth(self) -> int:
        """How many keys are due now or at work; those of a later time do not count."""
        now = self._clock()
        return sum(due <= now for due in self._due.values()) + len(self._active)

    @property
    def next_due(self) -> float | None:
        """When the next key is due, by the queue's clock; None while there is none."""
        return min(self._due.values(), default=None)

    async def run(self) -> None:
        """Works for ever."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())
            group.create_task(self._tick())

    def wake(self) -> None:
        """Has the workers look for keys that are due; needed after the clock was set forward."""

        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._wakeups.add(task)
        task.add_done_callback(self._wakeups.discard)

    async def _tick(self) -> None:
        """Wakes a worker for what becomes due, also when nothing is added."""
        while True:
            await asyncio.sleep(0.2)
            self.last_active = self._clock()
            if self._heap and self._heap[0][0] <= self.last_active:
                async with self._changed:
                    self._changed.notify_all()

    async def _work(self) -> None:
        while True:
            async with self._changed:
                while (key := self._take()) is None:
                    await self._changed.wait()
            try:
                await self._process(key)
            finally:
                self._active.discard(key)
                if key in self._due:  # added while it was at work, when nobody could take it
                    heapq.heappush(self._heap, (self._due[key], key))
                    self.wake()

    def _take(self) -> Key | None:
        """The key that is due longest and is not at work."""
        now = self._clock()
        self.last_active = now
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            if self._due.get(key) != due or key in self._active:
                continue  # superseded, or comes back when the present run ends
            del self._due[key]
            self._active.add(key)
            self._metrics.depth.set(len(self._due))
            return key
        return None

    async def _process(self, key: Key) -> None:
        started = self._clock()
        outcome = "ok"
        again: float | None = None
        try:
            again = await self._reconcile(key)
            self._failures.pop(key, None)
        except Postponed as postponed:
            outcome, again = "postponed", postponed.seconds
            log.info("%s: in %.0f s again: %s", key, postponed.seconds, postponed.why)
        except Exception as error:
            outcome = "failed"
            again = self._retry_after(key)
            # The traceback once: a server that is away for an hour would fill the disk.
            log.warning(
                "%s failed, again in %.0f s: %s",
                key,
                again,
                error,
                exc_info=self._failures[key] == 1,
            )
        finally:
            self._metrics.reconciles.labels(key.kind, outcome).inc()
            self._metrics.seconds.labels(key.kind).observe(self._clock() - started)
        if again is not None:
            self.add(key, again)

    def _retry_after(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        pause = min(LAST_RETRY, self._first_retry * 2.0 ** min(failures - 1, 12))
        return pause * self._jitter(0.8, 1.2)


class Debounce:
    """Holds back what would otherwise happen once for every event of a burst."""

    def __init__(
        self, quiet: float, at_most: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet, self._at_most, self._clock = quiet, at_most, clock
        self._bursts: dict[Key, tuple[float, float]] = {}

    def touch(self, key: Key) -> float:
        """Something happened; returns after how many seconds `remaining` may be 0."""
        now = self._clock()
        first, _ = self._bursts.get(key, (now, now))
        self._bursts[key] = (first, now)
        return self.remaining(key)

    def remaining(self, key: Key) -> float:
        """Seconds until the burst counts as over; 0 without one."""
        if key not in self._bursts:
            return 0.0
        first, last = self._bursts[key]
        return max(0.0, min(last + self._quiet, first + self._at_most) - self._clock())

    def pending(self, key: Key) -> bool:
        """Whether something happened that nobody has acted upon yet."""
        return key in self._bursts

    def clear(self, key: Key) -> None:
        self._bursts.pop(key, None)

"""Work that a process does again and again for as long as it lives, and that no fault ends.

A round that raises is logged and counted, and the next one comes after a pause that grows. A loop
is stuck when one round does not end, or when nothing but unexpected faults came for as long:
whoever asks for the health of the process is told, because only a restart may help then. Faults
that pass, of the job database for instance, never make it so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

from calotype.serving.core.errors import CalotypeError
from calotype.serving.core.protocols import Clock, SystemClock
from calotype.serving.observability import metrics

log = logging.getLogger(__name__)

STUCK_SECONDS = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0

Round = Callable[[], Awaitable[float]]
"""Does what there is to do; returns after how many seconds to do so again."""
State = Literal["ok", "retrying", "stuck"]


class Loop:
    """Args:
    name: what it is called in logs and metrics.
    sleep: how pauses are made.
    stuck_seconds: see above.
    longest_pause: after faults, in seconds.
    """

    def __init__(
        self,
        name: str,
        work: Round,
        *,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        stuck_seconds: float = STUCK_SECONDS,
        longest_pause: float = LONGEST_PAUSE,
    ) -> None:
        self.name, self._work = name, work
        self._clock, self._sleep = clock or SystemClock(), sleep
        self._stuck_seconds, self._longest_pause = stuck_seconds, longest_pause
        self._begun: float | None = None
        """When the round that runs began; None = it rests."""
        self._failing: float | None = None
        """Since when all rounds ended unexpectedly; None = the last one did not."""
        self._faults = 0

    @property
    def state(self) -> State:
        now = self._clock.monotonic()
        for since in (self._begun, self._failing):
            if since is not None and now - since > self._stuck_seconds:
                return "stuck"
        return "ok" if self._failing is None else "retrying"

    async def run(self) -> None:
        """Until its task is cancelled."""
        while True:
            await self._sleep(await self.once())

    async def once(self) -> float:
        """One round; the pause after it."""
        self._begun = self._clock.monotonic()
        try:
            pause = await self._work()
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._failed(error)  # something that it waited for was cancelled
        except Exception as error:
            return self._failed(error)
        finally:
            self._begun = None
        self._failing, self._faults = None, 0
        return pause

    def _failed(self, error: BaseException) -> float:
        self._faults += 1
        pause = min(self._longest_pause, FIRST_PAUSE * 2.0 ** min(16, self._faults - 1))
        if isinstance(error, CalotypeError) and error.retryable:
            self._failing = None
            metrics.LOOP_FAULTS.labels(self.name, "passing").inc()
            log.warning("%s: again in %.0f s: %s", self.name, pause, error)
            return pause
        if self._failing is None:
            self._failing = self._clock.monotonic()
        metrics.LOOP_FAULTS.labels(self.name, "unexpected").inc()
        # The traceback once: a fault that comes each minute would fill the disk.
        detail = error if self._faults == 1 else None
        log.error("%s: again in %.0f s: %r", self.name, pause, error, exc_info=detail)
        return pause


class Loops:
    """The loops of a process, in one event loop."""

    def __init__(self) -> None:
        self._loops: list[Loop] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, loop: Loop) -> None:
        self._loops.append(loop)
        self._tasks.append(asyncio.create_task(loop.run(), name=loop.name))

    async def stop(self) -> None:
        """Ends all of them, and waits until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._loops.clear()

    def states(self) -> dict[str, State]:
        """By name. A loop whose task has ended, which none should, is stuck."""
        found = zip(self._loops, self._tasks, strict=True)
        return {loop.name: "stuck" if task.done() else loop.state for loop, task in found}

"""An asyncio event loop with virtual time, whose order of callbacks follows from a seed.

Time stands still while something is ready to run, and jumps to the next timer otherwise. What is
ready runs in an order that the seed chooses. Blocking calls (`asyncio.to_thread`) run whole, on
this thread, in a turn of their own.

Everything runs on behalf of a `Process` (a context variable that tasks inherit). A process that was
killed never runs again, not even its ``finally`` blocks, as after SIGKILL; one that is paused goes
on later.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from asyncio import events
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any

MOST_STEPS = 400_000
"""Callbacks of one run; more mean that something runs in circles."""


class Killed(BaseException):
    """The process that runs was killed, in the middle of a blocking call."""


class Stuck(Exception):
    """The simulated service runs in circles."""


class Process:
    """A process of the service that can be killed, paused and started again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused_until = 0.0
        self.calls: set[asyncio.Future[Any]] = set()
        """Answers that other processes wait for."""

    def __repr__(self) -> str:
        return self.name


CURRENT: ContextVar[Process | None] = ContextVar("process", default=None)


class SimulatedFuture(asyncio.Future):  # type: ignore[type-arg]
    """Hashed by its number, so that sets of futures have the same order in every run."""

    _loop: SimulatedLoop

    def __init__(self, *, loop: SimulatedLoop) -> None:
        super().__init__(loop=loop)
        self._number = next(loop.numbers)

    def __hash__(self) -> int:
        return self._number


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """Hashed by its number, like `SimulatedFuture`."""

    def __init__(self, coroutine: Any, loop: SimulatedLoop, context: Context | None) -> None:
        self._number = next(loop.numbers)
        super().__init__(coroutine, loop=loop, name="task", context=context)

    def __hash__(self) -> int:
        return self._number


class SimulatedLoop(asyncio.AbstractEventLoop):
    """One run of a simulation.

    Args:
        slow_call: seconds for which a blocking call waits for its thread; called for each.
    """

    def __init__(self, rng: random.Random, slow_call: Callable[[], float]) -> None:
        self._random, self._slow_call = rng.random, slow_call
        self.in_order = rng.random() < 0.25
        """Some seeds run callbacks in the order of a real loop."""
        self.numbers = itertools.count()
        self.faults: list[dict[str, Any]] = []
        """What nobody caught."""
        self.steps = 0
        self._now = 0.0
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._kept: list[asyncio.Task[Any]] = []
        self.nobody = Context()
        """For callbacks that belong to no process."""
        self._closed = False

    # -- what asyncio asks for -----------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return SimulatedFuture(loop=self)

    def create_task(
        self, coro: Any, *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = SimulatedTask(coro, self, context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._kept.append(task)  # a task that is collected would run its finally blocks
        return task

    def call_soon(
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self.numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap until its time has come."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        delay = self._slow_call()
        if delay:
            self.call_later(delay, self._call, future, func, args)
        else:
            self.call_soon(self._call, future, func, args)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    async def shutdown_asyncgens(self) -> None:
        """Nothing is left to them after a run."""

    # -- running -------------------------------------------------------------------------------

    def run(self, done: Callable[[], bool], until: float) -> None:
        """Runs until ``done()`` or the time ``until``, in seconds.

        Raises:
            Stuck: time does not go on.
        """
        events._set_running_loop(self)
        try:
            self._run(done, until)
        finally:
            events._set_running_loop(None)

    def _run(self, done: Callable[[], bool], until: float) -> None:
        ready, timers, rng, in_order = self._ready, self._timers, self._random, self.in_order
        looked = -1
        while True:
            while ready:
                if in_order:
                    handle = ready.pop(0)
                else:
                    place = int(rng() * len(ready))
                    ready[place], ready[-1] = ready[-1], ready[place]
                    handle = ready.pop()
                if handle._cancelled:
                    continue
                process = handle._context.get(CURRENT)
                if process is not None:
                    if not process.alive:
                        continue
                    if process.paused_until > self._now:
                        # Whole and in order: what was ready before is ready before again.
                        self._postpone(handle, process.paused_until)
                        continue
                self.steps += 1
                if self.steps > MOST_STEPS:
                    raise Stuck(f"{MOST_STEPS} callbacks, the last one is {handle!r}")
                handle._run()
            if self.steps > looked and done():
                return
            looked = self.steps
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if not timers or timers[0][0] > until:
                self._now = until
                return
            self._now = now = timers[0][0]
            while timers and timers[0][0] <= now:
                ready.append(heapq.heappop(timers)[2])

    def _postpone(self, handle: asyncio.Handle, when: float) -> None:
        timer = asyncio.TimerHandle(when, handle._callback, handle._args, self, handle._context)
        # A handle that is cancelled meanwhile must not run: it is looked at again.
        timer._callback, timer._args = self._resume, (handle,)
        heapq.heappush(self._timers, (when, next(self.numbers), timer))

    def _resume(self, handle: asyncio.Handle) -> None:
        if not handle._cancelled:
            self._ready.append(handle)

    def _call(self, future: asyncio.Future[Any], func: Any, args: Any) -> None:
        process = CURRENT.get()
        try:
            result = func(*args)
        except Killed:
            return
        except BaseException as error:
            if process is None or process.alive:
                answer(future, None, error)
        else:
            if process is None or process.alive:
                answer(future, result, None)

    # -- processes -----------------------------------------------------------------------------

    def spawn(self, process: Process, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Starts a task on behalf of a process."""
        token = CURRENT.set(process)
        try:
            return self.create_task(coroutine)
        finally:
            CURRENT.reset(token)

    def kill(self, process: Process, lost: Callable[[], BaseException]) -> None:
        """Ends a process at once; who waits for its answers gets ``lost()``."""
        process.alive = False
        calls, process.calls = sorted(process.calls, key=hash), set()
        for future in calls:
            self.call_soon(answer, future, None, lost(), context=self.nobody)

    def close(self) -> None:
        """Forgets every task, whether it is done or not."""
        self._closed = True
        self._ready.clear()
        self._timers.clear()
        for task in self._kept:
            coroutine: Any = task.get_coro()
            if not task.done():
                try:
                    coroutine.close()
                except (Exception, Killed):
                    continue  # a finally block that awaits, of a task that was killed
            elif not task.cancelled():
                task.exception()
        self._kept.clear()


def answer(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Settles a future, unless somebody has."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):
        future.set_exception(RuntimeError(repr(error)))
    else:
        future.set_exception(error)

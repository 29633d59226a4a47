"""Background tasks of one owner, and database calls that outlast a moment without the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from calotype.serving.core.errors import StorageFailed

log = logging.getLogger(__name__)

T = TypeVar("T")


class RetryingTasks:
    """Base of what lives in one event loop over a database.

    Args:
        delays: pauses between attempts at a database that cannot be read or written, in seconds.
        sleep: how pauses are made.
    """

    def __init__(self, delays: Sequence[float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._delays, self._sleep = delays, sleep
        self._tasks: set[asyncio.Task[Any]] = set()

    async def stop(self) -> None:
        """Ends the background tasks; jobs stay in the database for the next owner."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sql(self, call: Callable[..., T], *arguments: Any) -> T:
        for delay in self._delays:
            try:
                return await asyncio.to_thread(call, *arguments)
            except StorageFailed as error:
                log.warning("the job database is asked again: %s", error)
            await self._sleep(delay)
        return await asyncio.to_thread(call, *arguments)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

"""Database calls that outlast a moment without the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import ParamSpec, TypeVar

from calotype.serving.core.errors import StorageFailed

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class RetryingCalls:
    """Makes blocking calls in threads, and repeats those that fail with StorageFailed.

    Args:
        delays: pauses between attempts, in seconds.
        sleep: how pauses are made.
    """

    def __init__(self, delays: Sequence[float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._delays, self._sleep = delays, sleep

    async def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises StorageFailed when the last attempt does."""
        for delay in self._delays:
            try:
                return await asyncio.to_thread(call, *args, **kwargs)
            except StorageFailed as error:
                log.warning("the job database is asked again: %s", error)
            await self._sleep(delay)
        return await asyncio.to_thread(call, *args, **kwargs)

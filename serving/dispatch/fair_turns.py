"""So many at once, and of those that wait one of each team after the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class FairTurns:
    """Not thread-safe: one event loop owns it.

    Args:
        at_once: turns that are taken at the same time.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, team: str) -> AsyncIterator[None]:
        """Waits for a turn of ``team``, which lasts as long as the context."""
        await self._take(team)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, team: str) -> None:
        if self._free:
            self._free -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(team, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            team, queue = self._waiting.popitem(last=False)
            first = queue.popleft()
            if queue:
                self._waiting[team] = queue  # behind the other teams
            if not first.done():
                first.set_result(None)
                return
        self._free += 1

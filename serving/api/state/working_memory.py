"""How much memory requests may take at once, so that a gateway stays within its limit.

Whoever is about to read a large body, to fetch a picture or to decode one asks for room first and
waits until there is some. The pools are asked in this order only (bodies, pictures, pixels): so no
two requests can wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from calotype.serving.core.errors import Overloaded

PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    team_id: str
    size: int
    granted: asyncio.Future[None]


class MemoryPool:
    """A number of bytes, taken in the order in which it was asked for.

    A team gets at most half of it at once, and more only for a single request.
    """

    def __init__(self, total: int, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.total, self._patience = total, patience_seconds
        self._taken: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []

    @contextlib.asynccontextmanager
    async def reserve(self, team_id: str, size: int) -> AsyncIterator[None]:
        """Room for ``size`` bytes while the context lasts; what is more than all of it is all.

        Raises:
            Overloaded: there was none for `patience_seconds`.
        """
        size = min(size, self.total)
        await self._take(team_id, size)
        try:
            yield
        finally:
            self._give_back(team_id, size)

    async def _take(self, team_id: str, size: int) -> None:
        waiting = _Waiting(team_id, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        try:
            async with asyncio.timeout(self._patience):
                await waiting.granted
        except BaseException as error:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
                self._grant()
            else:  # it was granted in the moment in which nobody waited any more
                self._give_back(team_id, size)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    "This gateway has no memory for another large request at the moment. Try "
                    "again in a few seconds.",
                    retry_after=5,
                ) from None
            raise

    def _give_back(self, team_id: str, size: int) -> None:
        self._taken[team_id] -= size
        if not self._taken[team_id]:
            del self._taken[team_id]
        self._grant()

    def _grant(self) -> None:
        free = self.total - self._taken.total()
        for waiting in list(self._waiting):
            mine = self._taken[waiting.team_id]
            if mine and mine + waiting.size > self.total // 2:
                continue  # others need not wait for this team
            if waiting.size > free:
                return  # nobody overtakes a large request, or it would wait for ever
            self._waiting.remove(waiting)
            self._taken[waiting.team_id] += waiting.size
            free -= waiting.size
            waiting.granted.set_result(None)


class WorkingMemory:
    """The pools of one gateway.

    Args:
        total: bytes for all of them.
    """

    def __init__(self, total: int) -> None:
        self.bodies = MemoryPool(total // 3)
        """Bodies that are read and parsed."""
        self.pictures = MemoryPool(total // 6)
        """Files of pictures that are fetched from elsewhere."""
        self.pixels = MemoryPool(total // 2)
        """Decoded pictures."""

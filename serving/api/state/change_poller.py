"""One look at the database for all event streams of a gateway.

A thousand open streams ask the database no more often than one: a single task looks at all the
jobs that are watched and wakes the streams whose job has changed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from calotype.serving.database.database import Database

_SLICE = 400
"""Jobs of one query: SQLite takes no more than 999 parameters everywhere."""


class ChangePoller:
    """Which jobs are watched in this process."""

    def __init__(self, database: Database, pause: float) -> None:
        self._database, self._pause = database, pause
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, tuple[Any, ...]] = {}

    @contextlib.asynccontextmanager
    async def changes(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever the job has changed; the stream clears it."""
        event = asyncio.Event()
        self._watchers.setdefault(job_id, set()).add(event)
        try:
            yield event
        finally:
            watchers = self._watchers[job_id]
            watchers.discard(event)
            if not watchers:
                del self._watchers[job_id]
                self._seen.pop(job_id, None)

    async def look(self) -> float:
        """Wakes the streams of jobs that have changed; the pause until the next look.

        Raises:
            StorageFailed: the database cannot be read.
        """
        watched = list(self._watchers)
        for start in range(0, len(watched), _SLICE):
            part = watched[start : start + _SLICE]
            found = await asyncio.to_thread(self._database.intermediates.watch_jobs, part)
            for job_id in part:
                now = found.get(job_id)
                if now is None or self._seen.get(job_id) == now:
                    continue
                self._seen[job_id] = now
                for event in self._watchers.get(job_id, ()):
                    event.set()
        return self._pause

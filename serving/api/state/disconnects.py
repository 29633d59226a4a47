"""Waiting for jobs on behalf of clients, and what happens when a client goes away.

A client that hangs up leaves its job running for a grace, because SDKs retry after a time-out and
then find it. When nobody came back the job is canceled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import Request

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.core.errors import CalotypeError, NotFound, StorageFailed
from calotype.serving.core.protocols import GenerationBackend
from calotype.serving.database.database import Database
from calotype.serving.jobs.endings import Ending, canceled_ending, late_ending
from calotype.serving.jobs.outage import waited_out
from calotype.serving.jobs.records import JobRecord

log = logging.getLogger(__name__)

_PAUSE = 0.25
"""Seconds between looks at the database while the backend cannot be asked."""


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class ClientWaits:
    """Counts the clients that wait for each job, and cancels jobs whose last client left."""

    def __init__(
        self,
        settings: GatewaySettings,
        database: Database,
        backend: GenerationBackend,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings, self._database, self._backend = settings, database, backend
        self._sleep = sleep
        self._clients: Counter[str] = Counter()
        self._pending_cancels: dict[str, asyncio.Task[None]] = {}

    async def wait_while_connected(
        self, job_id: str, request: Request, seconds: float
    ) -> JobRecord:
        """The job when it is over, or as it is after ``seconds``, or when it waits itself.

        Raises:
            ClientGone: the client hung up; the job is canceled after the grace.
        """
        async with self.client_waits(job_id) as answered:
            waiting = asyncio.create_task(
                self.poll(job_id, seconds, self._settings.outage_patience_seconds)
            )
            leaving = asyncio.create_task(_disconnected(request))
            try:
                await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    raise ClientGone
                answered()
                return waiting.result()
            finally:
                waiting.cancel()
                leaving.cancel()

    @contextlib.asynccontextmanager
    async def client_waits(self, job_id: str) -> AsyncIterator[Callable[[], None]]:
        """A client waits for the job while the context lasts.

        Yields:
            What to call when the client got its answer. Without it the client has left: when it
            was the last one the job is canceled after the grace.
        """
        self._clients[job_id] += 1
        pending = self._pending_cancels.pop(job_id, None)
        if pending is not None:
            pending.cancel()
        served: list[bool] = []
        try:
            yield lambda: served.append(True)
        finally:
            self._clients[job_id] -= 1
            if not self._clients[job_id]:
                del self._clients[job_id]
                if not served:
                    self._pending_cancels[job_id] = asyncio.create_task(
                        self._cancel_after_grace(job_id)
                    )

    async def poll(self, job_id: str, seconds: float, patience: float = math.inf) -> JobRecord:
        """Like `wait_while_connected`, without a client.

        Args:
            patience: seconds for which a job is waited for that waits for a part.

        The database decides; waiting at the backend only saves asking it often.
        """
        clock = asyncio.get_running_loop().time
        end, began = clock() + seconds, self._database.clock.time()
        too_soon = False
        while True:
            try:
                job = await asyncio.to_thread(self._database.jobs.get_job, job_id)
            except StorageFailed:
                if clock() >= end:
                    raise
                log.warning("the job database does not answer; job %s is asked for again", job_id)
            else:
                if job is None:
                    raise NotFound(f"There is no job {job_id!r}.")
                if job.over or clock() >= end:
                    return job
                if waited_out(job, began, self._database.clock.time()) > patience:
                    return job
            if too_soon:  # it said "over" of a job that is not, or cannot say anything
                await self._sleep(min(_PAUSE, max(0.0, end - clock())))
            asked = clock()
            await self._wait(job_id, max(0.0, end - clock()))
            too_soon = clock() - asked < _PAUSE / 10

    async def _wait(self, job_id: str, remaining: float) -> None:
        try:
            await self._backend.wait(job_id, min(self._settings.wait_slice, remaining))
        except (CalotypeError, OSError) as error:
            # The job is in the database and outlives the backend; so does the waiting.
            log.warning("waiting for job %s without the backend: %s", job_id, error)

    async def _end(self, job_id: str, ending: Ending) -> JobRecord | None:
        """Ends a job from here, so that it ends even when the backend is gone."""
        ended = await asyncio.to_thread(self._database.jobs.finish_job, job_id, ending)
        try:
            await self._backend.cancel(job_id)
        except (CalotypeError, OSError) as error:
            log.warning("the backend could not be told that job %s is over: %s", job_id, error)
        return ended

    async def time_out(self, job_id: str) -> None:
        await self._end(job_id, late_ending())

    async def cancel(self, job_id: str) -> None:
        await self._end(job_id, canceled_ending())

    async def close(self) -> None:
        """The gateway stops: jobs of clients that left are canceled at once."""
        pending = dict(self._pending_cancels)
        for task in pending.values():
            task.cancel()
        await asyncio.gather(*pending.values(), return_exceptions=True)
        for job_id in pending:
            await self.cancel(job_id)

    async def _cancel_after_grace(self, job_id: str) -> None:
        await self._sleep(self._settings.hangup_grace)
        self._pending_cancels.pop(job_id, None)
        try:
            await self.cancel(job_id)
        except StorageFailed as error:
            # Its deadline ends it then.
            log.warning("job %s of a client that left could not be canceled: %s", job_id, error)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

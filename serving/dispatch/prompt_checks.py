"""Has the prompts of queued jobs checked, several at once, before they wait for a generator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.database.jobs import Jobs
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.moderation_checks import CheckRetries, check_job
from calotype.serving.jobs.records import JobRecord

log = logging.getLogger(__name__)


class PromptChecks:
    """Args:
    at_once: prompts that are checked at the same time.
    """

    def __init__(
        self,
        safety: SafetyStage,
        jobs: Jobs,
        call: RetryingCalls,
        outcomes: Outcomes,
        retries: CheckRetries,
        at_once: int,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._safety, self._jobs, self._call = safety, jobs, call
        self._outcomes, self._retries, self._sleep = outcomes, retries, sleep
        self._free = asyncio.Semaphore(at_once)

    async def passes(self, job: JobRecord) -> bool | None:
        """Whether the job may be drawn; None when the decision could not be recorded.

        A job that may not has failed with the reason.
        """
        try:
            async with self._free:
                moderation, error = await check_job(self._safety, job, self._retries, self._sleep)
            if error is not None:
                await self._outcomes.failed(job.id, error, moderation=moderation)
                return False
            await self._call(self._jobs.record_moderation, job.id, moderation)
        except StorageFailed as error:
            log.warning("a decision could not be recorded: %s", error)
            return None
        return True

"""Has the prompts of queued jobs checked, several at once, before they wait for a generator."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from calotype.serving.core.protocols import SafetyStage
from calotype.serving.database.jobs import Jobs
from calotype.serving.dispatch.fair_turns import FairTurns
from calotype.serving.dispatch.outcomes import Outcomes
from calotype.serving.dispatch.retrying import RetryingCalls
from calotype.serving.jobs.moderation_checks import CheckRetries, check_job
from calotype.serving.jobs.outage import part_at_fault
from calotype.serving.jobs.records import JobRecord


class PromptChecks:
    """Args:
    at_once: prompts that are checked at the same time; teams take turns.
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
        self._turns = FairTurns(at_once)

    async def passes(self, job: JobRecord) -> bool:
        """Whether the job may be drawn; one that may not has failed with the reason.

        Raises:
            ModerationUnavailable: the safety stage is away; the job is still queued.
            StorageFailed: the decision could not be recorded; likewise.
        """
        async with self._turns.turn(job.team_id):
            moderation, error = await check_job(self._safety, job, self._retries, self._sleep)
        if error is not None and part_at_fault(error) is not None:
            raise error
        if error is not None:
            await self._outcomes.failed(job.id, error, moderation=moderation)
            return False
        await self._call(self._jobs.record_moderation, job.id, moderation)
        return True

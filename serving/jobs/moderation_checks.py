"""Has prompts and images checked by the safety stage, fail-closed.

A moderator replica that was killed comes back within seconds, so a failed call is repeated for
about twenty; after that it is `ModerationUnavailable`, and the job waits. Nothing passes unchecked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from calotype.moderation.policy.text_time import text_seconds
from calotype.serving.core.decision import Decision
from calotype.serving.core.errors import CalotypeError, ContentBlocked, ModerationUnavailable
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.core.request import GenerationRequest
from calotype.serving.jobs.moderation_record import ModerationRecord
from calotype.serving.jobs.outage import FINAL, PART, SAFETY_CHECK, SAFETY_STAGE
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.refusals import blocked_error
from calotype.serving.observability import tracing

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CheckRetries:
    """How often and how long the safety stage is asked."""

    delays: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0)
    """Pauses between attempts, in seconds; about 20 in all."""
    timeout: float = 30.0
    """Seconds that one attempt may take; a long text has more (`text_seconds`)."""


async def check_with_retries(
    check: Callable[[], Awaitable[Decision]], retries: CheckRetries, sleep: Sleep
) -> Decision:
    """The decision of ``check()``, called again while it fails; it may be a refusal.

    Raises:
        ModerationUnavailable: no attempt gave a decision.
    """
    failure = "no decision"
    for delay in (*retries.delays, None):
        try:
            decision = await asyncio.wait_for(check(), retries.timeout)
        except Exception as error:  # whatever a remote classifier died of: not checked, not passed
            if isinstance(error, CalotypeError) and not error.retryable:
                raise unavailable(error.message, final=True) from error
            failure = str(error) or type(error).__name__
        else:
            if not decision.undecided:
                return decision
            if decision.timed_out:  # the next classifier would hang as well
                raise unavailable("it took too long", part=SAFETY_CHECK)
            failure = "the classifiers gave no decision"
        log.warning("the safety stage made no decision: %s", failure)
        if delay is not None:
            await sleep(delay)
    raise unavailable(failure)


def unavailable(
    reason: str, *, final: bool = False, part: str = SAFETY_STAGE
) -> ModerationUnavailable:
    """Args:
    final: asking again does not help.
    part: see `outage.part_at_fault`.
    """
    return ModerationUnavailable(
        f"The safety stage could not check the request, so it was not run ({reason}). "
        "Try again in a few seconds.",
        retry_after=5,
        details={FINAL: True} if final else {PART: part},
    )


def refusal(stage: str, decision: Decision, request_id: str) -> ContentBlocked | None:
    """The error for a blocking decision, None when the decision lets the content pass."""
    if not decision.blocked:
        return None
    return blocked_error(
        stage,
        decision.categories,
        request_id,
        decision_id=decision.id,
        policy=decision.policy,
        own_words=decision.message,
    )


def prompt_text(request: GenerationRequest) -> str:
    """Everything that the model reads of a request."""
    if not request.negative_prompt:
        return request.prompt
    return f"{request.prompt}\n{request.negative_prompt}"


async def check_job(
    safety: SafetyStage, job: JobRecord, retries: CheckRetries, sleep: Sleep
) -> tuple[ModerationRecord, CalotypeError | None]:
    """The moderation record of a job whose prompt is checked now, and why it must not be run.

    A negative prompt is checked with the prompt: whatever the model reads is.
    """
    options, before = job.options, ModerationRecord.from_payload(job.moderation)
    try:
        prompt = prompt_text(GenerationRequest.from_payload(job.request))
        retries = replace(retries, timeout=text_seconds(retries.timeout, len(prompt)))
        with tracing.span("check prompt", options.traceparent, job=job.id):
            decision = await check_with_retries(
                lambda: safety.check_prompt(prompt, options.scope), retries, sleep
            )
    except CalotypeError as error:
        return before, error
    checked = replace(before, input=decision)
    if decision.review_categories is not None:
        return checked, None  # it is drawn, and its images are held
    return checked, refusal("input", decision, options.request_id)

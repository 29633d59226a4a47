"""Judging prompts and pictures, fail-closed.

A moderator replica that was killed comes back within seconds, so a failed call is repeated for
about twenty; after that the job fails as `ModerationUnavailable`. Nothing passes unjudged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calotype.serving.core.errors import CalotypeError, ContentBlocked, ModerationUnavailable
from calotype.serving.core.protocols import SafetyStage
from calotype.serving.jobs.records import JobRecord
from calotype.serving.jobs.result import blocked_error
from calotype.serving.observability import tracing

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class JudgingPolicy:
    """How patient judging is."""

    delays: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0)
    """Pauses between attempts, in seconds; about 20 in all."""
    timeout: float = 30.0
    """Seconds that one attempt may take."""


async def judge_patiently(
    judge: Callable[[], Awaitable[dict[str, Any]]], policy: JudgingPolicy, sleep: Sleep
) -> dict[str, Any]:
    """The decision that ``judge()`` comes to, asked again while it fails; it may be a refusal.

    Raises:
        ModerationUnavailable: no attempt gave a decision.
    """
    failure = "no decision"
    for delay in (*policy.delays, None):
        try:
            decision = await asyncio.wait_for(judge(), policy.timeout)
        except Exception as error:  # whatever a remote classifier died of: not judged, not passed
            if isinstance(error, CalotypeError) and not error.retryable:
                raise unavailable(error.message) from error
            failure = str(error) or type(error).__name__
        else:
            if not is_unavailable(decision):
                return decision
            failure = "the classifiers gave no decision"
        log.warning("the safety stage could not judge: %s", failure)
        if delay is not None:
            await sleep(delay)
    raise unavailable(failure)


def scope_of(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """For whom a job is judged, by its ``input``: see `protocols.SafetyStage`."""
    found = given.get("scope")
    return found if isinstance(found, Mapping) else None


def is_unavailable(decision: object) -> bool:
    """Whether a decision says that nothing could be decided; what is no decision counts as that."""
    if not isinstance(decision, Mapping) or "blocked" not in decision:
        return True
    return bool(decision.get("unavailable")) or decision.get("verdict") == "ERROR"


def unavailable(reason: str) -> ModerationUnavailable:
    return ModerationUnavailable(
        f"The safety stage could not judge the request, so it was not run ({reason}). "
        "Try again in a few seconds.",
        retry_after=5,
    )


def refusal(stage: str, decision: Mapping[str, Any], request_id: str) -> ContentBlocked | None:
    """The error for a blocking decision, None when the decision lets the content pass."""
    if not decision["blocked"]:
        return None
    return blocked_error(
        stage,
        [str(name) for name in decision.get("categories", [])],
        request_id,
        decision_id=decision.get("id"),
        policy=decision.get("policy"),
        own_words=decision.get("message"),
    )


def judged_text(request: Mapping[str, Any]) -> str:
    """Everything that the model reads of a request (`GenerationRequest.to_payload`)."""
    prompt = str(request["prompt"])
    return f"{prompt}\n{request['negative_prompt']}" if request.get("negative_prompt") else prompt


def version_of(decision: Mapping[str, Any]) -> Sequence[Any]:
    """What a decision was made by: the policy's digest, and the preset that the caller got."""
    return [decision.get("policy_sha256"), decision.get("preset")]


def held_categories(decision: Mapping[str, Any]) -> Sequence[str] | None:
    """For what a decision makes a person look first; None = it does not."""
    if decision.get("verdict") != "REVIEW" or is_unavailable(decision):
        return None
    return [str(name) for name in decision.get("categories", [])]


async def judge_job(
    safety: SafetyStage, job: JobRecord, policy: JudgingPolicy, sleep: Sleep
) -> tuple[dict[str, Any], CalotypeError | None]:
    """The moderation record of a job whose prompt is judged now, and why it must not be run.

    A negative prompt is judged with the prompt: whatever the model reads is.
    """
    prompt = judged_text(job.request)
    before = dict(job.moderation or {})
    try:
        with tracing.span("judge prompt", job.input.get("traceparent"), job=job.id):
            decision = await judge_patiently(
                lambda: safety.check_prompt(prompt, scope_of(job.input)), policy, sleep
            )
    except CalotypeError as error:
        return before, error
    if "seal" in job.input and held_categories(decision) is not None:
        return before | {"input": decision}, None  # it is drawn, and its pictures are held
    blocked = refusal("input", decision, str(job.input.get("request_id", job.id)))
    return before | {"input": decision}, blocked

"""What became of a fetch Job, by its conditions and its pod's termination message. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from calotype.operator.api.conditions import Reason, moment
from calotype.operator.kube.objects import Object
from calotype.serving.wire.fetch_result import FetchedWeights, FetchRefused, read_result

START_SECONDS = 120
"""A Job without a pod for longer has been refused one."""


@dataclass(frozen=True, slots=True)
class FetchFailure:
    """Why a Job failed; a ``final`` failure is not tried again until something changes."""

    reason: str
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class FetchRunning:
    """A Job that has not ended."""

    reason: Reason
    message: str


Outcome = FetchedWeights | FetchFailure | FetchRunning


def read_outcome(job: Object, pods: Sequence[Object], now: datetime.datetime) -> Outcome:
    """What became of a Job, by its conditions and its pod's termination message."""
    ended = _condition(job, "Complete") or _condition(job, "Failed")
    pod = max(pods, key=lambda p: p["metadata"].get("creationTimestamp") or "", default=None)
    terminated = _terminated(pod)
    if terminated is not None:
        result = _result(terminated.get("message") or "")
        if result is not None:
            return result
        if ended or _phase(pod) in ("Failed", "Succeeded"):
            return _without_result(terminated)
    if ended is None:
        return _waiting(job, pod, now)
    if ended.get("reason") == "DeadlineExceeded":
        return FetchFailure(
            Reason.FETCH_TIMED_OUT,
            f"Fetching took longer than {job['spec'].get('activeDeadlineSeconds')} s.",
        )
    said = ended.get("message") or ended.get("reason") or "no pod"
    return FetchFailure(Reason.FETCH_FAILED, f"The Job ended without a result: {said}")


def _result(message: str) -> Outcome | None:
    """What a termination message says; None where the container wrote none of ours."""
    result = read_result(message)
    if isinstance(result, FetchRefused):
        return FetchFailure(result.reason, result.message, result.final)
    return result


def _without_result(terminated: Object) -> FetchFailure:
    """A container that ended without a result."""
    if terminated.get("reason") == "OOMKilled":
        return FetchFailure(
            Reason.FETCH_KILLED,
            "The fetch was killed for memory: raise the memory limit of fetch Jobs "
            "(fetchResources), or give a smaller file.",
        )
    return FetchFailure(
        Reason.FETCH_FAILED,
        f"The fetch ended with exit code {terminated.get('exitCode')} "
        f"({terminated.get('reason') or 'no reason'}) and without a result.",
    )


def _waiting(job: Object, pod: Object | None, now: datetime.datetime) -> FetchRunning:
    name = job["metadata"]["name"]
    if pod is None:
        made = moment(job["metadata"].get("creationTimestamp")) or now
        if (now - made).total_seconds() > START_SECONDS:
            return FetchRunning(
                Reason.FETCH_NOT_STARTED,
                f"Job {name} has no pod; `kubectl describe job {name}` says why (a quota, or an "
                "admission policy).",
            )
        return FetchRunning(Reason.FETCHING, f"Job {name} starts.")
    for status in (pod.get("status") or {}).get("containerStatuses") or ():
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            return FetchRunning(
                Reason.FETCH_NOT_STARTED, f"The image of Job {name}: {waiting.get('message')}"
            )
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return FetchRunning(
                Reason.FETCH_NOT_STARTED,
                f"The pod of Job {name} has no node: {condition.get('message')}",
            )
    return FetchRunning(Reason.FETCHING, f"Job {name} is running.")


def _condition(job: Object, type_: str) -> Object | None:
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition.get("type") == type_ and condition.get("status") == "True":
            return dict(condition)
    return None


def _terminated(pod: Object | None) -> Object | None:
    for status in ((pod or {}).get("status") or {}).get("containerStatuses") or ():
        ended = (status.get("state") or {}).get("terminated")
        if ended:
            return dict(ended)
    return None


def _phase(pod: Object | None) -> str | None:
    return ((pod or {}).get("status") or {}).get("phase")


def job_ended(job: Object) -> bool:
    """Whether a Job has done what it will do."""
    return _condition(job, "Complete") is not None or _condition(job, "Failed") is not None

"""Runs fetch Jobs: at most one per object, a few at a time, each attempt later than the one before.

Everything that must survive a restart is in the cluster: the Job's name says which attempt of what
it is, and ``status.lastFailure`` how many there were.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calotype.operator.api.conditions import Reason, moment, timestamp
from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.labels import ADAPTER, ADAPTER_NAMESPACE, MODEL, OWNER_UID
from calotype.operator.kube.resources import CONFIG_MAPS, JOBS, PODS
from calotype.operator.manifests.fetch_job import (
    Fetched,
    FetchFailure,
    FetchRunning,
    FetchTask,
    build_config,
    build_job,
    build_secret_copy,
    read_outcome,
)
from calotype.operator.manifests.pods import Volumes
from calotype.operator.runtime.workqueue import Key
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

JOB_NAME = "batch.kubernetes.io/job-name"


class FetchSlots:
    """How many Jobs may run at once; who waits is woken in the order in which it came."""

    def __init__(self, most: int, wake: Callable[[Key], None]) -> None:
        self._most, self._wake = most, wake
        self._running: set[tuple[str, str]] = set()
        self._waiting: collections.OrderedDict[Key, None] = collections.OrderedDict()

    def take(self, key: Key, job: tuple[str, str]) -> bool:
        """Whether ``job`` may start now; False = ``key`` is woken when it may try again."""
        if job in self._running or len(self._running) < self._most:
            self._running.add(job)
            self._waiting.pop(key, None)
            return True
        self._waiting[key] = None
        return False

    def note(self, job: tuple[str, str], active: bool) -> None:
        """What was seen of a Job."""
        if active:
            self._running.add(job)
        elif job in self._running:
            self._running.discard(job)
            if self._waiting:
                key, _ = self._waiting.popitem(last=False)
                self._wake(key)

    def leave(self, key: Key) -> None:
        self._waiting.pop(key, None)


@dataclass(frozen=True, slots=True)
class Step:
    """How far a fetch is."""

    fetched: Fetched | None = None
    failure: dict[str, Any] | None = None
    """``status.lastFailure`` after this step."""
    reason: Reason | str = Reason.WAITING
    message: str = ""
    again: float | None = None
    """Seconds after which to look again."""
    failed: bool = False


class Fetcher:
    """Takes a fetch one step further at every call."""

    def __init__(self, kube: KubeClient, settings: OperatorSettings, slots: FetchSlots) -> None:
        self._kube, self._settings, self._slots = kube, settings, slots
        self._making = asyncio.Lock()

    async def step(
        self,
        key: Key,
        task: Callable[[int], FetchTask],
        failure: Mapping[str, Any] | None,
        volumes: Volumes,
        secret: Mapping[str, Any] | None,
    ) -> Step:
        """One step.

        Args:
            task: makes the task of the n-th attempt, counted from 0.
            failure: ``status.lastFailure``.
            secret: the credentials, for a copy where the Job runs in another namespace.
        """
        now = self._kube.now()
        fingerprint = task(0).fingerprint
        last = dict(failure or {})
        tried = last.get("fingerprint") == fingerprint
        attempts = int(last.get("attempts") or 0) if tried else 0
        if tried and attempts:
            retry = moment(last.get("nextRetryTime"))
            waiting = Step(
                failure=last,
                reason=str(last.get("reason")),
                message=_failed(last),
                failed=True,
            )
            if retry is None:
                return waiting
            left = (retry - now).total_seconds()
            # Clocks may have been set back meanwhile: no pause is longer than the longest one.
            if 0 < left <= self._settings.longest_retry_seconds * 1.5:
                return Step(
                    failure=last,
                    reason=waiting.reason,
                    message=waiting.message,
                    failed=True,
                    again=left,
                )
        wanted = task(attempts)
        job = await self._job(key, wanted, volumes)
        if job is None:
            return Step(
                failure=last or None,
                reason=Reason.QUEUED,
                message=f"{self._settings.max_fetch_jobs} other fetch Jobs are running.",
                again=60.0,
            )
        pods = await self._kube.list(PODS, wanted.namespace, {JOB_NAME: wanted.job_name})
        outcome = read_outcome(job, pods, now)
        self._slots.note((wanted.namespace, wanted.job_name), isinstance(outcome, FetchRunning))
        if isinstance(outcome, Fetched):
            return Step(fetched=outcome, failure=last or None, reason=Reason.FETCHED)
        if isinstance(outcome, FetchRunning):
            await self._provide(wanted, job, secret)
            return Step(
                failure=last or None, reason=outcome.reason, message=outcome.message, again=15.0
            )
        return self._failed(outcome, fingerprint, attempts + 1)

    async def clean(self, owner: Mapping[str, Any], namespace: str, kind: str, name: str) -> None:
        """Deletes every Job of an object whose result is written down, or not needed any more."""
        for job in await self._jobs(owner, namespace, kind, name):
            await self._delete(job)

    async def _job(self, key: Key, task: FetchTask, volumes: Volumes) -> Mapping[str, Any] | None:
        """The Job of the task, made where it is missing; None while others must run first."""
        found = None
        for job in await self._jobs(task.owner, task.namespace, task.kind, task.model):
            if job["metadata"]["name"] == task.job_name:
                found = job
            elif not job_ended(job):
                await self._delete(job)  # of a source that nobody wants any more
        if found is not None:
            return found
        if not self._slots.take(key, (task.namespace, task.job_name)):
            return None
        made = await self._kube.create(build_job(task, volumes, self._settings))
        if made is None:  # an answer that was lost: the Job is there all the same
            jobs = await self._jobs(task.owner, task.namespace, task.kind, task.model)
            return next((j for j in jobs if j["metadata"]["name"] == task.job_name), None)
        return made

    async def _jobs(
        self, owner: Mapping[str, Any], namespace: str, kind: str, model: str
    ) -> list[dict[str, Any]]:
        metadata = owner["metadata"]
        labels = {"app.kubernetes.io/component": "fetch", MODEL: model}
        if kind == "adapter":
            labels |= {ADAPTER: metadata["name"], ADAPTER_NAMESPACE: metadata["namespace"]}
        found = await self._kube.list(JOBS, namespace, labels)
        return [
            job
            for job in found
            if (job["metadata"].get("annotations") or {}).get(OWNER_UID) == metadata["uid"]
        ]

    async def _provide(
        self, task: FetchTask, job: Mapping[str, Any], secret: Mapping[str, Any] | None
    ) -> None:
        """What the Job's pod waits for: its configuration, and credentials of elsewhere."""
        if await self._kube.get(CONFIG_MAPS, task.namespace, task.job_name) is None:
            await self._kube.apply(build_config(task, job))
        if task.credentials and task.crosses_namespaces and secret is not None:
            await self._kube.apply(build_secret_copy(task, job, secret))

    async def _delete(self, job: Mapping[str, Any]) -> None:
        metadata = job["metadata"]
        await self._kube.delete(JOBS, metadata["namespace"], metadata["name"], metadata["uid"])
        self._slots.note((metadata["namespace"], metadata["name"]), False)

    def _failed(self, outcome: FetchFailure, fingerprint: str, attempts: int) -> Step:
        settings, now = self._settings, self._kube.now()
        failure: dict[str, Any] = {
            "time": timestamp(now),
            "reason": str(outcome.reason),
            "message": outcome.message,
            "attempts": attempts,
            "fingerprint": fingerprint,
        }
        again: float | None = None
        # Rejected credentials wait for another Secret, which has another fingerprint.
        if not outcome.final and outcome.reason != Reason.CREDENTIALS_REJECTED:
            again = settings.retry_seconds * 2.0 ** min(attempts - 1, 20)
            again = min(again, settings.longest_retry_seconds) * random.uniform(0.9, 1.1)
            retry = now.timestamp() + again
            failure["nextRetryTime"] = timestamp(now.fromtimestamp(retry, now.tzinfo))
        return Step(
            failure=failure,
            reason=str(outcome.reason),
            message=_failed(failure),
            failed=True,
            again=again,
        )


def _failed(failure: Mapping[str, Any]) -> str:
    attempts, retry = failure.get("attempts"), failure.get("nextRetryTime")
    after = f"; tried again at {retry}" if retry else "; tried again after a change"
    return f"{failure.get('message')} (attempt {attempts}{after})"


def job_ended(job: Mapping[str, Any]) -> bool:
    """Whether a Job has done what it will do."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(
        c.get("type") in ("Complete", "Failed") and c["status"] == "True" for c in conditions
    )

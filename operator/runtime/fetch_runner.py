"""Runs fetch Jobs: at most one per object, a few at a time, each attempt later than the one before.

Everything that must survive a restart is in the cluster: the Job's name says which attempt of what
it is, and ``status.lastFailure`` how many there were.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import random
from collections.abc import Callable
from dataclasses import replace

from calotype.operator.api.conditions import Reason, moment, timestamp
from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.labels import ADAPTER, ADAPTER_NAMESPACE, MODEL, OWNER_UID
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import CONFIG_MAPS, JOBS, PODS, SECRETS
from calotype.operator.manifests.fetch_job import (
    FetchTask,
    build_config,
    build_job,
    build_secret_copy,
)
from calotype.operator.manifests.pods import Volumes
from calotype.operator.planning.fetch_outcome import (
    FetchFailure,
    FetchRunning,
    job_ended,
    read_outcome,
)
from calotype.operator.planning.fetch_step import FetchStep, failure_message
from calotype.operator.runtime.workqueue import Key
from calotype.operator.runtime.writers.children import ChildWriter
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import Retried
from calotype.serving.wire.fetch_result import FetchedWeights

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


class FetchRunner:
    """Takes a fetch one step further at every call."""

    def __init__(
        self,
        kube: KubeClient,
        settings: OperatorSettings,
        slots: FetchSlots,
        children: ChildWriter,
    ) -> None:
        self._kube, self._settings, self._slots = kube, settings, slots
        self._children = children
        self._making = asyncio.Lock()

    async def step(
        self,
        key: Key,
        task: Callable[[int], FetchTask],
        failure: Retried | None,
        volumes: Volumes,
        secret: Object | None,
    ) -> FetchStep:
        """One step.

        Args:
            task: makes the task of the n-th attempt, counted from 0.
            failure: ``status.lastFailure``.
            secret: the credentials, for a copy where the Job runs in another namespace.

        Raises:
            NotOurs: somebody else has an object that the Job's pod would read.
        """
        now = self._kube.now()
        fingerprint = task(0).fingerprint
        attempts = 0
        if failure is not None and failure.fingerprint == fingerprint:
            attempts = failure.attempts or 0
        if failure is not None and attempts:
            waiting = _failed_step(failure)
            retry = moment(failure.next_retry_time)
            if retry is None:
                return waiting
            left = (retry - now).total_seconds()
            # Clocks may have been set back meanwhile: no pause is longer than the longest one.
            if 0 < left <= self._settings.longest_retry_seconds * 1.5:
                return replace(waiting, again=left)
        wanted = task(attempts)
        job = await self._job(key, wanted, volumes)
        if job is None:
            return FetchStep(
                failure=failure,
                reason=Reason.QUEUED,
                message=f"{self._settings.max_fetch_jobs} other fetch Jobs are running.",
                again=60.0,
            )
        pods = await self._kube.list(PODS, wanted.namespace, {JOB_NAME: wanted.job_name})
        outcome = read_outcome(job, pods, now)
        self._slots.note((wanted.namespace, wanted.job_name), isinstance(outcome, FetchRunning))
        if isinstance(outcome, FetchedWeights):
            return FetchStep(fetched=outcome, failure=failure, reason=Reason.FETCHED)
        if isinstance(outcome, FetchRunning):
            await self._provide(wanted, job, secret)
            return FetchStep(
                failure=failure, reason=outcome.reason, message=outcome.message, again=15.0
            )
        return self._failed(outcome, fingerprint, attempts + 1)

    async def clean(self, owner: Object, namespace: str, kind: str, name: str) -> None:
        """Deletes every Job of an object whose result is written down, or not needed any more."""
        for job in await self._jobs(owner, namespace, kind, name):
            await self._delete(job)

    async def _job(self, key: Key, task: FetchTask, volumes: Volumes) -> Object | None:
        """The Job of the task, made where it is missing; None while others must run first."""
        found = None
        for job in await self._jobs(task.owner, task.namespace, task.order.kind, task.model):
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
            jobs = await self._jobs(task.owner, task.namespace, task.order.kind, task.model)
            return next((j for j in jobs if j["metadata"]["name"] == task.job_name), None)
        return made

    async def _jobs(self, owner: Object, namespace: str, kind: str, model: str) -> list[Manifest]:
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

    async def _provide(self, task: FetchTask, job: Object, secret: Object | None) -> None:
        """What the Job's pod waits for: its configuration, and credentials of elsewhere."""
        place = (task.namespace, task.job_name)
        config = await self._kube.get(CONFIG_MAPS, *place)
        await self._children.apply(build_config(task, job), config)
        if task.credentials and task.crosses_namespaces and secret is not None:
            copy = await self._kube.get(SECRETS, *place)
            await self._children.apply(build_secret_copy(task, job, secret), copy)

    async def _delete(self, job: Object) -> None:
        metadata = job["metadata"]
        await self._kube.delete(JOBS, metadata["namespace"], metadata["name"], metadata["uid"])
        self._slots.note((metadata["namespace"], metadata["name"]), False)

    def _failed(self, outcome: FetchFailure, fingerprint: str, attempts: int) -> FetchStep:
        settings, now = self._settings, self._kube.now()
        again: float | None = None
        next_retry: str | None = None
        if not outcome.final:
            again = settings.retry_seconds * 2.0 ** min(attempts - 1, 20)
            again = min(again, settings.longest_retry_seconds) * random.uniform(0.9, 1.1)
            retry = now.timestamp() + again
            next_retry = timestamp(now.fromtimestamp(retry, now.tzinfo))
        failure = Retried(
            time=timestamp(now),
            reason=str(outcome.reason),
            message=outcome.message,
            attempts=attempts,
            fingerprint=fingerprint,
            next_retry_time=next_retry,
        )
        return replace(_failed_step(failure), again=again)


def _failed_step(failure: Retried) -> FetchStep:
    return FetchStep(
        failure=failure,
        reason=str(failure.reason),
        message=failure_message(failure),
        failed=True,
    )

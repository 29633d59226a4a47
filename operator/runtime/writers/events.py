"""Posts Kubernetes events: what changed about an object and is news for whoever looks at it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from calotype.operator.api.conditions import Condition, Fact, Reason, condition_of, timestamp
from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.labels import digest
from calotype.operator.kube.objects import Object

log = logging.getLogger(__name__)

REPORTED_BY = "calotype-operator"
_IN_PROGRESS = frozenset(
    {
        Reason.WAITING,
        Reason.FETCHING,
        Reason.QUEUED,
        Reason.STARTING,
        Reason.LOADING,
        Reason.NOT_PUSHED,
        Reason.CONFIG_PENDING,
        Reason.NO_UPGRADE,
        Reason.KUBERAY_INSTALLED,
        Reason.JOB_RUNNING,
        Reason.SUSPENDED,
        Reason.DELETING,
    }
)
"""Reasons that are no news for whoever reads events."""


_BAD = frozenset({Condition.KUBERAY_MISSING, Condition.NAMES_CONTESTED})
"""Conditions that are bad news where they hold."""


class EventWriter:
    """Best effort: an event that cannot be posted is logged."""

    def __init__(self, kube: KubeClient) -> None:
        self._kube = kube

    async def post_changes(self, obj: Object, facts: Iterable[Fact]) -> None:
        """Events for conditions that differ from those in the status of ``obj``."""
        for fact in facts:
            old = condition_of(obj, fact.type)
            if old is not None and (old["status"], old["reason"]) == (fact.status, fact.reason):
                continue
            good = fact.holds != (fact.type in _BAD)
            if fact.reason in _IN_PROGRESS or (good and fact.type != Condition.READY):
                continue
            if fact.type == Condition.READY and not good and old is None:
                continue
            await self.post(obj, "Normal" if good else "Warning", fact.reason, fact.message)

    async def post(self, obj: Object, type_: str, reason: str, message: str) -> None:
        """One Event; ``type_`` is Normal or Warning."""
        metadata = obj["metadata"]
        now = timestamp(self._kube.now())
        reference = {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        }
        name = f"{metadata['name'][:200]}.{digest([reference, reason, message, now])}"
        try:
            await self._kube.create(
                {
                    "apiVersion": "v1",
                    "kind": "Event",
                    "metadata": {"name": name, "namespace": metadata["namespace"]},
                    "involvedObject": reference,
                    "type": type_,
                    "reason": str(reason),
                    "message": message[:1024],
                    "firstTimestamp": now,
                    "lastTimestamp": now,
                    "count": 1,
                    "source": {"component": REPORTED_BY},
                    "reportingComponent": REPORTED_BY,
                    "reportingInstance": REPORTED_BY,
                }
            )
        except ApiError as error:
            log.debug("event %s of %s: %s", reason, metadata["name"], error)

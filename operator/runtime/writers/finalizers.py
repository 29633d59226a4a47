"""Our finalizer on custom resources, and how long a deletion may wait for it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from calotype.operator.api.conditions import moment
from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.labels import DELETE_DEADLINE, FINALIZER, FORCE_DELETE
from calotype.operator.kube.objects import Object
from calotype.operator.kube.resources import GROUP, Resource
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.workqueue import Postponed
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)


class Finalizers:
    """Adds and removes the finalizer.

    Args:
        terminating: names of the namespaces that are being deleted; read again at every call.
    """

    def __init__(
        self,
        kube: KubeClient,
        settings: OperatorSettings,
        metrics: Metrics,
        terminating: Collection[str],
    ) -> None:
        self._kube, self._settings, self._metrics = kube, settings, metrics
        self._terminating = terminating

    async def add(self, resource: Resource, obj: Object) -> None:
        """Makes sure that deleting the object waits for us."""
        have = list(obj["metadata"].get("finalizers") or ())
        wanted = [*_foreign(have), FINALIZER]
        if have != wanted:
            await self._set_finalizers(resource, obj, wanted)

    async def remove(self, resource: Resource, obj: Object) -> None:
        """Lets Kubernetes delete the object; also takes off what earlier versions put on it."""
        have = list(obj["metadata"].get("finalizers") or ())
        if have != _foreign(have):
            await self._set_finalizers(resource, obj, _foreign(have))

    async def _set_finalizers(self, resource: Resource, obj: Object, finalizers: list[str]) -> None:
        metadata = obj["metadata"]
        # With the version that was read: a finalizer that somebody adds meanwhile is not lost.
        body = {
            "metadata": {
                "finalizers": finalizers,
                "resourceVersion": metadata["resourceVersion"],
                "uid": metadata["uid"],
            }
        }
        try:
            changed = await self._kube.patch(
                resource, metadata["namespace"], metadata["name"], body
            )
        except ApiError as error:
            if error.status == 409:
                raise Postponed(0.1, "the object changed meanwhile") from error
            raise
        self._metrics.writes.labels(resource.kind, "finalizers").inc()
        if changed is not None and isinstance(obj, dict):
            obj["metadata"] = changed["metadata"]

    def deleting_for(self, obj: Object) -> float | None:
        """Seconds since the deletion was asked for, by the server's clock; None = it was not."""
        asked = obj["metadata"].get("deletionTimestamp")
        if not asked:
            return None
        since = moment(asked) or self._kube.now()
        return max(0.0, (self._kube.now() - since).total_seconds())

    def overdue(self, obj: Object, elapsed: float) -> str | None:
        """Why a deletion must not wait for draining any longer; None = it may."""
        metadata = obj["metadata"]
        annotations = metadata.get("annotations") or {}
        if str(annotations.get(FORCE_DELETE, "")).lower() == "true":
            return f"the annotation {FORCE_DELETE} is set"
        if metadata["namespace"] in self._terminating:
            return "its namespace is being deleted"
        deadline = self._settings.delete_deadline_seconds
        try:
            deadline = max(0.0, float(annotations.get(DELETE_DEADLINE, deadline)))
        except ValueError:
            log.warning("%s of %s is no number", DELETE_DEADLINE, metadata["name"])
        if elapsed >= deadline:
            return f"it was not drained within {deadline:.0f} s"
        return None


def _foreign(finalizers: Iterable[str]) -> list[str]:
    return [name for name in finalizers if not name.startswith(f"{GROUP}/")]

"""Writes the status of custom resources, where it says something else than it should."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from calotype.operator.api.conditions import Fact, set_conditions, timestamp
from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import resource_of
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.writers.events import EventWriter


class StatusWriter:
    """Server-side apply of the status subresource; changed conditions become events."""

    def __init__(self, kube: KubeClient, metrics: Metrics, events: EventWriter) -> None:
        self._kube, self._metrics, self._events = kube, metrics, events

    async def write(self, obj: Object, facts: Iterable[Fact], fields: Object) -> bool:
        """Writes the status where it differs from what is there; says whether it did."""
        facts = list(facts)
        metadata, old = obj["metadata"], obj.get("status") or {}
        generation = int(metadata.get("generation") or 0)
        wanted = {
            **_pruned(fields),
            "observedGeneration": generation,
            "conditions": set_conditions(
                old.get("conditions") or (),
                facts,
                generation=generation,
                now=timestamp(self._kube.now()),
            ),
        }
        if wanted == old:
            return False
        resource = resource_of(dict(obj))
        try:
            await self._kube.apply(
                {
                    "apiVersion": resource.api_version,
                    "kind": resource.kind,
                    "metadata": {
                        "name": metadata["name"],
                        "namespace": metadata["namespace"],
                        "uid": metadata["uid"],
                    },
                    "status": wanted,
                },
                "status",
                force=True,  # nobody else has a say in what we observe
            )
        except ApiError as error:
            if error.status == 404:
                return False  # deleted meanwhile; its event follows
            raise
        self._metrics.writes.labels(resource.kind, "status").inc()
        await self._events.post_changes(obj, facts)
        return True


def _pruned(value: Object) -> Manifest:
    """Drops None recursively."""
    found: Manifest = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            entry = _pruned(entry)
        if entry is not None:
            found[key] = entry
    return found

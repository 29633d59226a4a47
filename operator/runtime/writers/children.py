"""Writes the objects that the operator makes for a custom resource, where they are not so yet."""

from __future__ import annotations

from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.labels import APPLIED_HASH, digest
from calotype.operator.kube.objects import Object
from calotype.operator.kube.resources import resource_of
from calotype.operator.runtime.metrics import Metrics


class ChildWriter:
    """Server-side apply; an annotation with the manifest's digest says what was applied last."""

    def __init__(self, kube: KubeClient, metrics: Metrics) -> None:
        self._kube, self._metrics = kube, metrics
        self._ensured: dict[tuple[str, str, str], str] = {}
        """Plural, namespace and name -> digest of what `ensure` has applied."""

    async def apply(
        self,
        manifest: Object,
        live: Object | None,
        *,
        force: bool = False,
    ) -> bool:
        """Applies a child unless ``live`` came from the same manifest; says whether it did."""
        wanted = digest(manifest)
        metadata = manifest["metadata"]
        if live is not None and not force:
            had = (live["metadata"].get("annotations") or {}).get(APPLIED_HASH)
            if had == wanted:
                return False
        annotations = {**(metadata.get("annotations") or {}), APPLIED_HASH: wanted}
        body = {**manifest, "metadata": {**metadata, "annotations": annotations}}
        await self._kube.apply(body)
        self._metrics.writes.labels(manifest["kind"], "apply").inc()
        return True

    async def ensure(self, manifest: Object, *, force: bool = False) -> None:
        """Applies a child that nobody else changes: looked at once, and then with everything."""
        resource, metadata = resource_of(dict(manifest)), manifest["metadata"]
        place = (resource.plural, metadata["namespace"], metadata["name"])
        wanted = digest(manifest)
        if self._ensured.get(place) == wanted and not force:
            return
        live = await self._kube.get(resource, metadata["namespace"], metadata["name"])
        await self.apply(manifest, live, force=force)
        self._ensured[place] = wanted

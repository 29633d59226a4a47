"""Writes the objects that the operator makes for a custom resource, where they are not so yet.

What exists and is not ours is refused, never changed: an object is ours if its owner is the custom
resource that it is made for, by uid. Fields are taken by force only in such an object, and in one
without an owner (the gateways' configuration, which the chart makes) only after we wrote it once.
"""

from __future__ import annotations

from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.labels import APPLIED_HASH, digest
from calotype.operator.kube.objects import Object
from calotype.operator.kube.resources import resource_of
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.workqueue import Postponed


class NotOurs(Exception):
    """An object of the name that a child needs is there and belongs to somebody else."""

    def __init__(self, kind: str, namespace: str, name: str) -> None:
        super().__init__(kind, namespace, name)
        self.kind, self.namespace, self.name = kind, namespace, name

    def __str__(self) -> str:
        return (
            f"There is a {self.kind} {self.name} in namespace {self.namespace} that was not made "
            "for this object, and it is left as it is: delete or rename it, or give this object "
            "another name."
        )


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
        """Applies a child unless ``live`` came from the same manifest; says whether it did.

        Args:
            force: also where the annotation says that nothing changed.

        Raises:
            NotOurs: ``live`` is somebody else's; nothing was written.
        """
        check_ours(manifest, live)
        wanted = digest(manifest)
        metadata = manifest["metadata"]
        had = _annotations(live).get(APPLIED_HASH)
        if had == wanted and not force:
            return False
        annotations = {**(metadata.get("annotations") or {}), APPLIED_HASH: wanted}
        changed = {**metadata, "annotations": annotations}
        if live is not None:
            changed["uid"] = live["metadata"]["uid"]  # of this object, not of its successor
        owned = live is not None and (bool(metadata.get("ownerReferences")) or had is not None)
        try:
            await self._kube.apply({**manifest, "metadata": changed}, force=owned)
        except ApiError as error:
            if error.status != 409:
                raise
            if live is not None and not owned:
                raise _not_ours(manifest) from error
            raise Postponed(0.5, f"{metadata['name']} changed meanwhile") from error
        self._metrics.writes.labels(manifest["kind"], "apply").inc()
        return True

    async def ensure(self, manifest: Object, *, force: bool = False) -> None:
        """Applies a child that nobody else changes: looked at once, and then with everything.

        Raises:
            NotOurs: somebody else has an object of that name.
        """
        resource, metadata = resource_of(dict(manifest)), manifest["metadata"]
        place = (resource.plural, metadata["namespace"], metadata["name"])
        wanted = digest(manifest)
        if self._ensured.get(place) == wanted and not force:
            return
        live = await self._kube.get(resource, metadata["namespace"], metadata["name"])
        await self.apply(manifest, live, force=force)
        self._ensured[place] = wanted


def check_ours(manifest: Object, live: Object | None) -> None:
    """
    Raises:
        NotOurs: ``live`` has another owner than the manifest, or none.
    """
    owners = {ref["uid"] for ref in manifest["metadata"].get("ownerReferences") or ()}
    if live is None or not owners:
        return
    if not any(ref.get("uid") in owners for ref in live["metadata"].get("ownerReferences") or ()):
        raise _not_ours(manifest)


def _not_ours(manifest: Object) -> NotOurs:
    metadata = manifest["metadata"]
    return NotOurs(manifest["kind"], metadata["namespace"], metadata["name"])


def _annotations(live: Object | None) -> Object:
    return {} if live is None else live["metadata"].get("annotations") or {}

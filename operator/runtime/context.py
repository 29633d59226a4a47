"""What every reconcile has at hand, and the few ways in which it writes to the cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from calotype.operator.api.conditions import (
    Condition,
    Fact,
    Reason,
    condition_of,
    is_true,
    moment,
    set_conditions,
    timestamp,
)
from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.labels import (
    APPLIED_HASH,
    DELETE_DEADLINE,
    FINALIZER,
    FORCE_DELETE,
    digest,
)
from calotype.operator.kube.objects import Address, Manifest, Object, address_of
from calotype.operator.kube.resources import GROUP, NAMESPACES, Resource, resource_of
from calotype.operator.planning.model_report import ModelReport
from calotype.operator.runtime.credentials import CredentialReader
from calotype.operator.runtime.fetch_runner import FetchRunner, FetchSlots
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.model_app import ModelApps
from calotype.operator.runtime.store import Store
from calotype.operator.runtime.workqueue import Debounce, Key, Postponed, WorkQueue
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

REPORTED_BY = "calotype-operator"
_UNDERWAY = frozenset(
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


@dataclass
class Context:
    """Everything that reconcilers share."""

    kube: KubeClient
    settings: OperatorSettings
    store: Store
    queue: WorkQueue
    metrics: Metrics
    apps: ModelApps
    credentials: CredentialReader
    fetches: FetchRunner
    slots: FetchSlots
    debounce: Debounce
    reports: dict[Address, ModelReport] = field(default_factory=dict)
    """What each model app said last."""
    missed: dict[Address, int] = field(default_factory=dict)
    """How often in a row a model app did not answer."""
    pushed: dict[Address, frozenset[str]] = field(default_factory=dict)
    """The adapters in each model's configuration as it was written last."""
    fetch_jobs: dict[Key, set[str]] = field(default_factory=dict)
    """Names of the fetch Jobs that there are of an adapter or a model."""
    recheck: set[Key] = field(default_factory=set)
    """What is applied again although nothing of ours changed: somebody may have edited it."""
    ensured: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """Digests of what `ensure` has applied."""
    monitors_installed: bool | None = None
    """Whether PodMonitors exist; None = nobody has looked."""

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
        await self.kube.apply(body)
        self.metrics.writes.labels(manifest["kind"], "apply").inc()
        return True

    async def ensure(self, manifest: Object, *, force: bool = False) -> None:
        """Applies a child that nobody else changes: looked at once, and then with everything."""
        resource, metadata = resource_of(dict(manifest)), manifest["metadata"]
        place = (resource.plural, metadata["namespace"], metadata["name"])
        wanted = digest(manifest)
        if self.ensured.get(place) == wanted and not force:
            return
        live = await self.kube.get(resource, metadata["namespace"], metadata["name"])
        await self.apply(manifest, live, force=force)
        self.ensured[place] = wanted

    async def status(self, obj: Object, facts: Iterable[Fact], fields: Object) -> bool:
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
                now=timestamp(self.kube.now()),
            ),
        }
        if wanted == old:
            return False
        resource = resource_of(dict(obj))
        try:
            await self.kube.apply(
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
            )
        except ApiError as error:
            if error.status == 404:
                return False  # deleted meanwhile; its event follows
            raise
        self.metrics.writes.labels(resource.kind, "status").inc()
        await self._tell(obj, facts)
        return True

    async def _tell(self, obj: Object, facts: Iterable[Fact]) -> None:
        """Events for what changed and is news."""
        for fact in facts:
            old = condition_of(obj, fact.type)
            if old is not None and (old["status"], old["reason"]) == (fact.status, fact.reason):
                continue
            good = fact.holds != (fact.type in (Condition.KUBERAY_MISSING,))
            if fact.reason in _UNDERWAY or (good and fact.type != Condition.READY):
                continue
            if fact.type == Condition.READY and not good and old is None:
                continue
            await self.event(obj, "Normal" if good else "Warning", fact.reason, fact.message)

    async def event(self, obj: Object, type_: str, reason: str, message: str) -> None:
        """Posts an Event; one that cannot be posted is no reason to fail."""
        metadata = obj["metadata"]
        now = timestamp(self.kube.now())
        reference = {
            "apiVersion": obj["apiVersion"],
            "kind": obj["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        }
        name = f"{metadata['name'][:200]}.{digest([reference, reason, message, now])}"
        try:
            await self.kube.create(
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

    # --- finalizers -----------------------------------------------------------------------------

    async def hold(self, resource: Resource, obj: Object) -> None:
        """Makes sure that deleting the object waits for us."""
        have = list(obj["metadata"].get("finalizers") or ())
        wanted = [*_foreign(have), FINALIZER]
        if have != wanted:
            await self._set_finalizers(resource, obj, wanted)

    async def release(self, resource: Resource, obj: Object) -> None:
        """Lets go of the object; also of what earlier versions put on it."""
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
            changed = await self.kube.patch(resource, metadata["namespace"], metadata["name"], body)
        except ApiError as error:
            if error.status == 409:
                raise Postponed(0.1, "the object changed meanwhile") from error
            raise
        self.metrics.writes.labels(resource.kind, "finalizers").inc()
        if changed is not None and isinstance(obj, dict):
            obj["metadata"] = changed["metadata"]

    def deleting_for(self, obj: Object) -> float | None:
        """Seconds since the deletion was asked for, by the server's clock; None = it was not."""
        asked = obj["metadata"].get("deletionTimestamp")
        if not asked:
            return None
        since = moment(asked) or self.kube.now()
        return max(0.0, (self.kube.now() - since).total_seconds())

    def must_let_go(self, obj: Object, elapsed: float) -> str | None:
        """Why a deletion waits no longer; None = it may wait."""
        metadata = obj["metadata"]
        annotations = metadata.get("annotations") or {}
        if str(annotations.get(FORCE_DELETE, "")).lower() == "true":
            return f"the annotation {FORCE_DELETE} is set"
        if metadata["namespace"] in self.store.terminating:
            return "its namespace is being deleted"
        deadline = self.settings.delete_deadline_seconds
        try:
            deadline = max(0.0, float(annotations.get(DELETE_DEADLINE, deadline)))
        except ValueError:
            log.warning("%s of %s is no number", DELETE_DEADLINE, metadata["name"])
        if elapsed >= deadline:
            return f"it was not drained within {deadline:.0f} s"
        return None

    async def look_at_namespace(self, name: str) -> None:
        """Refreshes labels and phase of a namespace; one that may not be read has none."""
        try:
            found = await self.kube.get(NAMESPACES, "", name)
        except ApiError as error:
            if error.status != 403:
                raise
            log.debug("namespace %s may not be read: %s", name, error)
            return
        if found is None:
            self.store.set_namespace(name, {}, True)
            return
        metadata = found["metadata"]
        ending = (found.get("status") or {}).get("phase") == "Terminating"
        ending = ending or "deletionTimestamp" in metadata
        self.store.set_namespace(name, metadata.get("labels") or {}, ending)

    # --- who else must look ---------------------------------------------------------------------

    def wake_model(self, address: Address, delay: float = 0.0) -> None:
        self.queue.add(Key("ImageModel", *address), delay)

    def wake_adapter(self, address: Address, delay: float = 0.0) -> None:
        self.queue.add(Key("LoRAAdapter", *address), delay)

    def wake_gateway(self, delay: float = 0.3) -> None:
        """A moment later, so that what belongs together is written together."""
        self.queue.add(Key("Gateway", "", ""), delay)

    def adapters_changed(self, model: Address) -> None:
        """The configuration of a model is to be written when the burst of changes is over."""
        key = Key("ImageModel", *model)
        self.queue.add(key, self.debounce.touch(key))
        self.wake_gateway(self.settings.debounce_seconds)


def ready(obj: Object | None) -> bool:
    return obj is not None and is_true(obj, Condition.READY)


def _pruned(value: Object) -> Manifest:
    """Without what is None, also inside: a status says nothing of what is not known."""
    found: Manifest = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            entry = _pruned(entry)
        if entry is not None:
            found[key] = entry
    return found


def _foreign(finalizers: Iterable[str]) -> list[str]:
    return [name for name in finalizers if not name.startswith(f"{GROUP}/")]


__all__ = ["Context", "address_of", "ready"]

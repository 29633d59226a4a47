"""Turns watch events into keys of the work queue.

Nothing is decided here: an event only adds the keys that may be affected, and reconciling them is
cheap. What depends on several objects (names, capacity, references) is reconciled once for a burst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.operator.kube.labels import (
    ACCEPTED,
    ADAPTER,
    ADAPTER_NAMESPACE,
    MODEL,
    TRAINING,
    model_of,
)
from calotype.operator.kube.objects import Address, Manifest, Object, address_of
from calotype.operator.kube.resources import (
    CLAIMS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    JOBS,
    LORA_ADAPTERS,
    LORA_TRAININGS,
    MODERATION_POLICIES,
    OWN,
    RAY_CLUSTERS,
    RAY_JOBS,
    RAY_SERVICES,
    TEAMS,
    Resource,
)
from calotype.operator.planning.fetch_outcome import job_ended
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key

BURST_SECONDS = 0.5
_IDENTITY = ("uid", "generation", "deletionTimestamp")


class EventRouter:
    """Puts objects into the store, and the keys of whoever depends on them into the queue."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._announced: dict[tuple[str, Address], tuple[Any, ...]] = {}
        """Identity and generation of each object at the last event that others had to react to."""

    def observe(self, resource: Resource, obj: Manifest) -> None:
        if resource in OWN:
            self._context.store.put(resource.kind, obj)

    def handle(self, resource: Resource, obj: Manifest, gone: bool) -> None:
        if resource not in OWN:
            self._child(resource, obj, gone)
            return
        address, kind = address_of(obj), resource.kind
        self._context.queue.add(Key(kind, *address))
        metadata = obj["metadata"]
        accepted = (metadata.get("annotations") or {}).get(ACCEPTED)
        now = (*(metadata.get(part) for part in _IDENTITY), accepted)
        if gone:
            self._context.store.drop(kind, address)
            self._announced.pop((kind, address), None)
        elif self._announced.get((kind, address)) == now:
            return  # its status changed, which concerns nobody else
        else:
            self._announced[kind, address] = now
        self._add_dependents(resource, address, obj)

    def _add_dependents(self, resource: Resource, address: Address, obj: Object) -> None:
        """Adds what depends on a changed spec, a new object, or one that is gone."""
        context, spec = self._context, obj.get("spec") or {}
        if resource == IMAGE_MODELS:
            self._add("Models", "", "")
            self._add("Refusals", *address)
            for adapter in context.store.adapters_of(address):
                context.wake_adapter(adapter, BURST_SECONDS)  # its limits may be others now
            for policy, _ in context.store.all("ModerationPolicy"):
                if policy[0] == address[0]:
                    context.queue.add(Key("ModerationPolicy", *policy), BURST_SECONDS)
            self._recheck_teams()
        elif resource == LORA_ADAPTERS:
            ref = spec.get("modelRef") or {}
            model = (ref.get("namespace") or address[0], str(ref.get("name")))
            context.adapters_changed(model)
            self._add("Refusals", *model)
        elif resource == MODERATION_POLICIES:
            self._policy(address)
        elif resource == TEAMS:
            for other, _ in context.store.all("Team"):
                if other[1] == address[1]:
                    context.queue.add(Key("Team", *other))
            for model in context.store.hosts():  # they check by the policies of their teams too
                context.wake_model(model, BURST_SECONDS)
            context.wake_gateway()

    def _policy(self, address: Address) -> None:
        context = self._context
        self._add("Models", "", "")
        for other, _ in context.store.all("ModerationPolicy"):
            if other != address:  # they share the room of a configuration
                self._add("ModerationPolicy", *other)
        for model in context.store.hosts():  # also those of others: teams and adapters name it
            context.wake_model(model, BURST_SECONDS)
        for adapter, obj in context.store.all("LoRAAdapter"):
            if adapter[0] == address[0] and obj["spec"].get("moderationPolicyRef"):
                context.wake_adapter(adapter, BURST_SECONDS)
        self._recheck_teams()
        context.wake_gateway()

    def _recheck_teams(self) -> None:
        """Those with a policy of their own: it must be as strict as the models' are now."""
        for team, obj in self._context.store.all("Team"):
            if obj["spec"].get("moderationPolicyRef"):
                self._add("Team", *team)

    def _add(self, kind: str, namespace: str, name: str) -> None:
        self._context.queue.add(Key(kind, namespace, name), BURST_SECONDS)

    def _fetch_job(self, job: str, namespace: str, labels: Mapping[str, str], gone: bool) -> None:
        if labels.get(ADAPTER) and labels.get(ADAPTER_NAMESPACE):
            key = Key(LORA_ADAPTERS.kind, labels[ADAPTER_NAMESPACE], labels[ADAPTER])
        elif labels.get(MODEL):
            key = Key(IMAGE_MODELS.kind, namespace, labels[MODEL])
        else:
            return
        jobs = self._context.fetch_jobs.setdefault(key, set())
        (jobs.discard if gone else jobs.add)(job)
        if not jobs:
            del self._context.fetch_jobs[key]
        self._context.queue.add(key)

    def _child(self, resource: Resource, obj: Manifest, gone: bool) -> None:
        context = self._context
        metadata = obj["metadata"]
        labels = metadata.get("labels") or {}
        namespace = metadata.get("namespace") or ""
        if resource == JOBS:
            active = not gone and not job_ended(obj)
            context.slots.note((namespace, metadata["name"]), active)
            self._fetch_job(metadata["name"], namespace, labels, gone)
        elif resource == RAY_CLUSTERS:
            if labels.get("ray.io/originated-from-crd") == "RayService":
                service = labels["ray.io/originated-from-cr-name"]
                context.wake_model((namespace, model_of(service)), 0.2)
        elif resource in (DEPLOYMENTS, CLAIMS, RAY_SERVICES):
            if labels.get(MODEL):
                context.wake_model((namespace, labels[MODEL]), 0.2)
        elif resource == RAY_JOBS and labels.get(TRAINING):
            context.queue.add(Key(LORA_TRAININGS.kind, namespace, labels[TRAINING]), 0.2)

"""From what is watched to what is to be reconciled.

Nothing is decided here: an event only names the keys that must look again, and looking again is
cheap. What depends on several objects (names, capacity, references) is looked at once for a burst.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.operator.kube.labels import ADAPTER, ADAPTER_NAMESPACE, MODEL, TRAINING
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
    """Tells the store what there is, and the queue what to look at."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._announced: dict[tuple[str, Address], tuple[Any, ...]] = {}
        """Identity and generation of each object at the last event that others had to react to."""

    def seen(self, resource: Resource, obj: Manifest) -> None:
        if resource in OWN:
            self._context.store.put(resource.kind, obj)

    def happened(self, resource: Resource, obj: Manifest, gone: bool) -> None:
        if resource not in OWN:
            self._child(resource, obj, gone)
            return
        address, kind = address_of(obj), resource.kind
        self._context.queue.add(Key(kind, *address))
        now = tuple(obj["metadata"].get(part) for part in _IDENTITY)
        if gone:
            self._context.store.drop(kind, address)
            self._announced.pop((kind, address), None)
        elif self._announced.get((kind, address)) == now:
            return  # its status changed, which concerns nobody else
        else:
            self._announced[kind, address] = now
        self._others(resource, address, obj)

    def _others(self, resource: Resource, address: Address, obj: Object) -> None:
        """Who else is concerned by a changed spec, a new object, or one that is gone."""
        context, spec = self._context, obj.get("spec") or {}
        if resource == IMAGE_MODELS:
            self._look("Models", "", "")
            self._look("Refusals", *address)
            for adapter in context.store.adapters_of(address):
                context.wake_adapter(adapter, BURST_SECONDS)  # its limits may be others now
            for policy, _ in context.store.all("ModerationPolicy"):
                if policy[0] == address[0]:
                    context.queue.add(Key("ModerationPolicy", *policy), BURST_SECONDS)
            self._look_at_teams()
        elif resource == LORA_ADAPTERS:
            ref = spec.get("modelRef") or {}
            model = (ref.get("namespace") or address[0], str(ref.get("name")))
            context.adapters_changed(model)
            self._look("Refusals", *model)
        elif resource == MODERATION_POLICIES:
            self._policy(address)
        elif resource == TEAMS:
            for other, _ in context.store.all("Team"):
                if other[1] == address[1]:
                    context.queue.add(Key("Team", *other))
            for model in context.store.hosts():  # they judge by the policies of their teams too
                context.wake_model(model, BURST_SECONDS)
            context.wake_gateway()

    def _policy(self, address: Address) -> None:
        context = self._context
        self._look("Models", "", "")
        for model in context.store.hosts():  # also those of others: teams and adapters name it
            context.wake_model(model, BURST_SECONDS)
        for adapter, obj in context.store.all("LoRAAdapter"):
            if adapter[0] == address[0] and obj["spec"].get("moderationPolicyRef"):
                context.wake_adapter(adapter, BURST_SECONDS)
        self._look_at_teams()
        context.wake_gateway()

    def _look_at_teams(self) -> None:
        """Those with a policy of their own: it must be as strict as the models' are now."""
        for team, obj in self._context.store.all("Team"):
            if obj["spec"].get("moderationPolicyRef"):
                self._look("Team", *team)

    def _look(self, kind: str, namespace: str, name: str) -> None:
        self._context.queue.add(Key(kind, namespace, name), BURST_SECONDS)

    def _fetch_job(self, job: str, namespace: str, labels: Mapping[str, str], gone: bool) -> None:
        if labels.get(ADAPTER) and labels.get(ADAPTER_NAMESPACE):
            key = Key(LORA_ADAPTERS.kind, labels[ADAPTER_NAMESPACE], labels[ADAPTER])
        elif labels.get(MODEL):
            key = Key(IMAGE_MODELS.kind, namespace, labels[MODEL])
        else:
            return
        known = self._context.fetch_jobs.setdefault(key, set())
        (known.discard if gone else known.add)(job)
        if not known:
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
                context.wake_model((namespace, labels["ray.io/originated-from-cr-name"]), 0.2)
        elif resource in (DEPLOYMENTS, CLAIMS, RAY_SERVICES):
            if labels.get(MODEL):
                context.wake_model((namespace, labels[MODEL]), 0.2)
        elif resource == RAY_JOBS and labels.get(TRAINING):
            context.queue.add(Key(LORA_TRAININGS.kind, namespace, labels[TRAINING]), 0.2)

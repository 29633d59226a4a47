"""Reconciles many objects at once: changed refusals, and the periodic resync of all of them."""

from __future__ import annotations

import random

from calotype.operator.api.conditions import Condition, condition_of
from calotype.operator.kube.client import ApiError
from calotype.operator.kube.labels import ADAPTER, ADAPTER_NAMESPACE, OWNER_UID, labels
from calotype.operator.kube.objects import Address
from calotype.operator.kube.resources import JOBS, OWN
from calotype.operator.planning.refusal import Refusal
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key


async def reconcile_models(context: Context, key: Key) -> float | None:
    """Wakes the models whose acceptance is not what their status says."""
    for address, host in context.store.hosts().items():
        obj = context.store.get("ImageModel", address) or {}
        contested = condition_of(obj, Condition.NAMES_CONTESTED) is not None
        renamed = contested != (host.rivals is not None)
        if renamed or _differs(context, "ImageModel", address, host.refusal):
            context.wake_model(address)
    context.wake_gateway()
    return None


async def reconcile_refusals(context: Context, key: Key) -> float | None:
    """Wakes the adapters of a model whose acceptance is not what their status says."""
    refusals = context.store.refusals()
    for address in context.store.adapters_of((key.namespace, key.name)):
        if _differs(context, "LoRAAdapter", address, refusals.get(address)):
            context.wake_adapter(address)
    for address, obj in context.store.all("LoRATraining"):
        ref = obj["spec"].get("modelRef") or {}
        if (ref.get("namespace") or address[0], ref.get("name")) == (key.namespace, key.name):
            context.queue.add(Key("LoRATraining", *address))
    return None


def _differs(context: Context, kind: str, address: Address, refusal: Refusal | None) -> bool:
    obj = context.store.get(kind, address)
    said = condition_of(obj, Condition.ACCEPTED) if obj is not None else None
    if said is None:
        return True
    if refusal is None:
        return bool(said["status"] != "True")
    return bool(said["status"] == "True" or said["reason"] != refusal.reason)


async def resync(context: Context, key: Key) -> float | None:
    """Queues all objects again, and drops from the store what was deleted unseen."""
    settings = context.settings
    namespaces: list[str | None] = [None] if settings.all_namespaces else [*settings.watched]
    for resource in OWN:
        there: set[Address] = set()
        for namespace in namespaces:
            try:
                found = await context.kube.list(resource, namespace, metadata_only=True)
            except ApiError as error:
                if error.status != 403:
                    raise
                continue  # a namespace that is gone, and its rights with it
            there |= {(o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in found}
        for address, _ in context.store.all(resource.kind):
            if address not in there:
                context.store.drop(resource.kind, address)
            wanted = Key(resource.kind, *address)
            if resource.kind == "ImageModel":
                context.recheck.add(wanted)
            context.queue.add(wanted, random.uniform(0, settings.resync_seconds / 4))
    for namespace in {address[0] for r in OWN for address, _ in context.store.all(r.kind)}:
        await _namespace(context, namespace)
    await _delete_orphaned_jobs(context, namespaces)
    _count_objects(context)
    for address in context.store.hosts():
        context.queue.add(Key("Refusals", *address))
    context.queue.add(Key("Models", "", ""))
    return settings.resync_seconds * random.uniform(0.9, 1.1)


async def _namespace(context: Context, name: str) -> None:
    before = context.store.namespace_labels.get(name), name in context.store.terminating
    await context.refresh_namespace(name)
    if before == (context.store.namespace_labels.get(name), name in context.store.terminating):
        return
    for kind in ("ImageModel", "LoRAAdapter"):
        for address, _ in context.store.all(kind):
            if address[0] == name:
                context.queue.add(Key(kind, *address))


async def _delete_orphaned_jobs(context: Context, namespaces: list[str | None]) -> None:
    """Deletes fetch Jobs of adapters that are gone: no owner in their namespace does it."""
    for namespace in namespaces:
        try:
            jobs = await context.kube.list(JOBS, namespace, labels(context.settings, "fetch"))
        except ApiError as error:
            if error.status != 403:
                raise
            continue
        for job in jobs:
            metadata = job["metadata"]
            told = metadata.get("labels") or {}
            if ADAPTER not in told:
                continue
            owner = context.store.get(
                "LoRAAdapter", (told.get(ADAPTER_NAMESPACE, ""), told[ADAPTER])
            )
            uid = (metadata.get("annotations") or {}).get(OWNER_UID)
            if owner is None or owner["metadata"].get("uid") != uid:
                await context.kube.delete(
                    JOBS, metadata["namespace"], metadata["name"], metadata["uid"]
                )


def _count_objects(context: Context) -> None:
    context.metrics.objects.clear()
    for resource in OWN:
        for _, obj in context.store.all(resource.kind):
            phase = obj["status"].get("phase") or "Pending"
            context.metrics.objects.labels(resource.kind, phase).inc()

"""The adapters of a model that its replicas, and those that the gateway, are configured with."""

from __future__ import annotations

from collections.abc import Iterator

from calotype.operator.kube.objects import Address, Manifest
from calotype.operator.manifests.custom_resources import adapter_manifest
from calotype.operator.planning.adapters import (
    fits,
)
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.weights import AdapterWeights, plan_adapter_weights
from calotype.operator.runtime.context import Context
from calotype.serving.config import ImageModel, LoRAAdapter


def refusal_of(
    context: Context, address: Address, model: ImageModel, status: Manifest
) -> Refusal | None:
    """Why an adapter must not be served: for the others' sake, or for its own file."""
    refusal = context.store.refusals().get(address)
    if refusal is not None or not status.get("path"):
        return refusal
    return fits(model, status.get("rank"), status.get("sizeBytes"))


def _offered(
    context: Context, address: Address, model: ImageModel
) -> Iterator[tuple[Manifest, LoRAAdapter, AdapterWeights]]:
    for adapter_address in context.store.adapters_of(address):
        adapter = context.store.adapter(adapter_address)
        obj = context.store.get("LoRAAdapter", adapter_address)
        if adapter is None or obj is None or adapter.spec.suspend:
            continue
        if refusal_of(context, adapter_address, model, obj["status"]) is not None:
            continue
        weights = plan_adapter_weights(adapter, obj["status"])
        if weights.servable:
            yield obj, adapter, weights


def for_replicas(context: Context, address: Address, model: ImageModel) -> list[Manifest]:
    """Rendered manifests, in the order of their names.

    One that is being deleted stays for a while after the gateway has forgotten it, for the requests
    that are on their way.
    """
    found = []
    for obj, adapter, weights in _offered(context, address, model):
        elapsed = context.finalizers.deleting_for(obj)
        if elapsed is not None and (
            elapsed >= context.settings.drain_seconds
            or context.finalizers.overdue(obj, elapsed) is not None
        ):
            continue
        found.append(adapter_manifest(adapter, weights.ready))
    return sorted(found, key=lambda m: str(m["metadata"]["name"]))


def for_gateway(context: Context, address: Address, model: ImageModel) -> list[Manifest]:
    """The same for the gateway, which forgets what is being deleted at once."""
    return [
        adapter_manifest(adapter, weights.ready)
        for obj, adapter, weights in _offered(context, address, model)
        if context.finalizers.deleting_for(obj) is None
    ]

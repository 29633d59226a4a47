"""Where weights come from in a cluster: which volumes pods see, what is fetched, what serves.

Pure. A fetched source is fetched once, by a Job, onto a volume that all pods of the model mount:
the model's own (``spec.cache``) or the release's.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, replace

from calotype.operator.kube.labels import (
    ACCEPTED,
    digest,
    labels,
    owner_reference,
    workload_name,
)
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.manifests.custom_resources import Weights
from calotype.operator.manifests.fetch_job import FETCHED_SOURCES, FetchTask
from calotype.operator.manifests.pods import CACHE_DIR, SOURCE_DIR, Volumes
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, LoRAAdapter, ModelSource, Source
from calotype.serving.config.model.acceptance import MOST_ACCEPTED
from calotype.serving.wire.fetch_order import FetchOrder, LicenceAnswer


def source_json(source: Source | ModelSource) -> Manifest:
    """``spec.source`` as it stands in the manifest, defaults filled in."""
    return source.model_dump(mode="json", by_alias=True, exclude_none=True)


def source_type(source: Source | ModelSource) -> str:
    """Which of its fields is given."""
    return next(iter(source_json(source)))


def is_fetched(source: Source | ModelSource) -> bool:
    return source_type(source) in FETCHED_SOURCES


def claim_name(model: str) -> str:
    return f"{workload_name(model)}-cache"


def volumes_of(model: ImageModel, settings: OperatorSettings) -> Volumes:
    """The claims that the pods of a model mount."""
    claim = model.spec.source.persistent_volume_claim
    in_release = model.metadata.namespace == settings.operator_namespace
    return Volumes(
        data=settings.data_claim if in_release else None,
        cache=claim_name(model.name) if model.spec.cache is not None else None,
        source=claim.claim_name if claim is not None else None,
        authorities=settings.egress.ca_config_map,
    )


def build_claim(owner: Object, model: ImageModel, settings: OperatorSettings) -> Manifest | None:
    """The PersistentVolumeClaim of ``spec.cache``; None without one."""
    if model.spec.cache is None:
        return None
    template = model.spec.cache.persistent_volume_claim
    # Pods on several nodes write nothing, but only ReadWriteMany lets them mount it.
    one_node = model.spec.runtime == "SinglePod"
    spec: Manifest = {
        "accessModes": ["ReadWriteOnce" if one_node else "ReadWriteMany"],
        "resources": {"requests": {"storage": template.size}},
    }
    if template.storage_class_name is not None:
        spec["storageClassName"] = template.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": claim_name(model.name),
            "namespace": model.metadata.namespace,
            "labels": labels(settings, "model", model=model.name),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": spec,
    }


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """What a model's source asks for."""

    source_hash: str
    """Of the source as it is written now."""
    ready: Weights | None
    """What the pods may be told; None = nothing is there yet."""
    current: bool
    """Whether ``ready`` is of the source as it is written now."""
    to_fetch: bool


def source_hash(source: Object, pin: str | None = None) -> str:
    return digest([source, pin])


def plan_weights(model: ImageModel, status: Object) -> WeightsPlan:
    """By the source and by what the status says of an earlier fetch."""
    source = source_json(model.spec.source)
    wanted = source_hash(source)
    if not is_fetched(model.spec.source):
        claim = model.spec.source.persistent_volume_claim
        path = f"{SOURCE_DIR}/{claim.path}" if claim is not None else None
        return WeightsPlan(wanted, Weights(path) if path else None, True, False)
    had = status.get("sourceHash")
    path = status.get("weightsPath")
    if not (had and path):
        return WeightsPlan(wanted, None, False, True)
    old = Weights(path, status.get("resolvedRevision") or "", status.get("weightsSha256") or "")
    return WeightsPlan(wanted, old, had == wanted, had != wanted)


def fetch_task(owner: Object, model: ImageModel, secret_version: str, attempt: int) -> FetchTask:
    """The Job that fetches a model."""
    source = source_json(model.spec.source)
    ref = model.spec.credentials_secret_ref
    http = model.spec.source.http
    licence = model.spec.licence
    order = FetchOrder(
        kind="model",
        name=model.name,
        namespace=model.metadata.namespace,
        source=model.spec.source,
        sha256=http.sha256 if http is not None else None,
        cache_dir=pathlib.Path(CACHE_DIR),
        licence=(
            LicenceAnswer(name=licence.name, accepted=licence.accepted)
            if licence is not None
            else None
        ),
    )
    answer = None if order.licence is None else order.licence.payload()
    return FetchTask(
        order=order,
        owner=owner,
        namespace=model.metadata.namespace,
        model=model.name,
        # With the licence: a fetch that was refused for it is tried again when it is corrected.
        fingerprint=digest([source, answer, secret_version]),
        attempt=attempt,
        credentials=ref.name if ref is not None else None,
    )


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter's source asks for."""

    source_hash: str
    ready: Weights | None
    """What the replicas may be told where ``servable``; None = the source as it is written."""
    servable: bool
    current: bool
    """Whether what is served is of the source as it is written now."""
    to_fetch: bool
    checked: Weights | None = None
    """The newest file; another one than ``ready`` while it is held or rolled back."""
    held: str = ""
    """Why the newest file does not serve: it has not been accepted."""
    accepted: tuple[Manifest, ...] = ()
    """``status.acceptedRevisions`` from now on."""


def plan_adapter_weights(adapter: LoRAAdapter, status: Object) -> AdapterWeights:
    """By the source and by what the status says of an earlier check."""
    wanted = adapter_source_hash(adapter)
    if source_type(adapter.spec.source) == "builtIn":
        return AdapterWeights(wanted, None, True, True, False)
    had, path = status.get("sourceHash"), status.get("path")
    if not (had and path):
        return AdapterWeights(wanted, None, False, False, True)
    old = Weights(path, status.get("resolvedRevision") or "", status.get("sha256") or "")
    plan = AdapterWeights(wanted, old, True, had == wanted, had != wanted, old)
    return plan if adapter.spec.acceptance is None else _gated(plan, old, adapter, status)


def _gated(
    plan: AdapterWeights, newest: Weights, adapter: LoRAAdapter, status: Object
) -> AdapterWeights:
    """A revision serves when the annotation names its digest, which an earlier one keeps being."""
    known = [dict(one) for one in status.get("acceptedRevisions") or ()]
    annotations = (adapter.metadata.model_extra or {}).get("annotations") or {}
    named = annotations.get(ACCEPTED, "")
    if named and named == newest.sha256:
        this = {
            "sha256": newest.sha256,
            "resolvedRevision": newest.revision,
            "path": newest.path,
        }
        others = [one for one in known if one["sha256"] != named]
        accepted = (*others[1 - MOST_ACCEPTED :], this)
        return replace(plan, accepted=accepted)
    kept = replace(plan, accepted=tuple(known))
    before = next((one for one in known if one["sha256"] == named), known[-1] if known else None)
    serving = None if before is None else _weights(before)
    if serving is not None and any(one["sha256"] == newest.sha256 for one in known):
        return replace(kept, ready=serving)  # the newest one served already, and was taken back
    held = (
        f"Revision {newest.revision} with sha256 {newest.sha256} waits for its acceptance set: "
        "measure it with `calotype adapters accept`, and set the annotation "
        f"{ACCEPTED} to this digest when it passes."
    )
    if serving is None:
        return replace(kept, ready=None, servable=False, held=held)
    held = f"{held} Until then revision {serving.revision} serves."
    return replace(kept, ready=serving, held=held)


def _weights(accepted: Object) -> Weights:
    return Weights(accepted["path"], accepted.get("resolvedRevision") or "", accepted["sha256"])


def adapter_source_hash(adapter: LoRAAdapter) -> str:
    return source_hash(source_json(adapter.spec.source), adapter.spec.sha256)

"""Custom resources as the operator parses them, and as it hands them to replicas and gateways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from calotype.operator.kube.labels import REVISION
from calotype.operator.kube.objects import Manifest, Object
from calotype.serving.config import API_VERSION, ImageModel, LoRAAdapter, Resource, describe

R = TypeVar("R", bound=Resource)


class InvalidSpec(Exception):
    """An object that the API server took, perhaps under an older schema, says what none may."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked file or folder on the cache volume, as a fetch Job left it."""

    path: str
    revision: str = ""
    sha256: str = ""


def parse(kind: type[R], obj: Object) -> R:
    """The typed form of an object.

    Raises:
        InvalidSpec: one sentence says which field is wrong.
    """
    document = {key: value for key, value in obj.items() if key != "status"}
    try:
        return kind.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidSpec(describe(error)) from None


def model_manifest(model: ImageModel, weights: Weights | None) -> Manifest:
    """The manifest that replicas and gateways get of a model; ``weights`` = where its files are."""
    spec = model.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return _manifest(model, _with_weights(spec, weights), "")


def adapter_manifest(adapter: LoRAAdapter, weights: Weights | None) -> Manifest:
    """The manifest that replicas and gateways get of an adapter.

    Defaults are left out: a thousand adapters must fit into one object of Kubernetes.
    """
    spec = adapter.spec.model_dump(
        mode="json", by_alias=True, exclude_none=True, exclude_defaults=True
    )
    spec.pop("credentialsSecretRef", None)
    spec = _with_weights(spec, weights)
    if weights is not None and weights.sha256:
        spec["sha256"] = weights.sha256
    return _manifest(adapter, spec, weights.revision if weights is not None else "")


def _with_weights(spec: Manifest, weights: Weights | None) -> Manifest:
    return spec if weights is None else {**spec, "source": {"path": weights.path}}


def _manifest(resource: ImageModel | LoRAAdapter, spec: Any, revision: str) -> Manifest:
    metadata: Manifest = {
        "name": resource.name,
        "namespace": resource.metadata.namespace,
    }
    if revision:
        metadata["annotations"] = {REVISION: revision}
    return {"apiVersion": API_VERSION, "kind": resource.kind, "metadata": metadata, "spec": spec}

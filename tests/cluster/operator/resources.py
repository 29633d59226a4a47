"""Custom resources for the tests of the operator, in as few words as their kinds allow."""

from __future__ import annotations

from typing import Any

from controlplane.client.objects import Object

API_VERSION = "calotype.dev/v1alpha1"
SHAPES: Object = {"builtIn": {"name": "shapes"}}
TEAM: Object = {
    "apiVersion": API_VERSION,
    "kind": "Team",
    "metadata": {"name": "shoes"},
    "spec": {"displayName": "Shoes"},
}


def resource(kind: str, name: str, **spec: Any) -> Object:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def model(name: str = "shapes", **spec: Any) -> Object:
    """An ImageModel in one pod, of the weights that are built in."""
    return resource("ImageModel", name, **{"source": SHAPES, "runtime": "SinglePod", **spec})


def adapter(name: str = "stripes", model: str = "shapes", **spec: Any) -> Object:
    """A LoRAAdapter that is built in and needs no fetch Job."""
    given = {"modelRef": {"name": model}, "source": {"builtIn": {"name": "stripes"}}}
    return resource("LoRAAdapter", name, **(given | spec))


def hub_adapter(name: str = "sneaker", **spec: Any) -> Object:
    """A LoRAAdapter that a fetch Job brings from the hub."""
    return adapter(name, **{"source": {"huggingFace": {"repo": f"acme/{name}"}}, **spec})

"""Manifests of custom resources, to apply."""

from __future__ import annotations

from typing import Any

from calotype.operator.kube.objects import Manifest


def model(name: str = "shapes", namespace: str = "calotype", **spec: Any) -> Manifest:
    """An ImageModel that needs nothing."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ImageModel",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"source": {"builtIn": {"name": "shapes"}}, "runtime": "SinglePod", **spec},
    }


def adapter(name: str = "stripes", namespace: str = "calotype", **spec: Any) -> Manifest:
    """A LoRAAdapter that needs nothing."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "modelRef": {"name": "shapes"},
            "source": {"builtIn": {"name": "stripes"}},
            **spec,
        },
    }


def of_hub(name: str = "sneaker", repo: str = "acme/sneaker", **spec: Any) -> Manifest:
    """A LoRAAdapter that has to be fetched."""
    source = {"huggingFace": {"repo": repo, "revision": "main"}}
    return adapter(name, **{"source": source, **spec})


def team(name: str = "shoes", namespace: str = "calotype", **spec: Any) -> Manifest:
    """A Team without limits."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "Team",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def policy(name: str, block: float, version: int = 1, category: str = "sexual") -> Manifest:
    """A ModerationPolicy that blocks texts of one category from a score on."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ModerationPolicy",
        "metadata": {"name": name, "namespace": "calotype"},
        "spec": {"version": version, "categories": {category: {"text": {"block": block}}}},
    }

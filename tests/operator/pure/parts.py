"""Settings, models and adapters as the pure builders and plans take them."""

from __future__ import annotations

from typing import Any

from calotype.operator.kube.objects import Manifest
from calotype.operator.manifests.custom_resources import parse
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, LoRAAdapter, LoRATraining, Team

HUB = {"huggingFace": {"repo": "acme/flux", "revision": "main"}}
VOLUME = {"persistentVolumeClaim": {"claimName": "files", "path": "flux"}}


def settings(**changed: Any) -> OperatorSettings:
    document: Manifest = {
        "release": "calotype",
        "operatorNamespace": "calotype",
        "serveImage": "serve:1",
        "dataClaim": "data",
        "resourceProfiles": {
            "gpu": {"gpus": 1, "limits": {"memory": "96Gi"}, "hourCost": 3.5, "threads": 4},
            "eight": {"gpus": 8},
        },
    }
    return OperatorSettings.model_validate(document | changed)


def owner(kind: str, name: str, namespace: str = "calotype", **spec: Any) -> Manifest:
    """An object as the API server has it."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "generation": 1,
            "creationTimestamp": "2026-11-23T09:00:00Z",
        },
        "spec": spec,
    }


def model(name: str = "shapes", namespace: str = "calotype", **spec: Any) -> ImageModel:
    given = {"source": {"builtIn": {"name": "shapes"}}} | spec
    return parse(ImageModel, owner("ImageModel", name, namespace, **given))


def adapter(name: str = "stripes", namespace: str = "calotype", **spec: Any) -> LoRAAdapter:
    given = {"modelRef": {"name": "shapes"}, "source": {"builtIn": {"name": "stripes"}}} | spec
    return parse(LoRAAdapter, owner("LoRAAdapter", name, namespace, **given))


def training(name: str = "sneaker", namespace: str = "calotype", **spec: Any) -> LoRATraining:
    given = {
        "modelRef": {"name": "shapes"},
        "dataset": {"persistentVolumeClaim": {"claimName": "photos", "path": "sneaker"}},
        "resourceProfile": "gpu",
    } | spec
    return parse(LoRATraining, owner("LoRATraining", name, namespace, **given))


def team(name: str = "shoes", namespace: str = "calotype", **spec: Any) -> Team:
    return parse(Team, owner("Team", name, namespace, **spec))

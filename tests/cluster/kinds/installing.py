"""Puts the kinds of calotype, of KubeRay and of Prometheus' operator into a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import yaml
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from controlplane.kuberay import schema

from calotype.operator.api.crdgen import FOLDER

MONITORING = {"ServiceMonitor": "endpoints", "PodMonitor": "podMetricsEndpoints"}


def install_kinds(cluster: Cluster) -> None:
    """Returns when objects of every kind can be stored; a second call changes nothing."""
    ours = [yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))]
    definitions = [*ours, *schema.definitions(), *monitoring_kinds()]
    cluster.apply_objects(*definitions)
    await_kinds(cluster, [definition["metadata"]["name"] for definition in definitions])


def await_kinds(cluster: Cluster, names: Iterable[str]) -> None:
    """Returns when objects of these kinds, such as "teams.calotype.dev", can be stored."""
    for name in names:
        cluster.wait("crd", name, "Established")
    for name in names:
        cluster.until(_served(cluster, name), f"{name} are served")


def _served(cluster: Cluster, kind: str) -> Callable[[], bool]:
    """A kind is Established a moment before it is discovered and its storage answers."""

    def served() -> bool:
        try:
            return cluster.api.get(cluster.path(kind)).is_success
        except LookupError:
            return False

    return served


def monitoring_kinds() -> list[Object]:
    """The kinds of the Prometheus operator, as strict as our objects need."""

    def definition(kind: str, spec: Object) -> Object:
        plural = f"{kind.lower()}s"
        schema = {"type": "object", "required": ["spec"], "properties": {"spec": spec}}
        version = {"name": "v1", "served": True, "storage": True}
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
                "versions": [version | {"schema": {"openAPIV3Schema": schema}}],
            },
        }

    text: Object = {"type": "string"}
    texts = {"type": "object", "additionalProperties": text}
    selector = {"type": "object", "properties": {"matchLabels": texts}}
    endpoint = {"type": "object", "properties": {n: text for n in ("port", "path", "interval")}}
    found = []
    for kind, field in MONITORING.items():
        endpoints = {"type": "array", "items": endpoint}
        fields: dict[str, Any] = {"selector": selector, field: endpoints}
        spec = {"type": "object", "required": list(fields), "properties": fields}
        found.append(definition(kind, spec))
    rule = {
        "type": "object",
        "required": ["expr", "alert"],
        "properties": {name: text for name in ("alert", "expr", "for")}
        | {"labels": texts, "annotations": texts},
    }
    rules = {"type": "array", "items": rule}
    group = {"type": "object", "required": ["name"], "properties": {"name": text, "rules": rules}}
    groups = {"groups": {"type": "array", "items": group}}
    found.append(definition("PrometheusRule", {"type": "object", "properties": groups}))
    return found

"""A PodMonitor for the pods of a model, for Prometheus' operator where it is installed."""

from __future__ import annotations

from calotype.operator.kube.labels import MODEL, labels, owner_reference, workload_name
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel


def build_podmonitor(owner: Object, model: ImageModel, settings: OperatorSettings) -> Manifest:
    """Ray exports its metrics, and those of replicas, on port 8080 of every pod of a Ray cluster;
    a SinglePod on its only port."""
    endpoint: Manifest = {"port": "metrics", "path": "/metrics", "interval": "30s"}
    if model.spec.runtime == "SinglePod":
        endpoint["port"] = "serve"
        if settings.models_tls is not None:
            service = f"{workload_name(model.name)}.{model.metadata.namespace}.svc"
            authority = {"secret": {"name": settings.models_tls.secret, "key": "ca.crt"}}
            endpoint |= {"scheme": "https", "tlsConfig": {"ca": authority, "serverName": service}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": workload_name(model.name),
            "namespace": model.metadata.namespace,
            "labels": labels(settings, "model", model=model.name),
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "selector": {"matchLabels": {MODEL: model.name}},
            "podMetricsEndpoints": [endpoint],
        },
    }

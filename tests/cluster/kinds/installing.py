"""Puts the kinds of calotype, of KubeRay and of Prometheus into a cluster, once in its life."""

from __future__ import annotations

from pathlib import Path

from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from controlplane.kuberay.schema import definitions

ROOT = Path(__file__).resolve().parents[3]

POD_MONITORS: Object = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "podmonitors.monitoring.coreos.com"},
    "spec": {
        "group": "monitoring.coreos.com",
        "names": {"kind": "PodMonitor", "plural": "podmonitors", "singular": "podmonitor"},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


def install_kinds(cluster: Cluster) -> None:
    """Our kinds, KubeRay's and Prometheus' PodMonitor."""
    for path in sorted((ROOT / "operator" / "api" / "crds").glob("*.yaml")):
        cluster.apply(path, "--server-side", "--force-conflicts")
    for definition in [*definitions(), POD_MONITORS]:
        cluster.apply(definition, "--server-side", "--force-conflicts")
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")

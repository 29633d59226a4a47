"""The Services of Ray clusters and of RayServices, as KubeRay makes them."""

from controlplane.client.objects import Object
from controlplane.kuberay.pods import METRICS_PORT, head_service_name, owner

NAMES = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}


def head_service(cluster: Object, holder: Object | None = None) -> Object:
    """The headless Service of a cluster's head; of a RayService or RayJob where `holder` is one."""
    document = holder or cluster
    name = cluster["metadata"]["name"]
    selector = NAMES | {
        "ray.io/cluster": name,
        "ray.io/identifier": f"{name}-head",
        "ray.io/node-type": "head",
    }
    ports = {_port_name(one): int(one["containerPort"]) for one in _head_ports(cluster)}
    service = _service(document, head_service_name(document["metadata"]["name"]), selector)
    service["metadata"]["annotations"] = cluster["spec"].get("headServiceAnnotations", {})
    service["spec"] |= {"clusterIP": "None", "publishNotReadyAddresses": True}
    service["spec"]["ports"] = _ports(ports | {"metrics": METRICS_PORT})
    return service


def serve_service(holder: Object, cluster: Object) -> Object | None:
    """The Service for the traffic, or None where the head has no port named serve."""
    ports = {
        name: int(one["containerPort"])
        for one in _head_ports(cluster)
        if (name := _port_name(one)).startswith("serve")
    }
    if not ports:
        return None
    selector = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/serve": "true"}
    service = _service(holder, f"{holder['metadata']['name']}-serve-svc", selector)
    service["spec"]["ports"] = _ports(ports)
    return service


def _service(document: Object, name: str, selector: dict[str, str]) -> Object:
    meta = document["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {"ray.io/originated-from-cr-name": meta["name"]}
            | {"ray.io/originated-from-crd": document["kind"]},
            "ownerReferences": [owner(document)],
        },
        "spec": {"selector": selector, "type": "ClusterIP"},
    }


def _ports(ports: dict[str, int]) -> list[Object]:
    return [
        {"name": name, "port": port, "targetPort": port, "protocol": "TCP", "appProtocol": "tcp"}
        for name, port in sorted(ports.items())
    ]


def _head_ports(cluster: Object) -> list[Object]:
    template = cluster["spec"]["headGroupSpec"]["template"]
    return list(template["spec"]["containers"][0].get("ports", []))


def _port_name(port: Object) -> str:
    return str(port.get("name") or f"{port['containerPort']}-port")

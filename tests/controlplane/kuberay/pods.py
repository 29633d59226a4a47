"""The pods of a Ray cluster, as KubeRay makes them: from specifications to manifests."""

import copy
import math

from controlplane.client.objects import Object
from controlplane.node.pods import quantity

GCS_PORT, DASHBOARD_PORT, AGENT_PORT, METRICS_PORT, SERVE_PORT = 6379, 8265, 52365, 8080, 8000
# Start parameters that are flags: ray takes no value after them.
FLAGS = ("block", "no-monitor", "disable-usage-stats", "include-log-monitor")
SERVICE_ENV = {
    "RAY_timeout_ms_task_wait_for_death_info": "0",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
}
# KubeRay runs `ray health-check` every 5 s, which takes 3 s of CPU each time.
WAIT_FOR_GCS = """
until (exec 3<>/dev/tcp/{host}/{port}) 2>/dev/null; do
  echo waiting for {host}
  sleep 0.5
done
"""


def head_service_name(cluster: str) -> str:
    return f"{cluster}-head-svc"


def labels(cluster: Object, kind: str, group: str) -> dict[str, str]:
    """The labels of a pod of this node type ("head" or "worker") and group."""
    name = cluster["metadata"]["name"]
    return {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        "ray.io/cluster": name,
        "ray.io/group": group,
        "ray.io/identifier": f"{name}-{kind}",
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": kind,
    }


def head_pod(cluster: Object) -> Object:
    """The manifest of the head; its name is made by the API server."""
    spec = cluster["spec"]
    group = spec["headGroupSpec"]
    pod = _pod(cluster, group, "head", "headgroup", "head")
    container = pod["spec"]["containers"][0]
    parameters = {"dashboard-host": "0.0.0.0", **group.get("rayStartParams", {})}
    autoscaling = bool(spec.get("enableInTreeAutoscaling"))
    if autoscaling:
        parameters["no-monitor"] = "true"
    _ray(cluster, container, "head", f"127.0.0.1:{GCS_PORT}", parameters)
    # The head of a service takes part in its traffic only once its proxy answers.
    if _of_service(cluster):
        pod["metadata"]["labels"]["ray.io/serve"] = "false"
    _probes(container, worker_of_service=False)
    if autoscaling:
        _add_autoscaler(cluster, pod, container)
    return pod


def worker_pod(cluster: Object, group: Object, index: int) -> Object:
    """The manifest of a worker of a group."""
    pod = _pod(cluster, group, "worker", group["groupName"], f"{group['groupName']}-worker")
    pod["metadata"]["labels"]["ray.io/worker-group-replica-index"] = str(index)
    container = pod["spec"]["containers"][0]
    meta = cluster["metadata"]
    host = f"{head_service_name(meta['name'])}.{meta['namespace']}.svc.cluster.local"
    address = f"{host}:{GCS_PORT}"
    parameters = {"address": address, **group.get("rayStartParams", {})}
    _ray(cluster, container, "worker", address, parameters)
    _set_env(container, {"FQ_RAY_IP": host, "RAY_IP": host.split(".")[0]})
    if _of_service(cluster):
        pod["metadata"]["labels"]["ray.io/serve"] = "true"
    _probes(container, worker_of_service=_of_service(cluster))
    kept = ("image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext")
    waiter = {name: copy.deepcopy(container[name]) for name in kept if name in container}
    waiter |= {"name": "wait-gcs-ready", "command": ["/bin/bash", "-c", "--"]}
    waiter["args"] = [WAIT_FOR_GCS.format(host=host, port=GCS_PORT)]
    waiter["resources"] = {"limits": {"cpu": "200m", "memory": "256Mi"}}
    pod["spec"].setdefault("initContainers", []).append(waiter)
    return pod


def ray_container(pod: Object) -> Object:
    """The container of a pod in which Ray runs: the first."""
    return dict(pod["spec"]["containers"][0])


def start_command(kind: str, container: Object, parameters: dict[str, str]) -> str:
    """`ray start` with what KubeRay adds; sizes come from the limits unless they are given."""
    limits = container.get("resources", {}).get("limits", {})
    sizes: dict[str, str] = {}
    if "cpu" in limits:
        sizes["num-cpus"] = str(math.ceil(quantity.parse(limits["cpu"])))
    if "memory" in limits:
        sizes["memory"] = str(int(quantity.parse(limits["memory"])))
    gpus = [value for name, value in limits.items() if name.endswith("gpu")]
    if gpus:
        sizes["num-gpus"] = str(int(quantity.parse(gpus[0])))
    fixed = {"dashboard-agent-listen-port": str(AGENT_PORT), "metrics-export-port": "8080"}
    words = ["ray start", *(["--head"] if kind == "head" else []), "--block"]
    for name, value in sorted({**sizes, **fixed, **parameters}.items()):
        if name not in FLAGS:
            words.append(f"--{name}={value}")
        elif value == "true" and name != "block":
            words.append(f"--{name}")
    return " ".join(words)


def _pod(cluster: Object, group: Object, kind: str, group_name: str, part: str) -> Object:
    template = copy.deepcopy(group["template"])
    meta, spec = template.get("metadata") or {}, template["spec"]
    name = cluster["metadata"]["name"]
    spec.setdefault("restartPolicy", "Always")
    container = spec["containers"][0]
    memory = container.get("resources", {}).get("limits", {}).get("memory")
    mounts = container.setdefault("volumeMounts", [])
    if not any(mount["mountPath"] == "/dev/shm" for mount in mounts):
        size = {"sizeLimit": memory} if memory else {}
        volume = {"name": "shared-mem", "emptyDir": {"medium": "Memory", **size}}
        spec.setdefault("volumes", []).append(volume)
        mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})
    ports = container.setdefault("ports", [])
    if not any(port.get("name") == "metrics" for port in ports):
        ports.append({"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{name}-{part}-",
            "namespace": cluster["metadata"]["namespace"],
            "labels": {**(meta.get("labels") or {}), **labels(cluster, kind, group_name)},
            "annotations": meta.get("annotations") or {},
            "ownerReferences": [owner(cluster)],
        },
        "spec": spec,
    }


def owner(document: Object) -> Object:
    """The owner reference of a controller."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": document["kind"],
        "name": document["metadata"]["name"],
        "uid": document["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _ray(
    cluster: Object, container: Object, kind: str, address: str, parameters: dict[str, str]
) -> None:
    command = start_command(kind, container, parameters)
    given = " ".join([*container.get("command", []), *container.get("args", [])])
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = ["ulimit -n 65536; " + (f"{given} && {command}" if given else command)]
    label = "metadata.labels['ray.io/{}']"
    for name, path in (
        ("RAY_CLUSTER_NAME", label.format("cluster")),
        ("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        ("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        ("RAY_NODE_TYPE_NAME", label.format("group")),
    ):
        _set_field(container, name, path)
    values = {
        "RAY_PORT": str(GCS_PORT),
        "RAY_ADDRESS": address,
        "KUBERAY_GEN_RAY_START_CMD": command,
    }
    values |= {"RAY_USAGE_STATS_KUBERAY_IN_USE": "1", "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1"}
    _set_env(container, {**values, **(SERVICE_ENV if _of_service(cluster) else {})})


def _of_service(cluster: Object) -> bool:
    owners = cluster["metadata"].get("ownerReferences", [])
    return any(one["kind"] == "RayService" for one in owners)


def _set_env(container: Object, values: dict[str, str]) -> None:
    """Adds variables; what the template says stays."""
    env = container.setdefault("env", [])
    known = {one["name"] for one in env}
    env += [{"name": name, "value": value} for name, value in values.items() if name not in known]


def _set_field(container: Object, name: str, path: str) -> None:
    env = container.setdefault("env", [])
    if all(one["name"] != name for one in env):
        env.append({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})


def _probes(container: Object, worker_of_service: bool) -> None:
    health = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}, "periodSeconds": 5}
    if worker_of_service:
        check = f"wget --tries 1 -T 2 -q -O- http://localhost:{AGENT_PORT}/api/local_raylet_healthz"
        serve = f"wget --tries 1 -T 2 -q -O- http://localhost:{_port(container)}/-/healthz"
        command = f"{check} | grep success && {serve} | grep success"
        readiness: Object = {"exec": {"command": ["bash", "-c", command]}, "failureThreshold": 1}
        readiness |= {"initialDelaySeconds": 10, "periodSeconds": 5, "timeoutSeconds": 5}
    else:
        readiness = {**health, "initialDelaySeconds": 10, "failureThreshold": 10}
        readiness["timeoutSeconds"] = 2
    liveness = {**health, "initialDelaySeconds": 30, "failureThreshold": 120, "timeoutSeconds": 2}
    container.setdefault("livenessProbe", liveness)
    container.setdefault("readinessProbe", readiness)


def _port(container: Object) -> int:
    ports = container.get("ports", [])
    return next((p["containerPort"] for p in ports if p.get("name") == "serve"), SERVE_PORT)


def _add_autoscaler(cluster: Object, pod: Object, container: Object) -> None:
    """Ray's own autoscaler beside the head; it reads Ray's log folder, and patches the RayCluster
    with the rights that the controller gives to the pod's account."""
    spec, options = pod["spec"], cluster["spec"].get("autoscalerOptions") or {}
    spec.setdefault("serviceAccountName", cluster["metadata"]["name"])
    mount = {"name": "ray-logs", "mountPath": "/tmp/ray"}
    if not any(one["mountPath"] == "/tmp/ray" for one in container["volumeMounts"]):
        spec.setdefault("volumes", []).append({"name": "ray-logs", "emptyDir": {}})
        container["volumeMounts"].append(mount)
    sidecar: Object = {
        "name": "autoscaler",
        "image": options.get("image") or container["image"],
        "command": ["/bin/bash", "-c", "--"],
        "args": [
            "ray kuberay-autoscaler --cluster-name $(RAY_CLUSTER_NAME)"
            " --cluster-namespace $(RAY_CLUSTER_NAMESPACE)"
        ],
        "env": list(options.get("env", [])),
        "envFrom": list(options.get("envFrom", [])),
        "volumeMounts": [mount, *options.get("volumeMounts", [])],
        "resources": options.get("resources")
        or {"limits": {"cpu": "500m", "memory": "512Mi"}, "requests": {"cpu": "500m"}},
    }
    for name in ("imagePullPolicy", "securityContext"):
        if value := options.get(name) or container.get(name):
            sidecar[name] = value
    _set_field(sidecar, "RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']")
    _set_field(sidecar, "RAY_CLUSTER_NAMESPACE", "metadata.namespace")
    _set_field(sidecar, "RAY_HEAD_POD_NAME", "metadata.name")
    _set_env(sidecar, {"KUBERAY_CRD_VER": "v1"})
    if options.get("version") == "v2":
        spec["restartPolicy"] = "Never"
        for one in (container, sidecar):
            _set_env(one, {"RAY_enable_autoscaler_v2": "1"})
    spec["containers"].append(sidecar)

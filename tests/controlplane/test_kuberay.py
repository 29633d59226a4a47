"""KubeRay's part of the world, with real Ray: a RayService, its changes, and a RayJob."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

import httpx
import pytest
import yaml
from controlplane.cluster import Object
from controlplane.kuberay import pods, rayservices
from controlplane.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

APPLICATION = """
from ray import serve

@serve.deployment
class Greeter:
    def __init__(self):
        import os
        self.word, self.process = "", os.getpid()

    def reconfigure(self, config):
        self.word = config["word"]

    def __call__(self, request):
        return {"word": self.word, "process": self.process}

app = Greeter.bind()
"""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "PYTHONPATH": "/app",
    "OMP_NUM_THREADS": "1",
}
HEALTH = {"httpGet": {"path": "/api/healthz", "port": 52365}, "periodSeconds": 1}


def ray_pod(world: World, **ports: int) -> Object:
    container = {
        "name": "ray",
        "image": world.image("calotype-serve"),
        "env": [{"name": name, "value": value} for name, value in QUIET.items()],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"limits": {"cpu": "1", "memory": "2Gi"}},
        "volumeMounts": [{"name": "app", "mountPath": "/app"}],
        "readinessProbe": {**HEALTH, "timeoutSeconds": 5},
    }
    spec = {"terminationGracePeriodSeconds": 5, "containers": [container]}
    spec["volumes"] = [{"name": "app", "configMap": {"name": "app"}}]
    return {"spec": spec}


def cluster(world: World, workers: int) -> Object:
    small = {"object-store-memory": "100000000"}
    head = {"rayStartParams": {**small, "num-cpus": "1"}}
    head["template"] = ray_pod(world, gcs=6379, dashboard=8265, serve=8000)
    group = {"groupName": "workers", "rayStartParams": small, "template": ray_pod(world)}
    group |= {"replicas": workers, "minReplicas": 0, "maxReplicas": 2}
    return {"rayVersion": "2.60.0", "headGroupSpec": head, "workerGroupSpecs": [group]}


def service(world: World, word: str, workers: int = 0) -> Object:
    deployment = {"name": "Greeter", "user_config": {"word": word}}
    deployment["ray_actor_options"] = {"num_cpus": 0.1}
    application = {"name": "greeter", "route_prefix": "/", "import_path": "greeter:app"}
    config = {"applications": [{**application, "deployments": [deployment]}]}
    spec = {"serveConfigV2": yaml.safe_dump(config), "rayClusterConfig": cluster(world, workers)}
    spec["rayClusterDeletionDelaySeconds"] = 1
    meta = {"name": "greeter"}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": meta, "spec": spec}


def install_application(world: World, namespace: str) -> None:
    meta = {"name": "app"}
    code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
    world.create({**code, "data": {"greeter.py": APPLICATION}}, namespace)


def of_cluster(world: World, name: str, namespace: str) -> list[Object]:
    return world.items("pods", namespace, f"ray.io/cluster={name}")


def ask(url: str) -> Any:
    """The application's answer, or None where nobody took the call."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=30).json()


@pytest.fixture
def ray_namespace(world: World) -> Any:
    with world.namespace(labels={}) as name:
        yield name


def test_a_ray_service_serves_and_takes_changes_without_a_restart(
    world: World, ray_namespace: str
) -> None:
    install_application(world, ray_namespace)
    world.apply(service(world, "first"), "-n", ray_namespace)
    found = world.wait("rayservice", "greeter", "Ready", ray_namespace, 300)
    status = found["status"]
    name = status["activeServiceStatus"]["rayClusterName"]
    assert status["pendingServiceStatus"] == {}
    assert status["activeServiceStatus"]["applicationStatuses"]["greeter"]["status"] == "RUNNING"

    with world.forward("svc/greeter-serve-svc", 8000, ray_namespace) as url:
        # Ready says that there is an endpoint; the node may hear of it a moment later.
        first = world.until(lambda: ask(url), "the application answers")
        assert first["word"] == "first"
        world.apply(service(world, "second"), "-n", ray_namespace)
        second = {**first, "word": "second"}  # by the same process
        world.until(lambda: ask(url) == second, "the changed configuration is served")

    # As in KubeRay, a number of workers changed in the RayService does not reach its cluster.
    world.apply(service(world, "second", workers=1), "-n", ray_namespace)
    seen = lambda one: one["status"]["observedGeneration"] == one["metadata"]["generation"]  # noqa: E731
    found = world.wait("rayservice", "greeter", seen, ray_namespace)
    assert found["status"]["activeServiceStatus"]["rayClusterName"] == name
    assert len(of_cluster(world, name, ray_namespace)) == 1
    # A change of the cluster itself does: a worker joins the running Ray.
    groups = world.get("raycluster", name, ray_namespace)["spec"]["workerGroupSpecs"]
    groups[0]["replicas"] = 1
    world.patch("raycluster", name, {"spec": {"workerGroupSpecs": groups}}, ray_namespace)
    complete = lambda one: one["status"].get("readyWorkerReplicas") == 1  # noqa: E731
    world.wait("raycluster", name, complete, ray_namespace, 120)

    processes = [
        world.pid(pod["metadata"]["name"], ray_namespace)
        for pod in of_cluster(world, name, ray_namespace)
    ]
    assert len(processes) == 2
    world.delete("rayservice", "greeter", ray_namespace)
    world.wait_gone("rayservice", "greeter", ray_namespace)
    gone = lambda: not of_cluster(world, name, ray_namespace)  # noqa: E731
    world.until(gone, "the pods of the deleted RayService are gone", 60)
    assert world.items("services", ray_namespace) == []


def test_a_ray_job_runs_on_a_cluster_of_its_own(world: World, ray_namespace: str) -> None:
    install_application(world, ray_namespace)
    entrypoint = "python -c \"import ray; ray.init(); print('answer', 6 * 7)\""
    spec = {"entrypoint": entrypoint, "rayClusterSpec": cluster(world, 0)}
    spec |= {"shutdownAfterJobFinishes": True}
    meta = {"name": "answer"}
    document = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": spec}
    world.apply(document, "-n", ray_namespace)
    ended = lambda one: one.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")  # noqa: E731
    found = world.wait("rayjob", "answer", ended, ray_namespace, 240)
    assert found["status"]["jobStatus"] == "SUCCEEDED", json.dumps(found["status"])
    [submitter] = world.items("pods", ray_namespace, "batch.kubernetes.io/job-name=answer")
    world.wait("job", "answer", "Complete", ray_namespace)
    assert "answer 42" in world.logs(submitter["metadata"]["name"], ray_namespace)
    name = found["status"]["rayClusterName"]
    world.wait_gone("raycluster", name, ray_namespace)


def test_ray_starts_with_what_its_limits_say() -> None:
    container = {"resources": {"limits": {"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": "4"}}}
    words = pods.start_command("worker", container, {"num-cpus": "8", "address": "head:6379"})
    assert words == (
        "ray start --block --address=head:6379 --dashboard-agent-listen-port=52365"
        " --memory=2147483648 --metrics-export-port=8080 --num-cpus=8 --num-gpus=4"
    )


def test_only_what_kuberay_cannot_change_makes_another_cluster() -> None:
    group = {
        "groupName": "a",
        "replicas": 1,
        "template": {"spec": {"containers": [{"image": "1"}]}},
    }
    spec = {"headGroupSpec": {"template": {"spec": {"containers": [{}]}}}}
    spec["workerGroupSpecs"] = [group]
    before = rayservices.fingerprint(spec)
    group["replicas"], group["maxReplicas"] = 5, 9
    group["template"]["spec"]["tolerations"] = [{"operator": "Exists"}]
    assert rayservices.fingerprint(spec) == before
    spec["workerGroupSpecs"].append({**group, "groupName": "b"})
    assert rayservices.fingerprint(spec) != before
    assert rayservices.fingerprint(spec, 1) == before
    group["template"]["spec"]["containers"][0]["image"] = "2"
    assert rayservices.fingerprint(spec, 1) != before


def test_a_changed_cluster_is_replaced_without_a_lost_request_and_suspended_to_nothing(
    world: World, ray_namespace: str
) -> None:
    install_application(world, ray_namespace)
    document = service(world, "first")
    world.apply(document, "-n", ray_namespace)
    found = world.wait("rayservice", "greeter", "Ready", ray_namespace, 300)
    old = found["status"]["activeServiceStatus"]["rayClusterName"]
    assert found["metadata"]["generation"] == 2  # its defaults were written into it
    # A new controller does not know what Serve was told; telling it again changes nothing.
    world.plane.restart("kuberay", signal.SIGKILL)

    with world.forward("svc/greeter-serve-svc", 8000, ray_namespace) as url:
        world.until(lambda: ask(url), "the application answers")
        head = document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
        head["containers"][0]["env"].append({"name": "CHANGED", "value": "1"})
        world.apply(document, "-n", ray_namespace)
        upgrading = world.wait("rayservice", "greeter", "UpgradeInProgress", ray_namespace)
        new = upgrading["status"]["pendingServiceStatus"]["rayClusterName"]
        answers = []

        def switched() -> bool:
            answers.append(ask(url))
            status = world.get("rayservice", "greeter", ray_namespace)["status"]
            return status["activeServiceStatus"]["rayClusterName"] == new

        world.until(switched, "the new cluster has the traffic", 300)
        assert {(answer or {}).get("word") for answer in answers} == {"first"}
    world.wait_gone("raycluster", old, ray_namespace)

    world.patch("rayservice", "greeter", {"spec": {"suspend": True}}, ray_namespace)
    found = world.wait("rayservice", "greeter", "Suspended", ray_namespace)
    assert found["status"]["activeServiceStatus"] == {}
    nothing = lambda: not world.items("pods", ray_namespace)  # noqa: E731
    world.until(nothing, "the pods of the suspended RayService are gone")
    assert world.find("service", "greeter-serve-svc", ray_namespace) is None


def test_ray_s_own_autoscaler_asks_for_a_worker_and_gets_it(
    world: World, ray_namespace: str
) -> None:
    install_application(world, ray_namespace)
    document = service(world, "wide")
    config = document["spec"]["rayClusterConfig"]
    config |= {"enableInTreeAutoscaling": True}
    config["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 5}
    config["headGroupSpec"]["rayStartParams"]["num-cpus"] = "0"  # the replica needs a worker
    world.apply(document, "-n", ray_namespace)
    found = world.wait("rayservice", "greeter", "Ready", ray_namespace, 400)
    name = found["status"]["activeServiceStatus"]["rayClusterName"]
    [group] = world.get("raycluster", name, ray_namespace)["spec"]["workerGroupSpecs"]
    assert group["replicas"] == 1
    with world.forward("svc/greeter-serve-svc", 8000, ray_namespace) as url:
        world.until(lambda: ask(url), "the application answers")
    used = {call["user"]["username"] for call in world.plane.audit() if call["verb"] == "patch"}
    assert f"system:serviceaccount:{ray_namespace}:{name}" in used

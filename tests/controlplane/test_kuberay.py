"""KubeRay's part of the pod_cluster, with real Ray: a RayService, its changes, and a RayJob."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from controlplane.client.objects import Object
from controlplane.kuberay import pods, rayservices
from controlplane.processes.pod_cluster import PodCluster

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
PATIENCE = 400.0
"""Seconds for a Ray cluster to start on a machine that is busy with others."""
HEALTH = {"httpGet": {"path": "/api/healthz", "port": 52365}, "periodSeconds": 1}


def ray_pod(pod_cluster: PodCluster, **ports: int) -> Object:
    container: Object = {
        "name": "ray",
        "image": pod_cluster.image("calotype-serve"),
        "env": [{"name": name, "value": value} for name, value in QUIET.items()],
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": {"limits": {"cpu": "1", "memory": "2Gi"}},
        "volumeMounts": [{"name": "app", "mountPath": "/app"}],
        "readinessProbe": {**HEALTH, "timeoutSeconds": 5},
    }
    spec = {"terminationGracePeriodSeconds": 5, "containers": [container]}
    spec["volumes"] = [{"name": "app", "configMap": {"name": "app"}}]
    return {"spec": spec}


def cluster(pod_cluster: PodCluster, workers: int) -> Object:
    small = {"object-store-memory": "100000000"}
    head: Object = {"rayStartParams": {**small, "num-cpus": "1"}}
    head["template"] = ray_pod(pod_cluster, gcs=6379, dashboard=8265, serve=8000)
    group: Object = {
        "groupName": "workers",
        "rayStartParams": small,
        "template": ray_pod(pod_cluster),
    }
    group |= {"replicas": workers, "minReplicas": 0, "maxReplicas": 2}
    return {"rayVersion": "2.60.0", "headGroupSpec": head, "workerGroupSpecs": [group]}


def service(pod_cluster: PodCluster, word: str, workers: int = 0) -> Object:
    deployment = {"name": "Greeter", "user_config": {"word": word}}
    deployment["ray_actor_options"] = {"num_cpus": 0.1}
    application = {"name": "greeter", "route_prefix": "/", "import_path": "greeter:app"}
    config = {"applications": [{**application, "deployments": [deployment]}]}
    spec: Object = {
        "serveConfigV2": yaml.safe_dump(config),
        "rayClusterConfig": cluster(pod_cluster, workers),
    }
    spec["rayClusterDeletionDelaySeconds"] = 5  # a request that the old cluster took ends there
    meta = {"name": "greeter"}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": meta, "spec": spec}


def of_cluster(pod_cluster: PodCluster, name: str, namespace: str) -> list[Object]:
    return pod_cluster.items("pods", namespace, f"ray.io/cluster={name}")


def ask(url: str) -> Any:
    """The application's answer, or None where nobody took the call. Late is not lost."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=120).json()


@pytest.fixture(scope="module")
def ray_namespace(pod_cluster: PodCluster) -> Iterator[str]:
    """A namespace in which pods of Ray may run, with the application for them."""
    with pod_cluster.namespace(labels={}) as name:
        code = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "app"}}
        pod_cluster.create({**code, "data": {"greeter.py": APPLICATION}}, name)
        yield name


@pytest.fixture(scope="module")
def greeter(pod_cluster: PodCluster, ray_namespace: str) -> Object:
    """A RayService that is Ready, as it was then. The tests change it one after another."""
    pod_cluster.apply_objects(service(pod_cluster, "first"), namespace=ray_namespace)
    return pod_cluster.wait("rayservice", "greeter", "Ready", ray_namespace, PATIENCE)


def test_a_ray_service_is_ready_when_its_application_runs(greeter: Object) -> None:
    status = greeter["status"]
    assert status["pendingServiceStatus"] == {}
    assert status["activeServiceStatus"]["applicationStatuses"]["greeter"]["status"] == "RUNNING"
    assert greeter["metadata"]["generation"] == 2  # its defaults were written into it


def test_a_changed_configuration_needs_no_restart(
    pod_cluster: PodCluster, ray_namespace: str, greeter: Object
) -> None:
    with pod_cluster.forward("svc/greeter-serve-svc", 8000, ray_namespace) as url:
        # Ready says that there is an endpoint; the node may hear of it a moment later.
        first = pod_cluster.until(lambda: ask(url), "the application answers")
        assert first["word"] == "first"
        pod_cluster.apply_objects(service(pod_cluster, "second"), namespace=ray_namespace)
        second = {**first, "word": "second"}  # by the same process
        pod_cluster.until(lambda: ask(url) == second, "the changed configuration is served")


def test_workers_are_added_in_the_ray_cluster_and_not_in_the_ray_service(
    pod_cluster: PodCluster, ray_namespace: str, greeter: Object
) -> None:
    name = greeter["status"]["activeServiceStatus"]["rayClusterName"]
    # As in KubeRay, a number of workers changed in the RayService does not reach its cluster.
    pod_cluster.apply_objects(service(pod_cluster, "second", workers=1), namespace=ray_namespace)
    seen = lambda one: one["status"]["observedGeneration"] == one["metadata"]["generation"]  # noqa: E731
    found = pod_cluster.wait("rayservice", "greeter", seen, ray_namespace)
    assert found["status"]["activeServiceStatus"]["rayClusterName"] == name
    assert len(of_cluster(pod_cluster, name, ray_namespace)) == 1
    # A change of the cluster itself does: a worker joins the running Ray.
    groups = pod_cluster.get("raycluster", name, ray_namespace)["spec"]["workerGroupSpecs"]
    groups[0]["replicas"] = 1
    pod_cluster.patch("raycluster", name, {"spec": {"workerGroupSpecs": groups}}, ray_namespace)
    complete = lambda one: one["status"].get("readyWorkerReplicas") == 1  # noqa: E731
    pod_cluster.wait("raycluster", name, complete, ray_namespace, PATIENCE)
    assert len(of_cluster(pod_cluster, name, ray_namespace)) == 2


def test_a_changed_cluster_is_replaced_while_callers_that_repeat_are_answered(
    pod_cluster: PodCluster, ray_namespace: str, greeter: Object
) -> None:
    old = greeter["status"]["activeServiceStatus"]["rayClusterName"]
    # A new controller does not know what Serve was told; telling it again changes nothing.
    pod_cluster.processes.restart("kuberay", signal.SIGKILL)
    document = service(pod_cluster, "second")
    head = document["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["env"].append({"name": "CHANGED", "value": "1"})
    with pod_cluster.forward("svc/greeter-serve-svc", 8000, ray_namespace) as url:
        pod_cluster.until(lambda: ask(url), "the application answers")
        pod_cluster.apply_objects(document, namespace=ray_namespace)
        upgrading = pod_cluster.wait("rayservice", "greeter", "UpgradeInProgress", ray_namespace)
        new = upgrading["status"]["pendingServiceStatus"]["rayClusterName"]
        answers = []

        def switched() -> bool:
            # For a moment nobody has the traffic: a Service and its endpoints change one by one.
            answers.append(pod_cluster.until(lambda: ask(url), "a call is answered when repeated"))
            status = pod_cluster.get("rayservice", "greeter", ray_namespace)["status"]
            return bool(status["activeServiceStatus"]["rayClusterName"] == new)

        pod_cluster.until(switched, "the new cluster has the traffic", PATIENCE)
        assert {answer["word"] for answer in answers} == {"second"}
    pod_cluster.wait_gone("raycluster", old, ray_namespace)


def test_a_suspended_service_has_nothing_that_runs(
    pod_cluster: PodCluster, ray_namespace: str, greeter: Object
) -> None:
    pod_cluster.patch("rayservice", "greeter", {"spec": {"suspend": True}}, ray_namespace)
    found = pod_cluster.wait("rayservice", "greeter", "Suspended", ray_namespace)
    assert found["status"]["activeServiceStatus"] == {}
    nothing = lambda: not pod_cluster.items("pods", ray_namespace)  # noqa: E731
    pod_cluster.until(nothing, "the pods of the suspended RayService are gone")
    assert pod_cluster.find("service", "greeter-serve-svc", ray_namespace) is None


def test_a_ray_job_runs_on_a_cluster_of_its_own(
    pod_cluster: PodCluster, ray_namespace: str
) -> None:
    entrypoint = "python -c \"import ray; ray.init(); print('answer', 6 * 7)\""
    spec: Object = {"entrypoint": entrypoint, "rayClusterSpec": cluster(pod_cluster, 0)}
    spec |= {"shutdownAfterJobFinishes": True}
    meta = {"name": "answer"}
    document = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": spec}
    pod_cluster.apply_objects(document, namespace=ray_namespace)
    ended = lambda one: one.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")  # noqa: E731
    found = pod_cluster.wait("rayjob", "answer", ended, ray_namespace, PATIENCE)
    assert found["status"]["jobStatus"] == "SUCCEEDED", json.dumps(found["status"])
    [submitter] = pod_cluster.items("pods", ray_namespace, "batch.kubernetes.io/job-name=answer")
    pod_cluster.wait("job", "answer", "Complete", ray_namespace)
    assert "answer 42" in pod_cluster.logs(submitter["metadata"]["name"], ray_namespace)
    name = found["status"]["rayClusterName"]
    pod_cluster.wait_gone("raycluster", name, ray_namespace)


def test_ray_starts_with_what_its_limits_say() -> None:
    container = {"resources": {"limits": {"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": "4"}}}
    words = pods.start_command("worker", container, {"num-cpus": "8", "address": "head:6379"})
    assert words == (
        "ray start --block --address=head:6379 --dashboard-agent-listen-port=52365"
        " --memory=2147483648 --metrics-export-port=8080 --num-cpus=8 --num-gpus=4"
    )


def test_only_what_kuberay_cannot_change_makes_another_cluster() -> None:
    group: Object = {
        "groupName": "a",
        "replicas": 1,
        "template": {"spec": {"containers": [{"image": "1"}]}},
    }
    spec: Object = {"headGroupSpec": {"template": {"spec": {"containers": [{}]}}}}
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

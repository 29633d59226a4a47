"""The pod_cluster as a whole: its end, and what happens when parts of it are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import pytest
from controlplane.client.commands import CommandFailed
from controlplane.client.objects import Object
from controlplane.processes.pod_cluster import PodCluster, start_pod_cluster

pytestmark = pytest.mark.cluster

# A process that leaves its parent and its session, as a daemon does.
SERVER = "setsid sleep 3600 & exec python -m http.server 8000"


def server(pod_cluster: PodCluster, name: str) -> list[Object]:
    """A pod that answers on port 8000, and its Service."""
    container: Object = {"name": "main", "image": pod_cluster.image("calotype-gateway")}
    container |= {"command": ["bash", "-c", SERVER]}
    container["readinessProbe"] = {"httpGet": {"port": 8000}, "periodSeconds": 1}
    meta = {"name": name, "labels": {"app": name}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container]}}
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8000}]}
    return [pod, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}]


def processes(network: str) -> set[int]:
    """Every process of a network namespace."""
    found = set()
    for one in Path("/proc").iterdir():
        try:
            if one.name.isdigit() and os.readlink(one / "ns/net") == network:
                found.add(int(one.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def test_a_pod_cluster_ends_without_a_trace(
    cluster_binaries: dict[str, Path], tmp_path: Path
) -> None:
    if "etcd" not in cluster_binaries:
        pytest.skip("a cluster that is not ours is not started by the tests")
    try:
        with start_pod_cluster(cluster_binaries, tmp_path) as pod_cluster:
            pod_cluster.apply(server(pod_cluster, "web"))
            pod_cluster.wait("pod", "web", "Ready")
            pid, holder = pod_cluster.pid("web"), pod_cluster.processes.children["etcd"].pid
            networks = [os.readlink(f"/proc/{one}/ns/net") for one in (pid, holder)]
            assert all(len(processes(one)) >= 2 for one in networks)
    except PermissionError as refused:
        pytest.skip(str(refused))
    assert [processes(one) for one in networks] == [set(), set()]
    assert not any((tmp_path / "scratch").iterdir())
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_pods_die_with_a_killed_node_and_run_again_with_it(
    pod_cluster: PodCluster, pod_namespace: str
) -> None:
    label = "pod-security.kubernetes.io/enforce=privileged"
    pod_cluster.kubectl("label", "namespace", pod_namespace, label, "--overwrite")
    pod_cluster.apply(server(pod_cluster, "web"), "-n", pod_namespace)
    pod_cluster.wait("pod", "web", "Ready", pod_namespace)
    before = pod_cluster.pid("web", pod_namespace)
    network = os.readlink(f"/proc/{before}/ns/net")

    pod_cluster.processes.children["node"].signal(signal.SIGKILL)
    pod_cluster.until(lambda: not processes(network), "the killed node's processes are gone")
    pod_cluster.processes.restart("node")
    pod_cluster.processes.restart("kube-apiserver", signal.SIGKILL)
    with pod_cluster.forward("svc/web", 80, pod_namespace) as url:
        pod_cluster.until(lambda: answers(url), "the pod answers again, through its Service")
    assert pod_cluster.pid("web", pod_namespace) != before


CRASHING = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: crashing}
spec:
  selector: {matchLabels: {app: crashing}}
  template:
    metadata: {labels: {app: crashing}}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      containers:
        - name: main
          image: tools
          command: [bash, -c, echo there is no configuration; exit 1]
          readinessProbe: {exec: {command: ["false"]}}
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


def test_a_helm_install_that_fails_says_what_its_pods_say(
    pod_cluster: PodCluster, pod_namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: crashing\nversion: 0.1.0\n")
    (tmp_path / "templates" / "deployment.yaml").write_text(CRASHING)
    with pytest.raises(CommandFailed) as failed:
        pod_cluster.helm(
            "install", "crashing", tmp_path, "-n", pod_namespace, "--wait", "--timeout", "8s"
        )
    text = str(failed.value)
    assert f"--- pod {pod_namespace}/crashing-" in text
    assert "there is no configuration" in text
    assert "BackOff" in text  # an event of the pod


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False

"""The control plane of the tests: what the other tests rely on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from controlplane.client.cluster import Cluster
from controlplane.client.commands import CommandFailed
from controlplane.client.objects import Object
from controlplane.processes.control_plane import ControlPlane
from controlplane.processes.fake_nodes import FakeNodes

pytestmark = pytest.mark.cluster

ROOT_POD = """
apiVersion: v1
kind: Pod
metadata: {name: root}
spec:
  containers:
    - {name: main, image: anything, securityContext: {privileged: true}}
"""
DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: trainers}
spec:
  replicas: 3
  selector: {matchLabels: {app: trainers}}
  template:
    metadata: {labels: {app: trainers}}
    spec:
      securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
      tolerations: [{key: nvidia.com/gpu, operator: Exists}]
      containers:
        - name: main
          image: anything
          resources: {limits: {nvidia.com/gpu: 4}}
          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


def ready(replicas: int) -> Callable[[Object], bool]:
    return lambda found: found.get("status", {}).get("readyReplicas") == replicas


def test_a_control_plane_ends_without_a_trace(
    cluster_binaries: dict[str, Path], tmp_path: Path
) -> None:
    if "etcd" not in cluster_binaries:
        pytest.skip("a cluster that is not ours is not started by the tests")
    control_plane = ControlPlane(cluster_binaries, tmp_path)
    control_plane.start()
    processes = [psutil.Process(child.pid) for child in control_plane.children.values()]
    assert len(processes) == 4
    control_plane.stop()
    assert [one for one in processes if one.is_running()] == []
    assert not (tmp_path / "etcd").exists()


def test_the_api_server_comes_back_with_its_objects(control_plane: Cluster, namespace: str) -> None:
    control_plane.kubectl("create", "configmap", "kept", "--from-literal=a=b", "-n", namespace)
    control_plane.processes.restart("kube-apiserver", signal.SIGKILL)
    assert control_plane.get("configmap", "kept", namespace)["data"] == {"a": "b"}


def test_pod_security_refuses_what_a_test_namespace_does_not_allow(
    control_plane: Cluster, namespace: str
) -> None:
    with pytest.raises(CommandFailed, match="violates PodSecurity") as refused:
        control_plane.apply(ROOT_POD, "-n", namespace)
    assert "runAsNonRoot" in refused.value.answer.err


def test_a_service_account_may_do_what_its_role_says_and_its_calls_are_in_the_audit_log(
    control_plane: Cluster, namespace: str
) -> None:
    control_plane.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    role = ["--verb=get,list", "--resource=configmaps", "-n", namespace]
    control_plane.kubectl("create", "role", "reader", *role)
    binding = ["--role=reader", f"--serviceaccount={namespace}:reader", "-n", namespace]
    control_plane.kubectl("create", "rolebinding", "reader", *binding)
    kubeconfig = str(control_plane.as_account("reader", namespace))

    as_reader = ("--kubeconfig", kubeconfig, "-n", namespace, "get")
    assert "kube-root-ca.crt" in control_plane.kubectl(*as_reader, "configmaps")
    denied = control_plane.kubectl(*as_reader, "secrets", check=False)
    assert denied.code != 0
    assert "Forbidden" in denied.err

    mine = [
        (call["objectRef"]["resource"], call["responseStatus"]["code"])
        for call in control_plane.processes.audit()
        if call["user"]["username"] == f"system:serviceaccount:{namespace}:reader"
        and "objectRef" in call
    ]
    assert ("configmaps", 200) in mine
    assert ("secrets", 403) in mine


def test_what_an_object_owns_goes_with_it(control_plane: Cluster, namespace: str) -> None:
    owner = control_plane.create(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}, namespace
    )
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner"}
    meta = {"name": "owned", "ownerReferences": [reference | {"uid": owner["metadata"]["uid"]}]}
    control_plane.create({"apiVersion": "v1", "kind": "Secret", "metadata": meta}, namespace)
    control_plane.delete("configmap", "owner", namespace)
    control_plane.wait_gone("secret", "owned", namespace)


def test_gpu_pods_are_spread_over_fake_nodes(
    control_plane: Cluster, kwok: FakeNodes, namespace: str
) -> None:
    kwok.add_p4d(1)
    control_plane.apply(DEPLOYMENT, "-n", namespace)
    control_plane.wait("deployment", "trainers", ready(2), namespace)
    [waiting] = [p for p in control_plane.items("pods", namespace) if "podIP" not in p["status"]]
    assert "Insufficient nvidia.com/gpu" in waiting["status"]["conditions"][0]["message"]
    kwok.add_p4d(1)
    control_plane.wait("deployment", "trainers", ready(3), namespace)


def test_helm_installs_and_waits(
    control_plane: Cluster, kwok: FakeNodes, namespace: str, tmp_path: Path
) -> None:
    kwok.add_p4d(2)
    (tmp_path / "templates").mkdir()
    (tmp_path / "Chart.yaml").write_text("apiVersion: v2\nname: trial\nversion: 0.1.0\n")
    (tmp_path / "templates" / "deployment.yaml").write_text(DEPLOYMENT)
    control_plane.helm("install", "trial", tmp_path, "-n", namespace, "--wait", "--timeout", "180s")
    assert control_plane.get("deployment", "trainers", namespace)["status"]["readyReplicas"] == 3
    control_plane.helm("uninstall", "trial", "-n", namespace)
    control_plane.wait_gone("deployment", "trainers", namespace)

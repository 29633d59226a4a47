"""The operator as a process of its own on a real API server, with the rights of the chart.

No pod runs here: `SimulatedPods` say what model apps and fetch Jobs would say, so that everything
else (schemas, rights, server-side apply, garbage collection, Jobs, namespaces) is real.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml
from cluster.operator.simulated_pods import SimulatedPods
from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object
from helm.rendering import Chart


class OperatorProcess:
    """``python -m calotype.operator`` with the ServiceAccount of the chart."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path, model_url: str) -> None:
        self.cluster, self.namespace, self.folder = cluster, namespace, folder
        self.kubeconfig = cluster.as_account("calotype-operator", namespace)
        self.log = folder / "operator.log"
        self.settings: Object = {
            "release": "calotype",
            "operatorNamespace": namespace,
            "serveImage": "calotype-serve:test",
            "dataClaim": "calotype-data",
            "modelUrl": model_url,
            "resourceProfiles": {
                "a100": {"gpus": 1, "requests": {"cpu": "8"}, "limits": {"cpu": "8"}}
            },
            "statusPollSeconds": 1,
            "busyPollSeconds": 0.5,
            "secretPollSeconds": 1,
            "retrySeconds": 2,
            "drainSeconds": 0.5,
            "healthPort": 0,
            "metricsPort": 0,
            "lease": False,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:calotype-operator"

    def start(self, **settings: Any) -> None:
        self.settings |= settings
        path = self.folder / "operator.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        words = [sys.executable, "-m", "calotype.operator", "--settings", str(path)]
        # Not from the checkout's root, where the folder `operator` is.
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                cwd=self.folder,
                env={**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder)},
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """Ends it as Kubernetes does; returns the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(120)
        self._process = None
        return code

    def calls(self) -> int:
        """How many calls of the operator the API server has answered so far."""
        return sum(1 for _ in self.cluster.processes.audit(self.user))

    def memory(self) -> float:
        """Resident memory in MB."""
        return float(psutil.Process(self.pid).memory_info().rss / 1e6)

    def log_end(self) -> str:
        return self.log.read_text()[-4000:]


def operator_rights(
    helm: Path, folder: Path, namespace: str, values: Object | None = None
) -> list[Object]:
    """ServiceAccount, Roles and bindings of the operator as the chart renders them."""
    chart = Chart(helm, folder)
    rendered = chart.render(
        "values-trial.yaml", values=values, release="calotype", namespace=namespace
    )
    kinds = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    return [
        obj
        for obj in rendered.objects
        if obj["kind"] in kinds and "operator" in obj["metadata"]["name"]
    ]


@contextlib.contextmanager
def running_operator(
    cluster: Cluster, helm: Path, folder: Path
) -> Iterator[tuple[OperatorProcess, SimulatedPods]]:
    """A namespace with the chart's rights and an operator that is not started yet."""
    with cluster.namespace(keep=True) as namespace:
        cluster.apply_objects(*operator_rights(helm, folder, namespace), namespace=namespace)
        with SimulatedPods(cluster, namespace) as pods:
            operator = OperatorProcess(cluster, namespace, folder, pods.url)
            try:
                yield operator, pods
            finally:
                operator.kill()
                if cluster.foreign:
                    remove_finalizers(cluster, namespace)


def remove_finalizers(cluster: Cluster, namespace: str) -> None:
    """Without an operator nobody takes the finalizers off."""
    none: Object = {"metadata": {"finalizers": None}}
    with ThreadPoolExecutor(8) as pool:
        for kind in ("loraadapters", "imagemodels"):
            held = [o for o in cluster.items(kind, namespace) if o["metadata"].get("finalizers")]
            names = [obj["metadata"]["name"] for obj in held]
            list(pool.map(lambda n, k=kind: cluster.patch(k, n, none, namespace), names))


def no_orphans(cluster: Cluster, namespace: str) -> None:
    """Deletes every custom resource of ours, and waits until nothing of theirs is left."""
    for kind in ("loraadapters", "loratrainings", "imagemodels", "moderationpolicies", "teams"):
        cluster.delete_all(kind, namespace)
    for kind in (
        *("deployments", "services", "jobs", "pods", "secrets", "persistentvolumeclaims"),
        *("rayservices", "rayjobs"),
    ):
        cluster.until(
            functools.partial(lambda k: not cluster.items(k, namespace), kind),
            f"no {kind} are left",
        )
    left = {c["metadata"]["name"] for c in cluster.items("configmaps", namespace)}
    assert left <= {"kube-root-ca.crt", "calotype-gateway-config", "calotype-gateway-teams"}

"""The operator as a process of its own on a real API server, with the rights of the chart.

No pod runs here: `Pretence` says what model apps and fetch Jobs would say, so that everything else
(schemas, rights, server-side apply, garbage collection, Jobs, namespaces) is real.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import yaml
from controlplane.cluster import Cluster, Object
from controlplane.kuberay.schema import definitions
from helm.rendering import Chart

from calotype.operator.kube.labels import MODEL
from calotype.operator.testing.cluster import good_fetch
from calotype.operator.testing.modelapps import FakeModelApp

ROOT = Path(__file__).resolve().parents[2]
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


class Pretence:
    """What runs in pods elsewhere: model apps that have what they are told, and fetch Jobs."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.apps: dict[str, FakeModelApp] = {}
        self.fetch: Callable[[Object], Object] = good_fetch
        self.fetched: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        pretence = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                _, _, namespace, service, *_ = self.path.split("/")
                told = pretence.status(namespace, service.removesuffix("-serve-svc"))
                body = json.dumps(told or {"error": "not running"}).encode()
                self.send_response(200 if told else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, daemon=True),
            threading.Thread(target=self._run_jobs, daemon=True),
        ]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/apps/{{namespace}}/{{service}}"

    def __enter__(self) -> Pretence:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def app(self, model: str) -> FakeModelApp:
        return self.apps.setdefault(model, FakeModelApp())

    def status(self, namespace: str, model: str) -> Object | None:
        with self._lock:
            application = self._application(namespace, model)
            if application is None:
                return None
            app = self.app(model)
            app.configure(application)
            return app.status()

    def _application(self, namespace: str, model: str) -> Object | None:
        deployment = self.cluster.find("deployment", model, namespace)
        if deployment is not None and deployment["spec"]["replicas"]:
            found = self.cluster.find("configmap", f"{model}-app", namespace)
            return dict(json.loads(found["data"]["model.json"])) if found else None
        service = self.cluster.find("rayservices", model, namespace)
        if service is None or service["spec"].get("suspend"):
            return None
        return dict(json.loads(service["spec"]["serveConfigV2"])["applications"][0])

    def _run_jobs(self) -> None:
        while not self._stop.wait(0.2):
            with contextlib.suppress(Exception):  # the API server may be away
                self._run_pods()

    def _run_pods(self) -> None:
        for pod in self.cluster.items("pods", self.namespace, "app.kubernetes.io/component=fetch"):
            if pod.get("status", {}).get("phase") != "Pending":
                continue
            job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            config = self.cluster.find("configmap", job, self.namespace)
            if config is None or MODEL not in pod["metadata"]["labels"]:
                continue
            told = self.fetch(json.loads(config["data"]["fetch.json"]))
            self.fetched.append(job)
            ended = {
                "exitCode": 0 if told["ok"] else 1,
                "message": json.dumps(told),
                "reason": "Completed" if told["ok"] else "Error",
                "startedAt": "2026-11-23T09:00:00Z",
                "finishedAt": "2026-11-23T09:00:01Z",
                "containerID": "pretended://1",
            }
            status = {
                "phase": "Succeeded" if told["ok"] else "Failed",
                "containerStatuses": [
                    {
                        "name": "fetch",
                        "image": "pretended",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 0,
                        "state": {"terminated": ended},
                    }
                ],
            }
            name = pod["metadata"]["name"]
            self.cluster.patch("pods", name, {"status": status}, self.namespace, sub="status")


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """An operator that was killed does not wait for its answer."""


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
        code = self._process.wait(30)
        self._process = None
        return code

    def memory(self) -> float:
        """Resident memory in MB."""
        return float(psutil.Process(self.pid).memory_info().rss / 1e6)

    def said(self) -> str:
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
def operated(
    cluster: Cluster, helm: Path, folder: Path
) -> Iterator[tuple[OperatorProcess, Pretence]]:
    """A namespace with the chart's rights and an operator that is not started yet."""
    with cluster.namespace() as namespace:
        for obj in operator_rights(helm, folder, namespace):
            cluster.apply(obj, "-n", namespace)
        with Pretence(cluster, namespace) as pretence:
            operator = OperatorProcess(cluster, namespace, folder, pretence.url)
            try:
                yield operator, pretence
            finally:
                operator.kill()
                let_go(cluster, namespace)


def let_go(cluster: Cluster, namespace: str) -> None:
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
        cluster.kubectl("delete", kind, "--all", "-n", namespace, "--timeout=120s")
    for kind in (
        *("deployments", "services", "jobs", "pods", "secrets", "persistentvolumeclaims"),
        *("rayservices", "rayjobs"),
    ):
        cluster.until(lambda kind=kind: not cluster.items(kind, namespace), f"no {kind} are left")
    left = {c["metadata"]["name"] for c in cluster.items("configmaps", namespace)}
    assert left <= {"kube-root-ca.crt", "calotype-gateway-config"}


def wait_while(holds: Callable[[], Any], seconds: float) -> bool:
    """Whether something held for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not holds():
            return False
        time.sleep(0.2)
    return True

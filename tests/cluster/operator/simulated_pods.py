"""The pods that would run beside the operator: they answer as model apps and fetch Jobs do.

A model app has what its configuration says at once. A fetch Job ends with what `fetch` returns for
its configuration.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from controlplane.client.cluster import Cluster
from controlplane.client.objects import Object

from calotype.operator.kube.labels import MODEL, model_of, workload_name
from calotype.operator.manifests.singlepod import config_map_name
from calotype.operator.testing.cluster import good_fetch
from calotype.operator.testing.modelapps import FakeModelApp
from calotype.serving.wire.model_status import ModelAppStatus


class SimulatedPods:
    """Model apps that have what they are given at once, and fetch Jobs that end at once."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.apps: dict[str, FakeModelApp] = {}
        self.fetch: Callable[[Object], Object] = good_fetch
        self.fetched: list[str] = []
        self.status_calls = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        simulated = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                _, _, namespace, service, *_ = self.path.split("/")
                status = simulated.status(namespace, model_of(service.removesuffix("-serve-svc")))
                body = json.dumps(status.payload() if status else {"error": "not running"}).encode()
                self.send_response(200 if status else 503)
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

    def __enter__(self) -> SimulatedPods:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def app(self, model: str) -> FakeModelApp:
        return self.apps.setdefault(model, FakeModelApp())

    def pushes(self, model: str) -> list[list[str]]:
        """The adapters of each configuration that the model's app was given, oldest first."""
        with self._lock:
            return list(self.app(model).pushes)

    def adapters(self, model: str) -> dict[str, Object]:
        """The adapters that the model's app was given last, by name."""
        with self._lock:
            return self.app(model).adapters()

    def status(self, namespace: str, model: str) -> ModelAppStatus | None:
        with self._lock:
            self.status_calls += 1
            application = self._application(namespace, model)
            if application is None:
                return None
            app = self.app(model)
            app.configure(application)
            return app.status()

    def _application(self, namespace: str, model: str) -> Object | None:
        deployment = self.cluster.find("deployment", workload_name(model), namespace)
        if deployment is not None and deployment["spec"]["replicas"]:
            found = self.cluster.find("configmap", config_map_name(model), namespace)
            return dict(json.loads(found["data"]["model.json"])) if found else None
        service = self.cluster.find("rayservices", workload_name(model), namespace)
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
            result = self.fetch(json.loads(config["data"]["fetch.json"]))
            self.fetched.append(job)
            ended = {
                "exitCode": 0 if result["ok"] else 1,
                "message": json.dumps(result),
                "reason": "Completed" if result["ok"] else "Error",
                "startedAt": "2026-11-23T09:00:00Z",
                "finishedAt": "2026-11-23T09:00:01Z",
                "containerID": "simulated://1",
            }
            status = {
                "phase": "Succeeded" if result["ok"] else "Failed",
                "containerStatuses": [
                    {
                        "name": "fetch",
                        "image": "simulated",
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

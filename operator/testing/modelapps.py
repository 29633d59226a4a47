"""Model apps that say what replicas would: each has its adapters as soon as it is told of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from calotype.operator.kube.labels import MODEL, REVISION
from calotype.operator.kube.resources import CONFIG_MAPS, DEPLOYMENTS, RAY_SERVICES, Resource
from calotype.operator.manifests.application import config_hash
from calotype.operator.testing.apiserver import FakeApiServer


@dataclass
class FakeModelApp:
    """One model's app."""

    application: dict[str, Any] | None = None
    running: bool = False
    replicas: int = 1
    queue_seconds: float = 0.0
    failing: dict[str, str] = field(default_factory=dict)
    """Adapter -> why replicas cannot load it; with `failing_replicas`, only the last ones.
    A replica keeps the revision that it has."""
    failing_replicas: int | None = None
    keeps: bool = False
    """Replicas hold on to adapters that they should forget."""
    pushes: list[list[str]] = field(default_factory=list)
    """The adapters of each configuration that was another one than that before."""
    remembered: set[str] = field(default_factory=set)
    good: dict[tuple[int, str], str] = field(default_factory=dict)
    """Replica and adapter -> the revision that was loaded last."""

    def configure(self, application: dict[str, Any]) -> None:
        if application == self.application:
            return
        self.application = application
        self.pushes.append(sorted(self.adapters()))

    def adapters(self) -> dict[str, dict[str, Any]]:
        for deployment in (self.application or {}).get("deployments", []):
            if deployment["name"] == "Generator":
                found = deployment["user_config"]["adapters"]
                return {a["metadata"]["name"]: a for a in found}
        return {}

    def status(self) -> dict[str, Any]:
        states = []
        for index in range(self.replicas):
            told = {
                name: self._state(index, name, adapter) for name, adapter in self.adapters().items()
            }
            if self.keeps:
                self.remembered |= set(told)
                told |= {name: {"state": "ready"} for name in self.remembered - set(told)}
            states.append(
                {
                    "replica": f"r{index}",
                    "node": f"node-{index}",
                    "ready": True,
                    "message": "",
                    "adapters": told,
                }
            )
        return {
            "name": (self.application or {}).get("name"),
            "ready": True,
            "replicas": self.replicas,
            "queueSeconds": self.queue_seconds,
            "configHash": config_hash(self.application) if self.application else "",
            "replicaStates": states,
        }

    def _state(self, index: int, name: str, adapter: dict[str, Any]) -> dict[str, Any]:
        annotations = adapter["metadata"].get("annotations", {})
        revision = adapter["spec"].get("sha256") or annotations.get(REVISION, "")
        has_it = self.good.get((index, name)) == revision
        fails = (name in self.failing and not has_it) and (
            self.failing_replicas is None or index >= self.replicas - self.failing_replicas
        )
        if fails:
            return {
                "state": "failed",
                "revision": revision,
                "servingRevision": self.good.get((index, name)),
                "message": self.failing[name],
            }
        self.good[index, name] = revision
        return {
            "state": "ready",
            "revision": revision,
            "servingRevision": revision,
            "loadMilliseconds": 12.0,
        }


class FakeModelApps:
    """All of them behind one address: ``URL/apps/NAMESPACE/SERVICE``."""

    def __init__(self, server: FakeApiServer) -> None:
        self._server = server
        self.apps: dict[tuple[str, str], FakeModelApp] = {}
        self.silent = False
        """Nobody answers while it is set."""
        self.token: str | None = None
        """What callers must say; None = they are not asked."""
        server.app.router.add_get("/apps/{namespace}/{service}/internal/v1/status", self._status)

    @property
    def url(self) -> str:
        """For ``OperatorSettings.model_url``."""
        return f"{self._server.url}/apps/{{namespace}}/{{service}}"

    def app(self, namespace: str, model: str) -> FakeModelApp:
        return self.apps.setdefault((namespace, model), FakeModelApp())

    def configured(self, resource: Resource, obj: dict[str, Any]) -> None:
        """A workload or its configuration was written."""
        metadata = obj["metadata"]
        model = (metadata.get("labels") or {}).get(MODEL)
        if not model:
            return
        app = self.app(metadata["namespace"], model)
        if resource == CONFIG_MAPS and "model.json" in obj.get("data", {}):
            app.configure(json.loads(obj["data"]["model.json"]))
        elif resource == DEPLOYMENTS:
            app.running = obj["spec"]["replicas"] > 0
        elif resource == RAY_SERVICES:
            app.running = not obj["spec"].get("suspend")
            app.configure(json.loads(obj["spec"]["serveConfigV2"])["applications"][0])

    def gone(self, resource: Resource, obj: dict[str, Any]) -> None:
        metadata = obj["metadata"]
        model = (metadata.get("labels") or {}).get(MODEL)
        if resource in (DEPLOYMENTS, RAY_SERVICES) and model:
            self.app(metadata["namespace"], model).running = False

    async def _status(self, request: web.Request) -> web.Response:
        service = request.match_info["service"].removesuffix("-serve-svc")
        app = self.app(request.match_info["namespace"], service)
        if self.token is not None and request.headers.get("Authorization") != (
            f"Bearer {self.token}"
        ):
            return web.json_response({"error": "unauthorized"}, status=401)
        if self.silent or not app.running or app.application is None:
            return web.json_response({"error": "not running"}, status=503)
        return web.json_response(app.status())

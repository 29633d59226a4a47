"""Fake model apps: their replicas have each adapter as soon as it is in their configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from aiohttp import web

from calotype.operator.kube.labels import MODEL, REVISION, model_of
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import CONFIG_MAPS, DEPLOYMENTS, RAY_SERVICES, Resource
from calotype.operator.manifests.application import config_hash, generator_config
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.serving.wire.model_status import AdapterState, ModelAppStatus, ReplicaState
from calotype.serving.wire.team_owners import TeamOwners


@dataclass
class FakeModelApp:
    """One model's app."""

    application: Manifest | None = None
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

    def configure(self, application: Manifest) -> None:
        if application == self.application:
            return
        self.application = application
        self.pushes.append(sorted(self.adapters()))

    def adapters(self) -> dict[str, Manifest]:
        found = generator_config(self.application or {}).get("adapters") or ()
        return {adapter["metadata"]["name"]: adapter for adapter in found}

    def status(self) -> ModelAppStatus:
        states = []
        for index in range(self.replicas):
            adapters = {
                name: self._state(index, name, adapter) for name, adapter in self.adapters().items()
            }
            if self.keeps:
                self.remembered |= set(adapters)
                kept = self.remembered - set(adapters)
                adapters |= {name: AdapterState(state="ready") for name in kept}
            states.append(
                ReplicaState(
                    replica=f"r{index}", node=f"node-{index}", ready=True, adapters=adapters
                )
            )
        application = self.application or {}
        return ModelAppStatus(
            name=application.get("name", ""),
            ready=True,
            replicas=self.replicas,
            queue_seconds=self.queue_seconds,
            config_hash=config_hash(application) if application else "",
            replica_states=tuple(states),
        )

    def _state(self, index: int, name: str, adapter: Manifest) -> AdapterState:
        annotations = adapter["metadata"].get("annotations", {})
        revision = adapter["spec"].get("sha256") or annotations.get(REVISION, "")
        has_it = self.good.get((index, name)) == revision
        fails = (name in self.failing and not has_it) and (
            self.failing_replicas is None or index >= self.replicas - self.failing_replicas
        )
        if fails:
            return AdapterState(
                state="failed",
                revision=revision,
                serving_revision=self.good.get((index, name)),
                message=self.failing[name],
            )
        self.good[index, name] = revision
        return AdapterState(
            state="ready", revision=revision, serving_revision=revision, load_milliseconds=12.0
        )


class FakeModelApps:
    """All of them behind one address: ``URL/apps/NAMESPACE/SERVICE``."""

    def __init__(self, server: FakeApiServer) -> None:
        self._server = server
        self.apps: dict[tuple[str, str], FakeModelApp] = {}
        self.silent = False
        """Nobody answers while it is set."""
        self.owners: TeamOwners | None = None
        """What gateways say of teams; None = they do not answer."""
        self.token: str | None = None
        """What callers must say; None = they are not asked."""
        server.app.router.add_get("/apps/{namespace}/{service}/internal/v1/status", self._status)

    @property
    def url(self) -> str:
        """For ``OperatorSettings.model_url``."""
        return f"{self._server.url}/apps/{{namespace}}/{{service}}"

    def app(self, namespace: str, model: str) -> FakeModelApp:
        return self.apps.setdefault((namespace, model), FakeModelApp())

    def answer(self, namespace: str, model: str) -> ModelAppStatus | None:
        """What the app of a model answers; None = nothing."""
        app = self.app(namespace, model)
        if self.silent or not app.running or app.application is None:
            return None
        return app.status()

    def configured(self, resource: Resource, obj: Manifest) -> None:
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

    def gone(self, resource: Resource, obj: Manifest) -> None:
        metadata = obj["metadata"]
        model = (metadata.get("labels") or {}).get(MODEL)
        if resource in (DEPLOYMENTS, RAY_SERVICES) and model:
            self.app(metadata["namespace"], model).running = False

    async def _status(self, request: web.Request) -> web.Response:
        service = model_of(request.match_info["service"].removesuffix("-serve-svc"))
        if self.token is not None and request.headers.get("Authorization") != (
            f"Bearer {self.token}"
        ):
            return web.json_response({"error": "unauthorized"}, status=401)
        status = self.answer(request.match_info["namespace"], service)
        if status is None:
            return web.json_response({"error": "not running"}, status=503)
        return web.json_response(status.payload())

"""A fake cluster with the whole operator in it, and what a user does with them.

`virtual.World` is one in virtual time, `live.LiveWorld` one over HTTP.
"""

from __future__ import annotations

import abc
import base64
import json
from collections.abc import Callable
from typing import Any, TypeVar

from calotype.operator.app import Operator
from calotype.operator.kube.objects import Manifest
from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    IMAGE_MODELS,
    LORA_ADAPTERS,
    SECRETS,
    Resource,
    resource_of,
)
from calotype.operator.manifests.application import generator_config
from calotype.operator.settings import OperatorSettings
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.operator.testing.cluster import FakeCluster

T = TypeVar("T")


class AnyWorld(abc.ABC):
    """The fake cluster, and what a user does with it."""

    def __init__(self, server: FakeApiServer, cluster: FakeCluster) -> None:
        self.server, self.cluster = server, cluster
        self.namespace = cluster.namespace("calotype")
        self.overrides: Manifest = {}
        self.operator: Operator | None = None

    def settings(self) -> OperatorSettings:
        document = {
            "release": "calotype",
            "namespaces": ["*"],
            "operatorNamespace": "calotype",
            "serveImage": "calotype-serve:test",
            "dataClaim": "calotype-data",
            "modelUrl": self.cluster.apps.url,
            "resourceProfiles": {
                "a100": {
                    "gpus": 1,
                    "requests": {"cpu": "8", "memory": "96Gi"},
                    "limits": {"cpu": "8", "memory": "96Gi"},
                    "hourCost": 3.5,
                }
            },
            "debounceSeconds": 0.3,
            "busyPollSeconds": 0.1,
            "statusPollSeconds": 0.3,
            "secretPollSeconds": 0.2,
            "retrySeconds": 1.0,
            "drainSeconds": 0.2,
            "healthPort": 0,
            "metricsPort": 0,
            "lease": False,
        }
        return OperatorSettings.model_validate(document | self.overrides)

    @abc.abstractmethod
    async def start(self, **overrides: Any) -> Operator:
        """Starts the operator, with other settings."""

    @abc.abstractmethod
    async def stop(self) -> None:
        """Ends the operator as SIGTERM does."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """Ends the operator in the middle of whatever it does."""

    @abc.abstractmethod
    async def until(self, holds: Callable[[], T], what: str) -> T:
        """Goes on until the operator has brought something about."""

    @abc.abstractmethod
    async def quiet(self, seconds: float = 0.6) -> None:
        """Goes on until nothing has been written for a while."""

    # --- what users do --------------------------------------------------------------------------

    def apply(self, obj: Manifest) -> Manifest:
        """As kubectl would, under another field manager than ours."""
        return self.server.objects.apply(resource_of(obj), obj, "kubectl", "")

    def delete(self, resource: Resource, name: str, namespace: str = "calotype") -> None:
        self.server.objects.delete(resource, namespace, name)

    def annotate(self, resource: Resource, name: str, **annotations: str) -> None:
        known = {f"calotype.dev/{k.replace('_', '-')}": v for k, v in annotations.items()}
        self.server.objects.merge(resource, "calotype", name, {"metadata": {"annotations": known}})

    def find(self, resource: Resource, name: str, namespace: str = "calotype") -> Manifest | None:
        return self.server.objects.find(resource, namespace, name)

    def get(self, resource: Resource, name: str, namespace: str = "calotype") -> Manifest:
        """The object, which must be there."""
        found = self.find(resource, name, namespace)
        assert found is not None, f"there is no {resource.kind} {name}"
        return found

    def status(self, resource: Resource, name: str, namespace: str = "calotype") -> Manifest:
        return dict(self.get(resource, name, namespace).get("status") or {})

    def secret(self, name: str, namespace: str = "calotype", **data: str) -> None:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "data": encoded,
        }
        if self.find(SECRETS, name, namespace) is None:
            self.server.objects.create(SECRETS, manifest)
        else:
            self.server.objects.merge(SECRETS, namespace, name, {"data": encoded})

    # --- what they see --------------------------------------------------------------------------

    async def condition(
        self,
        resource: Resource,
        name: str,
        type_: str,
        status: str = "True",
        reason: str | None = None,
        namespace: str = "calotype",
    ) -> Manifest:
        """Waits until a condition of the present generation is so."""

        def found() -> Manifest | None:
            obj = self.find(resource, name, namespace)
            if obj is None:
                return None
            for condition in (obj.get("status") or {}).get("conditions", []):
                if (condition["type"], condition["status"]) != (type_, status):
                    continue
                fresh = condition["observedGeneration"] == obj["metadata"]["generation"]
                if fresh and reason in (None, condition["reason"]):
                    return dict(condition)
            return None

        shown = f"{resource.kind} {name}: {type_}={status} {reason or ''}"
        return dict(await self.until(found, shown))

    async def ready(self, resource: Resource, name: str, namespace: str = "calotype") -> Manifest:
        await self.condition(resource, name, "Ready", namespace=namespace)
        found = self.find(resource, name, namespace)
        assert found is not None
        return found

    async def gone(self, resource: Resource, name: str, namespace: str = "calotype") -> None:
        await self.until(
            lambda: self.find(resource, name, namespace) is None, f"{resource.kind} {name} is gone"
        )

    def conditions(self) -> str:
        """All conditions, for a test that failed."""
        lines = []
        for resource in (IMAGE_MODELS, LORA_ADAPTERS):
            for (_, name), obj in self.server.objects.all(resource).items():
                conditions = (obj.get("status") or {}).get("conditions", [])
                shown = [f"{c['type']}={c['status']}({c['reason']})" for c in conditions]
                lines.append(f"{resource.kind} {name}: {' '.join(shown)}")
        return "\n".join(lines[:12])

    # --- documents ------------------------------------------------------------------------------

    def gateway(self) -> Manifest:
        """gateway.json; empty before there is one."""
        found = self.find(CONFIG_MAPS, "calotype-gateway-config")
        return dict(json.loads(found["data"]["gateway.json"])) if found else {}

    def teams(self) -> dict[str, Manifest]:
        """The teams of teams.json by name; none before there is one."""
        found = self.find(CONFIG_MAPS, "calotype-gateway-teams")
        declared = json.loads(found["data"]["teams.json"])["teams"] if found else []
        return {team["name"]: team for team in declared}

    def application(self, model: str = "shapes") -> Manifest:
        """model.json of a model in one pod."""
        found = self.get(CONFIG_MAPS, f"model-{model}-app")
        return dict(json.loads(found["data"]["model.json"]))

    def pushed(self) -> dict[str, Manifest]:
        """The adapters that the replicas are configured with, by name."""
        found = generator_config(self.application())["adapters"]
        return {adapter["metadata"]["name"]: adapter for adapter in found}

    def user_config(self, deployment: str) -> Manifest:
        """What one deployment of the model app is configured with."""
        deployments = {d["name"]: d for d in self.application()["deployments"]}
        return dict(deployments[deployment]["user_config"])

"""A pretended cluster with the whole operator in it, and manifests to apply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from calotype.operator.app import Operator
from calotype.operator.kube.client import HttpKubeClient
from calotype.operator.kube.resources import (
    IMAGE_MODELS,
    LORA_ADAPTERS,
    SECRETS,
    Resource,
    resource_of,
)
from calotype.operator.settings import OperatorSettings
from calotype.operator.testing.apiserver import FakeApiServer
from calotype.operator.testing.cluster import FakeCluster

Object = dict[str, Any]
PATIENCE = 60.0
"""Seconds; a reconcile that fails five times in a row is tried again half a minute later."""


class World:
    """The pretended cluster, and what a user does with it."""

    def __init__(self, server: FakeApiServer, cluster: FakeCluster, folder: Path) -> None:
        self.server, self.cluster, self.folder = server, cluster, folder
        self.namespace = cluster.namespace("calotype")
        self.overrides: dict[str, Any] = {}
        self.operator: Operator | None = None
        self._running: asyncio.Task[None] | None = None

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

    async def start(self, **overrides: Any) -> Operator:
        """The operator, in this process; the very one that the image runs."""
        self.overrides |= overrides
        kube = HttpKubeClient()
        self.operator = Operator(self.settings(), kube)

        async def run(operator: Operator) -> None:
            async with kube:
                await operator.run()

        self._running = asyncio.create_task(run(self.operator))
        await self.until(lambda: self.operator and self.operator.watcher.scope, "watching began")
        return self.operator

    async def stop(self) -> None:
        if self.operator is not None and self._running is not None:
            self.operator.stop()
            await self._running
            self.operator = self._running = None

    async def kill(self) -> None:
        """Ends the operator in the middle of whatever it does."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self.operator = self._running = None

    # --- what users do --------------------------------------------------------------------------

    def apply(self, obj: Object) -> Object:
        """As kubectl would, under another field manager than ours."""
        return self.server.objects.apply(resource_of(obj), obj, "kubectl", "")

    def delete(self, resource: Resource, name: str, namespace: str = "calotype") -> None:
        self.server.objects.delete(resource, namespace, name)

    def annotate(self, resource: Resource, name: str, **annotations: str) -> None:
        known = {f"calotype.dev/{k.replace('_', '-')}": v for k, v in annotations.items()}
        self.server.objects.merge(resource, "calotype", name, {"metadata": {"annotations": known}})

    def find(self, resource: Resource, name: str, namespace: str = "calotype") -> Object | None:
        return self.server.objects.find(resource, namespace, name)

    def secret(self, name: str, namespace: str = "calotype", **data: str) -> None:
        import base64

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

    async def until(self, holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Waits for something that the operator brings about."""
        found = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    if self._running is not None and self._running.done():
                        self._running.result()
                    found = holds()
                    if found:
                        return found
                    await asyncio.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what}; {self.told()}")

    async def condition(
        self,
        resource: Resource,
        name: str,
        type_: str,
        status: str = "True",
        reason: str | None = None,
        namespace: str = "calotype",
    ) -> Object:
        """Waits until a condition of the present generation is so."""

        def found() -> Object | None:
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

    async def ready(self, resource: Resource, name: str, namespace: str = "calotype") -> Object:
        await self.condition(resource, name, "Ready", namespace=namespace)
        found = self.find(resource, name, namespace)
        assert found is not None
        return found

    async def gone(self, resource: Resource, name: str, namespace: str = "calotype") -> None:
        await self.until(
            lambda: self.find(resource, name, namespace) is None, f"{resource.kind} {name} is gone"
        )

    async def quiet(self, seconds: float = 0.6) -> None:
        """Until nothing has been written for a while."""
        loop = asyncio.get_running_loop()
        version, since = self.server.objects.version, loop.time()
        async with asyncio.timeout(PATIENCE):
            while loop.time() - since < seconds:
                await asyncio.sleep(0.05)
                if self.server.objects.version != version:
                    version, since = self.server.objects.version, loop.time()

    def told(self) -> str:
        """All conditions, for a test that failed."""
        lines = []
        for resource in (IMAGE_MODELS, LORA_ADAPTERS):
            for (_, name), obj in self.server.objects.all(resource).items():
                conditions = (obj.get("status") or {}).get("conditions", [])
                shown = [f"{c['type']}={c['status']}({c['reason']})" for c in conditions]
                lines.append(f"{resource.kind} {name}: {' '.join(shown)}")
        return "\n".join(lines[:12])


def model(name: str = "shapes", namespace: str = "calotype", **spec: Any) -> Object:
    """An ImageModel that needs nothing."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "ImageModel",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"source": {"builtIn": {"name": "shapes"}}, "runtime": "SinglePod", **spec},
    }


def adapter(name: str = "stripes", namespace: str = "calotype", **spec: Any) -> Object:
    """A LoRAAdapter that needs nothing."""
    return {
        "apiVersion": "calotype.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "modelRef": {"name": "shapes"},
            "source": {"builtIn": {"name": "stripes"}},
            **spec,
        },
    }


def of_hub(name: str = "sneaker", repo: str = "acme/sneaker", **spec: Any) -> Object:
    """A LoRAAdapter that has to be fetched."""
    source = {"huggingFace": {"repo": repo, "revision": "main"}}
    return adapter(name, **{"source": source, **spec})


@pytest.fixture
def manifests() -> Any:
    """`model`, `adapter` and `of_hub`, which test files cannot import from here."""
    import types

    return types.SimpleNamespace(model=model, adapter=adapter, of_hub=of_hub)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    logging.getLogger("kopf").setLevel(logging.CRITICAL)
    server = FakeApiServer()
    cluster = FakeCluster(server)
    async with server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        world = World(server, cluster, tmp_path)
        try:
            yield world
        finally:
            await world.kill()
            await cluster.close()

"""Point 12 of the design page: whatever the API server does, nothing is lost and nothing twice."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from calotype.operator.kube.resources import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    IMAGE_MODELS,
    JOBS,
    LORA_ADAPTERS,
    PODS,
    SECRETS,
    TEAMS,
)
from calotype.operator.runtime.workqueue import Key

from . import manifests
from .live import LiveWorld

pytestmark = pytest.mark.slow

NAMES = [f"sneaker-{number}" for number in range(6)]


def everything(live: LiveWorld) -> None:
    """A model, adapters that have to be fetched, and a team."""
    live.apply(manifests.model())
    for name in NAMES:
        live.apply(manifests.of_hub(name, repo=f"acme/{name}"))
    live.apply(
        {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "Team",
            "metadata": {"name": "shoes", "namespace": "calotype"},
            "spec": {},
        }
    )


async def all_ready(live: LiveWorld) -> None:
    await live.ready(IMAGE_MODELS, "shapes")
    await live.ready(TEAMS, "shoes")
    for name in NAMES:
        await live.ready(LORA_ADAPTERS, name)


def nothing_twice(live: LiveWorld) -> None:
    """Each adapter was fetched once, each child made once, and nothing is left over."""
    created = Counter(
        (change.resource.kind, change.obj["metadata"]["name"])
        for change in live.server.objects.changes
        if change.type == "ADDED" and change.resource in (DEPLOYMENTS, SECRETS, CONFIG_MAPS)
    )
    assert {name: count for name, count in created.items() if count > 1} == {}
    fetched = Counter(name.rsplit("-", 1)[0] for name in live.cluster.started_jobs)
    assert fetched == {f"fetch-{name}": 1 for name in NAMES}
    assert not live.server.objects.all(JOBS)
    assert not live.server.objects.all(PODS)


FAULTS: dict[str, list[dict[str, Any]]] = {
    "conflicts": [
        {"method": "PATCH", "path": "loraadapters/[^/]*[?]", "status": 409, "times": 5},
        {"method": "PATCH", "path": "imagemodels/", "status": 409, "times": 3},
    ],
    "too many requests": [
        {"method": "PATCH", "path": "/status", "status": 429, "times": 8, "retry_after": 1},
        {"method": "GET", "path": "jobs", "status": 429, "times": 4},
        {"method": "GET", "path": "watch=true", "status": 429, "times": 3},
    ],
    "server errors": [
        {"method": "POST", "path": "jobs", "status": 500, "times": 3},
        {"method": "PATCH", "path": "configmaps", "status": 500, "times": 3},
        {"method": "GET", "path": "loraadapters", "status": 503, "times": 6},
    ],
    "broken connections": [
        {"method": "POST", "path": "jobs", "times": 2},
        {"method": "PATCH", "path": "", "times": 6},
        {"method": "GET", "path": "", "times": 6},
    ],
    "lost answers": [
        {"method": "POST", "path": "jobs", "times": 4, "after": True},
        {"method": "POST", "path": "secrets", "times": 1, "after": True},
        {"method": "PATCH", "path": "/status", "times": 6, "after": True},
        {"method": "PATCH", "path": "deployments", "times": 1, "after": True},
        {"method": "DELETE", "path": "jobs", "times": 3, "after": True},
    ],
    "slow": [
        {"method": "POST", "path": "jobs", "times": 4, "delay": 0.7},
        {"method": "PATCH", "path": "/status", "times": 6, "delay": 0.5},
    ],
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_point_12_faults_delay_and_change_nothing(live: LiveWorld, kind: str) -> None:
    everything(live)
    for fault in FAULTS[kind]:
        live.server.fail(**fault)
    await live.start()
    await all_ready(live)
    await live.quiet()
    nothing_twice(live)
    assert all(fault.times <= 0 for fault in live.server.faults), "every fault happened"


async def test_point_12_watches_that_drop_and_histories_that_are_forgotten_lose_nothing(
    live: LiveWorld,
) -> None:
    everything(live)
    await live.start()
    for round_ in range(4):
        await asyncio.sleep(0.4)
        live.server.drop_watches()
        live.apply(manifests.adapter(f"late-{round_}"))
        if round_ % 2:
            live.server.objects.forget_history()
    await all_ready(live)
    for round_ in range(4):
        await live.ready(LORA_ADAPTERS, f"late-{round_}")


async def test_point_12_what_was_deleted_unseen_is_forgotten(live: LiveWorld) -> None:
    """No watch tells of it: the finalizer was taken off by somebody else, and the event lost."""
    live.apply(manifests.model())
    live.apply(manifests.adapter())
    operator = await live.start(resyncSeconds=0.5)
    await live.ready(LORA_ADAPTERS, "stripes")
    live.server.objects.listeners.clear()  # nobody hears of what follows
    live.server.objects.all(LORA_ADAPTERS).clear()
    live.server.objects.listeners.append(live.server.publish)
    operator.queue.add(Key("Resync", "", ""))

    def forgotten() -> bool:
        config = json.loads(live.find(CONFIG_MAPS, "model-shapes-app")["data"]["model.json"])
        generator = next(d for d in config["deployments"] if d["name"] == "Generator")
        return generator["user_config"]["adapters"] == []

    await live.until(forgotten, "the replicas are told to forget it")


async def test_point_12_an_api_server_that_goes_and_comes(live: LiveWorld) -> None:
    everything(live)
    await live.start()
    await live.ready(IMAGE_MODELS, "shapes")
    await live.server.__aexit__()
    await asyncio.sleep(1.5)
    restarted = type(live.server)(live.server.resources)
    restarted.objects, restarted.port = live.server.objects, live.server.port
    restarted.objects.listeners.remove(live.server.publish)
    restarted.objects.listeners.append(restarted.publish)
    from calotype.operator.testing.modelapps import FakeModelApps

    apps = live.cluster.apps.apps
    live.cluster.apps = FakeModelApps(restarted)
    live.cluster.apps.apps = apps
    async with restarted:
        live.server = live.cluster.server = restarted
        await all_ready(live)
        await live.quiet()
        nothing_twice(live)
        await live.kill()


async def test_point_12_an_operator_that_is_stopped_and_started_does_nothing_twice(
    live: LiveWorld,
) -> None:
    everything(live)
    live.server.fail("PATCH", "/status", times=20, delay=0.1)
    for seconds in (0.2, 0.3, 0.4, 0.5):
        await live.start()
        await asyncio.sleep(seconds)
        await live.kill()
    await live.start()
    await all_ready(live)
    await live.quiet()
    nothing_twice(live)
    version = live.server.objects.version
    await live.stop()
    await live.start()
    await all_ready(live)
    await live.quiet()
    assert live.server.objects.version == version, "a restart alone writes nothing"


async def test_a_namespace_that_is_forbidden_does_not_stop_the_others(live: LiveWorld) -> None:
    live.cluster.namespace("shoes")
    live.server.forbidden.add("shoes")
    live.apply(manifests.model())
    operator = await live.start(namespaces=["calotype", "shoes"])
    await live.ready(IMAGE_MODELS, "shapes")
    assert operator.watcher.scope is not None
    assert operator.watcher.scope.namespaces == ("calotype",)


async def test_a_namespace_that_loses_its_rights_meanwhile_does_not_either(live: LiveWorld) -> None:
    live.cluster.namespace("shoes")
    operator = await live.start(namespaces=["calotype", "shoes"])
    live.server.forbidden.add("shoes")
    live.server.drop_watches()
    await live.until(
        lambda: operator.watcher.scope and operator.watcher.scope.namespaces == ("calotype",),
        "the others are watched on",
    )
    live.apply(manifests.model())
    await live.ready(IMAGE_MODELS, "shapes")
